// Products with bfloat16 matrices at memory speed, behind a C ABI that knows nothing of torch or Python.
//
// A matrix W [O, D] is packed once into tiles of 16 outputs: tile t holds, for each pair of inputs (2p, 2p + 1), the 16
// outputs' two values side by side: packed[t][p][o][2]. Tiles stream contiguously, and the same bytes are what AVX2
// (widen by shifts), AVX512-BF16 (one dot product per 64 bytes) and AMX (16 pairs are an operand tile) want.
// Outputs are padded to 16, inputs to 32.
//
// Sums are float32 in an order that depends on the matrix alone: what is computed for a token does not depend on the
// tokens beside it, nor on the number of threads.
//
// Letters: T tokens, D inputs, O outputs, F expert hidden, E experts, K top-k, P (token, choice) pairs.

#include "common.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16")))

namespace {

constexpr long TILE = 16;      // outputs of a tile
constexpr long PAD = 32;       // inputs are padded to a multiple of it
constexpr long PREFETCH = 1024;  // bytes ahead of what is read

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

// ---------------------------------------------------------------------------------------------------------------------
// One tile of 16 outputs for `rows` rows of activations: out[row][16] = sum over inputs, float32.
// `x` are activations as the instruction set wants them, `stride` bytes apart; `pairs` input pairs, a multiple of 16.

using TileFn = void (*)(const bf16* w, long pairs, const char* x, long stride, long rows, float* out);

struct Isa {
  const char* name;
  long item;      // bytes of an activation: 4 (float32) or 2 (bfloat16)
  long max_rows;  // rows of one call of `tile`
  TileFn tile;
};

template <int M>
AVX2 inline void tile_avx2_rows(const bf16* w, long pairs, const char* x, long stride, float* out) {
  const __m256i high = _mm256_set1_epi32(int(0xffff0000));
  __m256 a[M][2];
  for (int m = 0; m < M; ++m) a[m][0] = a[m][1] = _mm256_setzero_ps();
  for (long p = 0; p < pairs; ++p, w += 2 * TILE) {
    _mm_prefetch(reinterpret_cast<const char*>(w) + PREFETCH, _MM_HINT_T0);
    const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + TILE));
    const __m256 even0 = _mm256_castsi256_ps(_mm256_slli_epi32(w0, 16));
    const __m256 even1 = _mm256_castsi256_ps(_mm256_slli_epi32(w1, 16));
    const __m256 odd0 = _mm256_castsi256_ps(_mm256_and_si256(w0, high));
    const __m256 odd1 = _mm256_castsi256_ps(_mm256_and_si256(w1, high));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const float* row = reinterpret_cast<const float*>(x + m * stride) + 2 * p;
      const __m256 xe = _mm256_broadcast_ss(row), xo = _mm256_broadcast_ss(row + 1);
      a[m][0] = _mm256_fmadd_ps(even0, xe, a[m][0]);
      a[m][1] = _mm256_fmadd_ps(even1, xe, a[m][1]);
      a[m][0] = _mm256_fmadd_ps(odd0, xo, a[m][0]);
      a[m][1] = _mm256_fmadd_ps(odd1, xo, a[m][1]);
    }
  }
  for (int m = 0; m < M; ++m) {
    _mm256_storeu_ps(out + m * TILE, a[m][0]);
    _mm256_storeu_ps(out + m * TILE + 8, a[m][1]);
  }
}

AVX2 void tile_avx2(const bf16* w, long pairs, const char* x, long stride, long rows, float* out) {
  switch (rows) {
    case 1: return tile_avx2_rows<1>(w, pairs, x, stride, out);
    case 2: return tile_avx2_rows<2>(w, pairs, x, stride, out);
    case 3: return tile_avx2_rows<3>(w, pairs, x, stride, out);
    default: return tile_avx2_rows<4>(w, pairs, x, stride, out);
  }
}

template <int M>
AVX512 inline void tile_avx512_rows(const bf16* w, long pairs, const char* x, long stride, float* out) {
  __m512 a[M];
  for (int m = 0; m < M; ++m) a[m] = _mm512_setzero_ps();
  for (long p = 0; p < pairs; ++p, w += 2 * TILE) {
    _mm_prefetch(reinterpret_cast<const char*>(w) + PREFETCH, _MM_HINT_T0);
    const __m512bh weights = (__m512bh)_mm512_loadu_si512(w);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, x + m * stride + 4 * p, 4);
      a[m] = _mm512_dpbf16_ps(a[m], weights, (__m512bh)_mm512_set1_epi32(pair));
    }
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(out + m * TILE, a[m]);
}

AVX512 void tile_avx512(const bf16* w, long pairs, const char* x, long stride, long rows, float* out) {
  while (rows > 0) {
    const long some = rows >= 16 ? 16 : rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
    switch (some) {
      case 16: tile_avx512_rows<16>(w, pairs, x, stride, out); break;
      case 8: tile_avx512_rows<8>(w, pairs, x, stride, out); break;
      case 4: tile_avx512_rows<4>(w, pairs, x, stride, out); break;
      case 2: tile_avx512_rows<2>(w, pairs, x, stride, out); break;
      default: tile_avx512_rows<1>(w, pairs, x, stride, out);
    }
    rows -= some, x += some * stride, out += some * TILE;
  }
}

struct alignas(64) TileConfig {  // as LDTILECFG reads it: palette 1
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Up to 32 rows: two tiles of sums share each tile of weights. The tail of a block is padded by the caller's buffer:
// rows beyond the last are read (and must be readable) only up to the configured number.
AMX void tile_amx(const bf16* w, long pairs, const char* x, long stride, long rows, float* out) {
  const long first = rows < 16 ? rows : 16, second = rows - first;
  TileConfig config;
  const uint8_t heights[] = {uint8_t(first), uint8_t(second ? second : 1), uint8_t(first), uint8_t(second ? second : 1), 16};
  for (int i = 0; i < 5; ++i) config.rows[i] = heights[i], config.bytes[i] = 64;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  for (long p = 0; p < pairs; p += 16, w += 32 * TILE) {
    for (int line = 0; line < 16; ++line)
      _mm_prefetch(reinterpret_cast<const char*>(w) + 4 * PREFETCH + 64 * line, _MM_HINT_T0);
    _tile_loadd(4, w, 64);
    _tile_loadd(2, x + 4 * p, stride);
    _tile_dpbf16ps(0, 2, 4);
    if (second) {
      _tile_loadd(3, x + 16 * stride + 4 * p, stride);
      _tile_dpbf16ps(1, 3, 4);
    }
  }
  _tile_stored(0, out, 64);
  if (second) _tile_stored(1, out + 16 * TILE, 64);
  _tile_release();
}

const Isa ISAS[] = {
    {"avx2", 4, 4, tile_avx2},
    {"avx512_bf16", 2, 16, tile_avx512},
    {"amx_bf16", 2, 32, tile_amx},
};
constexpr int NUM_ISAS = 3;

bool may_use_amx() {  // Linux hands out the tile registers on request
#if defined(__linux__)
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return granted;
#else
  return false;
#endif
}

// What is not a product. Every instruction set above has AVX2, so these loops may use it.

AVX2 void silu_times(float* gate, const float* up, long n) {
  for (long i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + exp_(-gate[i])) * up[i];
}

AVX2 void widen_row(const bf16* row, long n, float* out) {
  for (long i = 0; i < n; ++i) out[i] = widen(row[i]);
}

AVX2 void narrow_row(const float* row, long n, bf16* out) {
  for (long i = 0; i < n; ++i) out[i] = narrow(row[i]);
}

AVX2 void scale_row(const float* row, float factor, long n, float* out) {
  for (long i = 0; i < n; ++i) out[i] = factor * row[i];
}

AVX2 void add_row(const float* row, long n, float* out) {
  for (long i = 0; i < n; ++i) out[i] += row[i];
}

// A row of D bfloat16 values as activations, padded with zeros.
void activate(const Isa& isa, const bf16* row, long D, long padded, char* out) {
  if (isa.item == 2) {
    std::memcpy(out, row, 2 * D);
    std::memset(out + 2 * D, 0, 2 * (padded - D));
    return;
  }
  float* wide = reinterpret_cast<float*>(out);
  widen_row(row, D, wide);
  std::memset(wide + D, 0, 4 * (padded - D));
}

constexpr long MAX_ROWS = 32;

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------

// Name of instruction set `number`, or null where there is none.
EXPORT const char* outcrop_isa_name(int number) { return number < NUM_ISAS ? ISAS[number].name : nullptr; }

// Whether this CPU, and the operating system, can use it.
EXPORT int outcrop_isa_works(int number) {
  __builtin_cpu_init();
  switch (number) {
    case 0: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case 1: return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
    case 2: return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") && may_use_amx();
    default: return 0;
  }
}

// Bytes of a packed matrix [O, D].
EXPORT long outcrop_packed_bytes(long O, long D) { return 2 * round_up(O, TILE) * round_up(D, PAD); }

EXPORT void outcrop_pack(const bf16* w, long O, long D, bf16* packed) {
  const long pairs = round_up(D, PAD) / 2;
  for (long o = 0; o < round_up(O, TILE); ++o) {
    bf16* column = packed + o / TILE * pairs * 2 * TILE + o % TILE * 2;
    for (long d = 0; d < 2 * pairs; ++d) column[d / 2 * 2 * TILE + d % 2] = o < O && d < D ? w[o * D + d] : 0;
  }
}

// y [T, O] = x [T, D] W^T + bias; bias may be null.
EXPORT void outcrop_linear(int number, long threads, const bf16* x, long T, long D, const bf16* packed, long O,
                           const bf16* bias, bf16* y) {
  const Isa& isa = ISAS[number];
  State& s = state();
  std::lock_guard<std::mutex> guard(s.one_call);
  const long padded = round_up(D, PAD), stride = padded * isa.item, pairs = padded / 2;
  char* act = s.x.at_least(T * stride);
  s.pool.run(T, T < 32 ? 1 : threads, [&](long t) { activate(isa, x + t * D, D, padded, act + t * stride); });
  s.pool.run(round_up(O, TILE) / TILE, threads, [&](long tile) {
    float sums[MAX_ROWS * TILE];
    const long first = tile * TILE, width = std::min(TILE, O - first);
    float wide_bias[TILE];
    if (bias) widen_row(bias + first, width, wide_bias);
    for (long t = 0; t < T; t += isa.max_rows) {
      const long rows = std::min(isa.max_rows, T - t);
      isa.tile(packed + tile * pairs * 2 * TILE, pairs, act + t * stride, stride, rows, sums);
      for (long m = 0; m < rows; ++m) {
        if (bias) add_row(wide_bias, width, sums + m * TILE);
        narrow_row(sums + m * TILE, width, y + (t + m) * O + first);
      }
    }
  });
}

// out [T, D] = sum over each token's choices of gate * down(silu(gate_up(x)).
// rows [T, K]: which of the E experts, E or more for choices that are computed elsewhere.
// gate_up[e]: packed [2F, D], gate rows first; down[e]: packed [D, F].
EXPORT void outcrop_experts(int number, long threads, const bf16* x, long T, long D, long F, const int64_t* rows,
                            const bf16* gates, long K, long E, const bf16* const* gate_up, const bf16* const* down,
                            bf16* out) {
  const Isa& isa = ISAS[number];
  State& s = state();
  std::lock_guard<std::mutex> guard(s.one_call);

  // Pairs sorted by expert; slot[pair] is where its result lies.
  std::vector<long> start(E + 1, 0), slot(T * K, -1);
  for (long p = 0; p < T * K; ++p)
    if (rows[p] < E) ++start[rows[p] + 1];
  for (long e = 0; e < E; ++e) start[e + 1] += start[e];
  const long P = start[E];
  std::vector<long> next(start.begin(), start.end() - 1), token(P);
  std::vector<float> gate(P);
  for (long p = 0; p < T * K; ++p)
    if (rows[p] < E) {
      const long at = slot[p] = next[rows[p]]++;
      token[at] = p / K, gate[at] = widen(gates[p]);
    }

  const long padded = round_up(D, PAD), stride = padded * isa.item, pairs = padded / 2;
  const long hidden_padded = round_up(F, PAD), hidden_stride = hidden_padded * isa.item, hidden_pairs = hidden_padded / 2;
  char* act = s.x.at_least(P * stride);
  char* hidden = s.hidden.at_least(P * hidden_stride);
  float* y = reinterpret_cast<float*>(s.y.at_least(P * D * sizeof(float)));

  s.pool.run(P, P < 32 ? 1 : threads, [&](long p) { activate(isa, x + token[p] * D, D, padded, act + p * stride); });

  std::vector<long> busy;  // experts that have tokens
  for (long e = 0; e < E; ++e)
    if (start[e + 1] > start[e]) busy.push_back(e);

  // gate and up of 16 hidden units together, so that silu needs no second pass. F may be no multiple of 16: then a tile
  // of `up` begins within a tile of gate rows, which is why gate_up is packed as two matrices, one behind the other.
  const long hidden_tiles = hidden_padded / TILE;
  const bf16* const* gu = gate_up;
  s.pool.run(long(busy.size()) * hidden_tiles, threads, [&](long item) {
    float g[MAX_ROWS * TILE], u[MAX_ROWS * TILE];
    const long e = busy[item / hidden_tiles], tile = item % hidden_tiles, first = tile * TILE;
    const bool is_padding = first >= F;
    const bf16* w_gate = gu[e] + tile * pairs * 2 * TILE;
    const bf16* w_up = w_gate + round_up(F, TILE) * padded;
    for (long p = start[e]; p < start[e + 1]; p += isa.max_rows) {
      const long count = std::min(isa.max_rows, start[e + 1] - p);
      if (!is_padding) {
        isa.tile(w_gate, pairs, act + p * stride, stride, count, g);
        isa.tile(w_up, pairs, act + p * stride, stride, count, u);
        silu_times(g, u, count * TILE);
      }
      const long width = std::max(0L, std::min(TILE, F - first));
      for (long m = 0; m < count; ++m) {
        float* row = g + m * TILE;
        std::fill(row + width, row + TILE, 0.0f);
        char* place = hidden + (p + m) * hidden_stride + first * isa.item;
        if (isa.item == 4)
          std::memcpy(place, row, 4 * TILE);
        else
          narrow_row(row, TILE, reinterpret_cast<bf16*>(place));
      }
    }
  });

  const long out_tiles = round_up(D, TILE) / TILE;
  s.pool.run(long(busy.size()) * out_tiles, threads, [&](long item) {
    float sums[MAX_ROWS * TILE];
    const long e = busy[item / out_tiles], tile = item % out_tiles, first = tile * TILE, width = std::min(TILE, D - first);
    const bf16* w = down[e] + tile * hidden_pairs * 2 * TILE;
    for (long p = start[e]; p < start[e + 1]; p += isa.max_rows) {
      const long count = std::min(isa.max_rows, start[e + 1] - p);
      isa.tile(w, hidden_pairs, hidden + p * hidden_stride, hidden_stride, count, sums);
      for (long m = 0; m < count; ++m) scale_row(sums + m * TILE, gate[p + m], width, y + (p + m) * D + first);
    }
  });

  // Each token's choices in their order.
  s.pool.run(T, T < 32 ? 1 : threads, [&](long t) {
    std::vector<float> sum(D, 0.0f);
    for (long k = 0; k < K; ++k) {
      const long at = slot[t * K + k];
      if (at >= 0) add_row(y + at * D, D, sum.data());
    }
    narrow_row(sum.data(), D, out + t * D);
  });
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
