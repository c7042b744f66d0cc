// int8 weights, symmetric, with a scale per output; activations are quantised the same way, with a scale per row. Sums
// of products are exact integers (inputs are at most 2^31 / 127^2 = 133,000).

#include "tiles.h"

namespace {

constexpr float LARGEST = 127.0f;
constexpr float TINY = 1e-35f;  // rows of smaller numbers are zeros: 127 / TINY is still a number

// The scale of a row: NaN if anything in it is not finite, so that no corrupt number is hidden.
AVX2 float scale_of(const float* row, long n) {
  uint32_t largest = 0;  // as bits, which are ordered as absolute values are, NaN and infinity last
  for (long i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, row + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float value;
  std::memcpy(&value, &largest, 4);
  return largest >= 0x7f800000 ? NAN : value < TINY ? 0.0f : value / LARGEST;
}

AVX2 inline int32_t quantised(float value, float inverse) { return int32_t(std::nearbyintf(value * inverse)); }
inline float inverse_of(float scale) { return scale > 0 ? 1.0f / scale : 0.0f; }

// A row with NaN or infinity has scale NaN and inverse 0: its integers don't matter, but must not overflow.
AVX2 void activate_int16(const float* row, long padded, char* out) {
  const float scale = scale_of(row, padded), inverse = inverse_of(scale);
  int16_t* to = reinterpret_cast<int16_t*>(out);
  if (inverse == 0.0f)
    std::memset(to, 0, 2 * padded);
  else
    for (long d = 0; d < padded; d += 4) {  // (0, 2) and (1, 3): as the weights are taken apart
      to[d] = int16_t(quantised(row[d], inverse)), to[d + 1] = int16_t(quantised(row[d + 2], inverse));
      to[d + 2] = int16_t(quantised(row[d + 1], inverse)), to[d + 3] = int16_t(quantised(row[d + 3], inverse));
    }
  std::memcpy(to + padded, &scale, 4);
}

AVX2 void activate_int8(const float* row, long padded, char* out) {
  const float scale = scale_of(row, padded), inverse = inverse_of(scale);
  for (long d = 0; d < padded; ++d) out[d] = inverse == 0.0f ? 0 : int8_t(quantised(row[d], inverse));
  std::memcpy(out + padded, &scale, 4);
}

AVX2 void activate_uint8(const float* row, long padded, char* out) {
  activate_int8(row, padded, out);
  for (long d = 0; d < padded; ++d) out[d] = char(out[d] ^ 0x80);
}

inline float row_scale(const char* row, long bytes) {
  float scale;
  std::memcpy(&scale, row + bytes, 4);
  return scale;
}

// 32 bits at `p` eight times, while they are loaded.
AVX2 inline __m256i spread(const char* p) {
  return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(p)));
}

// Bytes 0..3 of a group become the int16 pairs (0, 2) and (1, 3), by shifts alone.
template <int M>
AVX2 inline void multiply_avx2_rows(const char* w, long padded, const char* x, long stride, float* out) {
  __m256i a[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) a[m][0] = a[m][1] = _mm256_setzero_si256();
  for (long bytes = 0; bytes < 2 * padded; bytes += 8, w += 4 * TILE) {
    _mm_prefetch(w + PREFETCH, _MM_HINT_NTA);
    const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 2 * TILE));
    const __m256i even0 = _mm256_srai_epi16(_mm256_slli_epi16(w0, 8), 8);
    const __m256i even1 = _mm256_srai_epi16(_mm256_slli_epi16(w1, 8), 8);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m256i pair = spread(x + m * stride + bytes);
      a[m][0] = _mm256_add_epi32(a[m][0], _mm256_madd_epi16(even0, pair));
      a[m][1] = _mm256_add_epi32(a[m][1], _mm256_madd_epi16(even1, pair));
    }
    const __m256i odd0 = _mm256_srai_epi16(w0, 8), odd1 = _mm256_srai_epi16(w1, 8);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m256i pair = spread(x + m * stride + bytes + 4);
      a[m][0] = _mm256_add_epi32(a[m][0], _mm256_madd_epi16(odd0, pair));
      a[m][1] = _mm256_add_epi32(a[m][1], _mm256_madd_epi16(odd1, pair));
    }
  }
  const float* scales = reinterpret_cast<const float*>(w);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const __m256 scale = _mm256_set1_ps(row_scale(x + m * stride, 2 * padded));
    for (int half = 0; half < 2; ++half)
      _mm256_storeu_ps(out + m * TILE + 8 * half, _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(a[m][half]), scale),
                                                                _mm256_loadu_ps(scales + 8 * half)));
  }
}

AVX2 void multiply_avx2(const char* tile, long padded, const char* x, long stride, long rows, float* out) {
  switch (rows) {
    case 1: return multiply_avx2_rows<1>(tile, padded, x, stride, out);
    case 2: return multiply_avx2_rows<2>(tile, padded, x, stride, out);
    case 3: return multiply_avx2_rows<3>(tile, padded, x, stride, out);
    default: return multiply_avx2_rows<4>(tile, padded, x, stride, out);
  }
}

// VNNI multiplies unsigned bytes by signed ones: activations are 128 more than they are, and 128 times the sum of the
// weights is taken off in the end. Sums are modulo 2^32 on the way, and right in the end.
template <int M>
AVX512 inline void multiply_avx512_rows(const char* w, long padded, const char* x, long stride, float* out) {
  const __m512i offset = _mm512_set1_epi32(int32_t(0x80808080));
  __m512i a[M], too_much = _mm512_setzero_si512();
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) a[m] = _mm512_setzero_si512();
  for (long d = 0; d < padded; d += 4, w += 4 * TILE) {
    _mm_prefetch(w + PREFETCH, _MM_HINT_NTA);
    const __m512i weights = _mm512_loadu_si512(w);
    too_much = _mm512_dpbusd_epi32(too_much, offset, weights);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t four;
      std::memcpy(&four, x + m * stride + d, 4);
      a[m] = _mm512_dpbusd_epi32(a[m], _mm512_set1_epi32(four), weights);
    }
  }
  const __m512 scales = _mm512_loadu_ps(w);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const __m512 scale = _mm512_set1_ps(row_scale(x + m * stride, padded));
    const __m512 sums = _mm512_cvtepi32_ps(_mm512_sub_epi32(a[m], too_much));
    _mm512_storeu_ps(out + m * TILE, _mm512_mul_ps(_mm512_mul_ps(sums, scale), scales));
  }
}

AVX512 void multiply_avx512(const char* tile, long padded, const char* x, long stride, long rows, float* out) {
  static constexpr auto BY_ROWS = by_rows<16>([]<int M>() { return &multiply_avx512_rows<M>; });
  BY_ROWS[rows - 1](tile, padded, x, stride, out);
}

AMX void multiply_amx(const char* w, long padded, const char* x, long stride, long rows, float* out) {
  int32_t sums[MAX_ROWS * TILE];
  amx_sums<true>(w, padded, x, stride, rows, sums);
  const float* scales = reinterpret_cast<const float*>(w + TILE * padded);
  for (long m = 0; m < rows; ++m) {
    const float scale = row_scale(x + m * stride, padded);
    for (long o = 0; o < TILE; ++o) out[m * TILE + o] = float(sums[m * TILE + o]) * scale * scales[o];
  }
}

void pack_row(const bf16* row, long D, long padded, long place, char* tile) {
  float* wide = row_of(padded);
  widen_row(row, D, wide);
  std::fill(wide + D, wide + padded, 0.0f);
  const float scale = scale_of(wide, D), inverse = inverse_of(scale);
  for (long d = 0; d < padded; ++d)
    tile[d / 4 * 4 * TILE + place * 4 + d % 4] = inverse == 0.0f ? 0 : int8_t(quantised(wide[d], inverse));
  std::memcpy(tile + TILE * padded + 4 * place, &scale, 4);
}

}  // namespace

const Format INT8 = {
    .item = 1,
    .pad = 64,
    .scales = 64,
    .pack_row = pack_row,
    .kernels = {{.item = 2, .max_rows = 4, .activate = activate_int16, .multiply = multiply_avx2},
                {.item = 1, .max_rows = 16, .activate = activate_uint8, .multiply = multiply_avx512},
                {.item = 1, .max_rows = 32, .activate = activate_int8, .multiply = multiply_amx, .leave = amx_leave}}};
