// bfloat16 weights. Sums are float32 in an order that depends on the matrix alone.

#include "tiles.h"

namespace {

// The even inputs of all rows, then the odd ones: so the sums of six rows and all else fit into 16 registers.
template <int M>
AVX2 inline void multiply_avx2_rows(const bf16* w, long pairs, const char* x, long stride, float* out) {
  const __m256i high = _mm256_set1_epi32(int(0xffff0000));
  __m256 a[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) a[m][0] = a[m][1] = _mm256_setzero_ps();
  for (long p = 0; p < pairs; ++p, w += 2 * TILE) {
    _mm_prefetch(reinterpret_cast<const char*>(w) + PREFETCH, _MM_HINT_NTA);
    const float* row = reinterpret_cast<const float*>(x) + 2 * p;
    const __m256i* both = reinterpret_cast<const __m256i*>(w);
    __m256 w0 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(both), 16));
    __m256 w1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(both + 1), 16));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m256 even = _mm256_broadcast_ss(row + m * stride / 4);
      a[m][0] = _mm256_fmadd_ps(w0, even, a[m][0]);
      a[m][1] = _mm256_fmadd_ps(w1, even, a[m][1]);
    }
    w0 = _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(both), high));
    w1 = _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(both + 1), high));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m256 odd = _mm256_broadcast_ss(row + m * stride / 4 + 1);
      a[m][0] = _mm256_fmadd_ps(w0, odd, a[m][0]);
      a[m][1] = _mm256_fmadd_ps(w1, odd, a[m][1]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    _mm256_storeu_ps(out + m * TILE, a[m][0]);
    _mm256_storeu_ps(out + m * TILE + 8, a[m][1]);
  }
}

AVX2 void multiply_avx2(const char* tile, long padded, const char* x, long stride, long rows, float* out) {
  const bf16* w = reinterpret_cast<const bf16*>(tile);
  switch (rows) {
    case 1: return multiply_avx2_rows<1>(w, padded / 2, x, stride, out);
    case 2: return multiply_avx2_rows<2>(w, padded / 2, x, stride, out);
    case 3: return multiply_avx2_rows<3>(w, padded / 2, x, stride, out);
    case 4: return multiply_avx2_rows<4>(w, padded / 2, x, stride, out);
    case 5: return multiply_avx2_rows<5>(w, padded / 2, x, stride, out);
    default: return multiply_avx2_rows<6>(w, padded / 2, x, stride, out);
  }
}

template <int M>
AVX512 inline void multiply_avx512_rows(const bf16* w, long pairs, const char* x, long stride, float* out) {
  __m512 a[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) a[m] = _mm512_setzero_ps();
  for (long p = 0; p < pairs; ++p, w += 2 * TILE) {
    _mm_prefetch(reinterpret_cast<const char*>(w) + PREFETCH, _MM_HINT_NTA);
    const __m512bh weights = (__m512bh)_mm512_loadu_si512(w);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, x + m * stride + 4 * p, 4);
      a[m] = _mm512_dpbf16_ps(a[m], weights, (__m512bh)_mm512_set1_epi32(pair));
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(out + m * TILE, a[m]);
}

// A copy for each number of rows: one pass over the weights, and as many sums at a time as there are rows. Each sum waits
// for its own last product, so seven rows as 4 + 2 + 1 take twice as long as seven.
AVX512 void multiply_avx512(const char* tile, long padded, const char* x, long stride, long rows, float* out) {
  static constexpr auto BY_ROWS = by_rows<16>([]<int M>() { return &multiply_avx512_rows<M>; });
  BY_ROWS[rows - 1](reinterpret_cast<const bf16*>(tile), padded / 2, x, stride, out);
}

AMX void multiply_amx(const char* w, long padded, const char* x, long stride, long rows, float* out) {
  amx_sums<false>(w, 2 * padded, x, stride, rows, out);
}

AVX2 void activate(const float* row, long padded, char* out) {
  narrow_row(row, padded, reinterpret_cast<bf16*>(out));
}

void pack_row(const bf16* row, long D, long padded, long place, char* tile) {
  char* pair = tile + place * 4;
  long d = 0;
  for (; d + 2 <= D; d += 2, pair += TILE * 4) std::memcpy(pair, row + d, 4);
  for (; d < padded; d += 2, pair += TILE * 4) {
    const bf16 both[] = {d < D ? row[d] : bf16(0), 0};
    std::memcpy(pair, both, 4);
  }
}

}  // namespace

const Format BFLOAT16 = {
    .item = 2,
    .pad = 32,
    .scales = 0,
    .pack_row = pack_row,
    .kernels = {{.item = 4, .max_rows = 6, .activate = nullptr, .multiply = multiply_avx2},
                {.item = 2, .max_rows = 16, .activate = activate, .multiply = multiply_avx512},
                {.item = 2, .max_rows = 32, .activate = activate, .multiply = multiply_amx, .leave = amx_leave}}};
