// What both ways of attention (attention_single.cpp, attention_prompt.cpp) share.

#pragma once

#include "attention.h"

constexpr long PIECE = 64;  // keys whose scores are computed before their values are read

// One sequence's keys and values, from a key/value head on.
struct Keys {
  const Cache& cache;
  const int32_t* blocks;
  long block_size, head;

  long at(long token) const {
    const long slot = blocks[token / block_size] * block_size + token % block_size;
    return (slot * cache.G + head) * cache.C;
  }
  const bf16* key(long token) const { return cache.k + at(token); }
  const bf16* value(long token) const { return cache.v + at(token); }
};

AVX2 inline float sum_of(__m256 lanes) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

AVX2 inline float max_of(const float* row, long n) {
  __m256 lanes = _mm256_set1_ps(-INFINITY);
  long i = 0;
  for (; i + 8 <= n; i += 8) lanes = _mm256_max_ps(lanes, _mm256_loadu_ps(row + i));
  float eight[8], max = -INFINITY;
  _mm256_storeu_ps(eight, lanes);
  for (float lane : eight) max = std::max(max, lane);
  for (; i < n; ++i) max = std::max(max, row[i]);
  return max;
}

AVX2 inline float sum_of(const float* row, long n) {
  __m256 lanes = _mm256_setzero_ps();
  long i = 0;
  for (; i + 8 <= n; i += 8) lanes = _mm256_add_ps(lanes, _mm256_loadu_ps(row + i));
  float sum = sum_of(lanes);
  for (; i < n; ++i) sum += row[i];
  return sum;
}

// A query's softmax so far: sum of exp(score - max), and of that times value. (Milakov and Gimelshein, 2018)
struct Softmax {
  float max = -INFINITY, sum = 0.0f;

  // Scores of n more keys become weights; what was summed before, in `out` [C], shrinks to fit.
  AVX2 void add(float* scores, long n, float* out, long C) {
    const float higher = std::max(max, max_of(scores, n)), shrink = exp_(max - higher);
    for (long i = 0; i < n; ++i) scores[i] = exp_(scores[i] - higher);
    max = higher, sum = sum * shrink + sum_of(scores, n);
    for (long c = 0; c < C; ++c) out[c] *= shrink;
  }

  // The same as sum times sigmoid(log(sum) + max - sink), the reference's way.
  float sum_with(const bf16* sink) const { return sink ? sum + exp_(widen(*sink) - max) : sum; }
};

AVX2 inline void divide(float* row, long n, float by) {
  for (long i = 0; i < n; ++i) row[i] /= by;
}

// The queries of one token with `heads` key heads from keys.head on, R with each.
void attend_single(const Keys& keys, long heads, long context, long R, const Rule& rule, const float* q, float* out);

// The queries of successive tokens with one key head, R of each. The first token's sequence has `context` keys, each of
// the others one more. q and out begin at the first query; tokens are `q_stride` and `out_stride` apart.
void attend_prompt(const Kernel& kernel, const Keys& keys, long context, long tokens, long R, const Rule& rule,
                   const float* q, long q_stride, float* out, long out_stride);
