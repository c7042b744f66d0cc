// Products with packed matrices at memory speed, behind a C ABI that knows nothing of torch or Python: linear layers, and
// all experts of a layer in one call. How matrices are packed, and what multiplies them: tiles.h.
//
// What is computed for a token does not depend on the tokens beside it, nor on the number of threads.
//
// Letters: T tokens, D inputs, O outputs, F expert hidden, E experts, K top-k, P (token, choice) pairs.

#include "tiles.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

const char* const ISAS[] = {"avx2", "avx512_bf16", "amx_bf16"};
constexpr int NUM_ISAS = 3;
constexpr long FEW = 32;    // rows that are not worth waking a thread for
constexpr long TILES = 4;   // tiles that a thread takes at a time, ...
constexpr long CHUNK = 24;  // ... and rows that it takes all of them past, so that both stay in its cache

bool may_use_amx() {  // Linux hands out the tile registers on request
#if defined(__linux__)
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return granted;
#else
  return false;
#endif
}

const Format& format_of(int is_int8) { return is_int8 ? INT8 : BFLOAT16; }

AVX2 void silu_times(float* gate, const float* up, long n) {
  for (long i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + exp_(-gate[i])) * up[i];
}

AVX2 void scale_row(const float* row, float factor, long n, float* out) {
  for (long i = 0; i < n; ++i) out[i] = factor * row[i];
}

AVX2 void add_row(const float* row, long n, float* out) {
  for (long i = 0; i < n; ++i) out[i] += row[i];
}

// `count` rows of activations in `scratch`; row_of(i) is the bfloat16 row [D] that the i-th is made of.
template <typename RowOf>
char* activations(const Format& format, const Kernel& kernel, State& s, Scratch& scratch, long count, long D,
                  long threads, RowOf row_of) {
  const long padded = format.padded(D), stride = format.row_bytes(D, kernel);
  char* act = scratch.at_least(count * stride);
  s.pool.run(count, count < FEW ? 1 : threads, [&](long i) {
    char* to = act + i * stride;
    std::vector<float> wide(kernel.activate ? padded : 0);
    float* row = kernel.activate ? wide.data() : reinterpret_cast<float*>(to);
    widen_row(row_of(i), D, row);
    std::fill(row + D, row + padded, 0.0f);
    if (kernel.activate) kernel.activate(row, padded, to);
  });
  return act;
}

// Calls each(tile, row, count) for all of a matrix's tiles [first, last) and rows [from, to), `count` rows at a time.
template <typename Each>
void blocks(const Kernel& kernel, long first, long last, long from, long to, Each each) {
  for (long chunk = from; chunk < to; chunk += CHUNK) {
    const long rows = std::min(CHUNK, to - chunk), parts = (rows + kernel.max_rows - 1) / kernel.max_rows;
    const long part = (rows + parts - 1) / parts;  // 4 + 4 is faster than 6 + 2
    for (long tile = first; tile < last; ++tile)
      for (long row = 0; row < rows; row += part) each(tile, chunk + row, std::min(part, rows - row));
  }
}

// Tiles [first, last) of the `item`-th share of a matrix.
struct Share {
  long first, last;
  Share(long item, long tiles) : first(item * TILES), last(std::min(tiles, first + TILES)) {}
  static long number(long tiles) { return (tiles + TILES - 1) / TILES; }
};

// The (token, choice) pairs of each expert, next to one another.
struct Grouped {
  std::vector<long> start, slot, token;  // first pair of an expert; where a choice's pair lies, or -1; its token
  std::vector<float> gate;
  std::vector<long> busy;  // experts that have tokens

  Grouped(const int64_t* rows, const bf16* gates, long T, long K, long E) : start(E + 1, 0), slot(T * K, -1) {
    for (long c = 0; c < T * K; ++c)
      if (rows[c] < E) ++start[rows[c] + 1];
    for (long e = 0; e < E; ++e) {
      if (start[e + 1]) busy.push_back(e);
      start[e + 1] += start[e];
    }
    std::vector<long> next(start.begin(), start.end() - 1);
    token.resize(num_pairs()), gate.resize(num_pairs());
    for (long c = 0; c < T * K; ++c)
      if (rows[c] < E) {
        const long at = slot[c] = next[rows[c]]++;
        token[at] = c / K, gate[at] = widen(gates[c]);
      }
  }

  long num_pairs() const { return start.back(); }
};

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------

// Name of instruction set `number`, or null where there is none.
EXPORT const char* outcrop_isa_name(int number) { return number < NUM_ISAS ? ISAS[number] : nullptr; }

// Whether this CPU, and the operating system, can use it.
EXPORT int outcrop_isa_works(int number) {
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vnni");
  switch (number) {
    case 0: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case 1: return avx512;
    case 2: return avx512 && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") && may_use_amx();
    default: return 0;
  }
}

// Bytes of a packed matrix [O, D].
EXPORT long outcrop_packed_bytes(int is_int8, long O, long D) { return format_of(is_int8).matrix_bytes(O, D); }

EXPORT void outcrop_pack(int is_int8, const bf16* w, long O, long D, char* packed) {
  const Format& format = format_of(is_int8);
  for (long o = 0; o < round_up(O, TILE); ++o) {
    char* tile = packed + o / TILE * format.tile_bytes(D);
    format.pack_row(w + o * D, o < O ? D : 0, format.padded(D), o % TILE, tile);
  }
}

// y [T, O] = x [T, D] W^T + bias; bias may be null.
EXPORT void outcrop_linear(int number, long threads, const bf16* x, long T, long D, const char* packed, long O,
                           const bf16* bias, bf16* y) {
  const Format& format = BFLOAT16;
  const Kernel& kernel = format.kernels[number];
  State& s = state();
  std::lock_guard<std::mutex> guard(s.one_call);
  const long padded = format.padded(D), stride = format.row_bytes(D, kernel);
  const char* act = activations(format, kernel, s, s.x, T, D, threads, [&](long t) { return x + t * D; });
  const long tiles = round_up(O, TILE) / TILE;
  s.pool.run(Share::number(tiles), threads, [&](long item) {
    const Share share(item, tiles);
    blocks(kernel, share.first, share.last, 0, T, [&](long tile, long t, long count) {
      float sums[MAX_ROWS * TILE], wide_bias[TILE];
      const long first = tile * TILE, width = std::min(TILE, O - first);
      kernel.multiply(packed + tile * format.tile_bytes(D), padded, act + t * stride, stride, count, sums);
      if (bias) widen_row(bias + first, width, wide_bias);
      for (long m = 0; m < count; ++m) {
        if (bias) add_row(wide_bias, width, sums + m * TILE);
        narrow_row(sums + m * TILE, width, y + (t + m) * O + first);
      }
    });
  });
}

// out [T, D] = sum over each token's choices of gate * down(silu(gate_up(x)).
// rows [T, K]: which of the E experts, E or more for choices that are computed elsewhere.
// Each expert is packed as gate [F, D], up [F, D] and down [D, F], one behind the other.
EXPORT void outcrop_experts(int is_int8, int number, long threads, const bf16* x, long T, long D, long F,
                            const int64_t* rows, const bf16* gates, long K, long E, const char* experts, bf16* out) {
  const Format& format = format_of(is_int8);
  const Kernel& kernel = format.kernels[number];
  State& s = state();
  std::lock_guard<std::mutex> guard(s.one_call);
  const Grouped pairs(rows, gates, T, K, E);
  const long up_at = format.matrix_bytes(F, D), down_at = 2 * up_at, bytes = down_at + format.matrix_bytes(D, F);
  const long P = pairs.num_pairs(), num_busy = long(pairs.busy.size());

  const long padded = format.padded(D), stride = format.row_bytes(D, kernel);
  const char* act =
      activations(format, kernel, s, s.x, P, D, threads, [&](long p) { return x + pairs.token[p] * D; });

  // gate and up of 16 hidden units together, so that silu needs no second pass. Padding of hidden units is zero: their
  // weights are.
  const long hidden_padded = format.padded(F), hidden_tiles = round_up(F, TILE) / TILE;
  float* hidden = reinterpret_cast<float*>(s.hidden.at_least(P * hidden_padded * sizeof(float)));
  const long hidden_shares = Share::number(hidden_tiles);
  s.pool.run(num_busy * hidden_shares, threads, [&](long item) {
    const Share share(item % hidden_shares, hidden_tiles);
    const long e = pairs.busy[item / hidden_shares];
    blocks(kernel, share.first, share.last, pairs.start[e], pairs.start[e + 1], [&](long tile, long p, long count) {
      float g[MAX_ROWS * TILE], u[MAX_ROWS * TILE];
      const char* w_gate = experts + e * bytes + tile * format.tile_bytes(D);
      kernel.multiply(w_gate, padded, act + p * stride, stride, count, g);
      kernel.multiply(w_gate + up_at, padded, act + p * stride, stride, count, u);
      silu_times(g, u, count * TILE);
      for (long m = 0; m < count; ++m)
        std::memcpy(hidden + (p + m) * hidden_padded + tile * TILE, g + m * TILE, TILE * sizeof(float));
    });
  });

  const char* hidden_act = reinterpret_cast<const char*>(hidden);
  const long hidden_stride = format.row_bytes(F, kernel), hidden_tail = hidden_padded - hidden_tiles * TILE;
  char* converted = kernel.activate ? s.hidden_x.at_least(P * hidden_stride) : nullptr;
  s.pool.run(kernel.activate || hidden_tail ? P : 0, P < FEW ? 1 : threads, [&](long p) {
    float* row = hidden + p * hidden_padded;
    std::fill_n(row + hidden_tiles * TILE, hidden_tail, 0.0f);
    if (converted) kernel.activate(row, hidden_padded, converted + p * hidden_stride);
  });
  if (converted) hidden_act = converted;

  float* y = reinterpret_cast<float*>(s.y.at_least(P * D * sizeof(float)));
  const long out_tiles = round_up(D, TILE) / TILE, out_shares = Share::number(out_tiles);
  s.pool.run(num_busy * out_shares, threads, [&](long item) {
    const Share share(item % out_shares, out_tiles);
    const long e = pairs.busy[item / out_shares];
    blocks(kernel, share.first, share.last, pairs.start[e], pairs.start[e + 1], [&](long tile, long p, long count) {
      float sums[MAX_ROWS * TILE];
      const long first = tile * TILE;
      const char* w = experts + e * bytes + down_at + tile * format.tile_bytes(F);
      kernel.multiply(w, hidden_padded, hidden_act + p * hidden_stride, hidden_stride, count, sums);
      for (long m = 0; m < count; ++m)
        scale_row(sums + m * TILE, pairs.gate[p + m], std::min(TILE, D - first), y + (p + m) * D + first);
    });
  });

  // Each token's choices in their order.
  s.pool.run(T, T < FEW ? 1 : threads, [&](long t) {
    std::vector<float> sum(D, 0.0f);
    for (long k = 0; k < K; ++k) {
      const long at = pairs.slot[t * K + k];
      if (at >= 0) add_row(y + at * D, D, sum.data());
    }
    narrow_row(sum.data(), D, out + t * D);
  });
}

// Asks for huge pages for what lies wholly within: fewer misses of the address cache, a fifth more bandwidth.
EXPORT void outcrop_use_huge_pages(char* data, long bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t first = (uintptr_t(data) + PAGE - 1) / PAGE * PAGE, last = (uintptr_t(data) + bytes) / PAGE * PAGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Reads `bytes` with `threads` threads and adds them up: the memory's own speed, for benchmarks.
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
