// The small functions of the ABI (abi.h): what this CPU can run, packing, linear layers. All experts of a layer in one
// call: experts.cpp. The front's half of a layer in one call: front_layer.cpp, attention.cpp.

#include "products.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

const char* const ISAS[] = {"avx2", "avx512_bf16", "amx_bf16"};
constexpr int NUM_ISAS = 3;

bool may_use_amx() {  // Linux hands out the tile registers on request
#if defined(__linux__)
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace

EXPORT const char* outcrop_isa_name(int isa) { return isa < NUM_ISAS ? ISAS[isa] : nullptr; }

EXPORT int outcrop_isa_works(int isa) {
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case 0: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case 1: return avx512;
    case 2: return avx512 && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") && may_use_amx();
    default: return 0;
  }
}

EXPORT long outcrop_packed_bytes(int is_int8, long O, long D) { return format_of(is_int8).matrix_bytes(O, D); }

EXPORT void outcrop_pack(int is_int8, const bf16* w, long O, long D, char* packed) {
  pack_rows(format_of(is_int8), O, D, packed, [&](long o) { return w + o * D; });
}

EXPORT void outcrop_linear(int isa, long threads, const bf16* x, long T, long D, const char* packed, long O,
                           const bf16* bias, bf16* y) {
  const Call call(BFLOAT16, isa, threads);
  const char* act = activations(call, call.s.x, T, D, [&](long t, float* row) { widen_row(x + t * D, D, row); });
  product(call, packed, O, D, act, T, [&](long t, long first, long width, float* sums) {
    if (bias) add_narrow(bias + first, width, sums);
    narrow_row(sums, width, y + t * O + first);
  });
}

EXPORT void outcrop_use_huge_pages(char* data, long bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t first = (uintptr_t(data) + PAGE - 1) / PAGE * PAGE, last = (uintptr_t(data) + bytes) / PAGE * PAGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

EXPORT uint64_t outcrop_read(long threads, const char* data, long bytes) {
  State& s = state();
  std::lock_guard<std::mutex> guard(s.one_call);
  std::atomic<uint64_t> total{0};
  constexpr long PIECE = 1 << 20;
  s.pool.run(bytes / PIECE, threads, [&](long piece) {
    uint64_t sum[8] = {};
    const char* here = data + piece * PIECE;
    for (long i = 0; i < PIECE; i += 64)
      for (int j = 0; j < 8; ++j) {
        uint64_t word;
        std::memcpy(&word, here + i + 8 * j, 8);
        sum[j] += word;
      }
    for (uint64_t part : sum) total += part;
  });
  return total;
}
