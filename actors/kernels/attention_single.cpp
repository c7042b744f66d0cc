// One new token's attention: its keys and values are read once, as they lie, for decode is bound by memory.

#include "attention_parts.h"

namespace {

constexpr long AHEAD = 4;  // keys fetched in advance

AVX2 inline __m256 widen8(const bf16* p) {
  const __m128i narrow8 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow8), 16));
}

// scores[i] = q . keys[i], read from value `at` on, for N keys.
template <int N>
AVX2 inline void dots(const float* q, const bf16* const* keys, long at, long C, float* scores) {
  __m256 sum[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) sum[i] = _mm256_setzero_ps();
  for (long c = 0; c < C; c += 8) {
    const __m256 eight = _mm256_loadu_ps(q + c);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sum[i] = _mm256_fmadd_ps(eight, widen8(keys[i] + at + c), sum[i]);
  }
  for (int i = 0; i < N; ++i) scores[i] = sum_of(sum[i]);
}

// out[0 .. 8 N) += the weighted sum of n values, read from value `at` on.
template <int N>
AVX2 inline void add_values(const bf16* const* values, const float* weights, long n, long at, float* out) {
  __m256 sum[N];
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) sum[j] = _mm256_loadu_ps(out + 8 * j);
  for (long i = 0; i < n; ++i) {
    const __m256 weight = _mm256_broadcast_ss(weights + i);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[j] = _mm256_fmadd_ps(widen8(values[i] + at + 8 * j), weight, sum[j]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) _mm256_storeu_ps(out + 8 * j, sum[j]);
}

inline void prefetch(const bf16* p, long n) {
  for (long i = 0; i < n; i += 32) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T0);
}

}  // namespace

AVX2 void attend_single(const Keys& keys, long heads, long context, long R, const Rule& rule, const float* q,
                        float* out) {
  const long C = keys.cache.C, H = heads * R;
  thread_local Scratch softmax_memory;
  Softmax* softmax = softmax_memory.at_least<Softmax>(H);
  float* scaled = row_of(H * C);
  std::fill_n(softmax, H, Softmax());
  for (long i = 0; i < H * C; ++i) scaled[i] = q[i] * rule.scale;
  std::fill_n(out, H * C, 0.0f);
  for (long first = rule.first_of(context); first < context; first += PIECE) {
    const long n = std::min(PIECE, context - first);
    const bf16 *key[PIECE], *value[PIECE];
    for (long i = 0; i < n; ++i) key[i] = keys.key(first + i), value[i] = keys.value(first + i);
    for (long h = 0; h < H; ++h) {
      const long at = h / R * C;
      float weights[PIECE], *sums = out + h * C;
      long i = 0;
      for (; i + 4 <= n; i += 4) {
        if (h == 0)
          for (long j = i; j < i + 4; ++j) {
            prefetch(key[std::min(j + AHEAD, n - 1)], heads * C);
            prefetch(value[j], heads * C);
          }
        dots<4>(scaled + h * C, key + i, at, C, weights + i);
      }
      for (; i < n; ++i) dots<1>(scaled + h * C, key + i, at, C, weights + i);
      softmax[h].add(weights, n, sums, C);
      long c = 0;
      for (; c + 64 <= C; c += 64) add_values<8>(value, weights, n, at + c, sums + c);
      for (; c < C; c += 8) add_values<1>(value, weights, n, at + c, sums + c);
    }
  }
  const bf16* sinks = rule.sinks ? rule.sinks + keys.head * R : nullptr;
  for (long h = 0; h < H; ++h) divide(out + h * C, C, softmax[h].sum_with(sinks ? sinks + h : nullptr));
}
