// Attention of sequences with one new token each, over the paged cache where it lies.
//
// Keys and values are [slots, G, C]; slot blocks[s][n / block_size] * block_size + n % block_size holds token n of
// sequence s. Everything between reading bfloat16 and rounding the result is float32, in an order that depends on the
// sequence alone. Only slots of tokens that were written are read.
//
// Letters: S sequences, H query heads, G key/value heads, R = H / G, C head dimension (a multiple of 8), B blocks.

#include "common.h"

namespace {

constexpr long PIECE = 64;  // keys whose scores are computed before their values are read
constexpr long AHEAD = 8;   // keys fetched in advance

AVX2 inline __m256 widen8(const bf16* p) {
  const __m128i narrow8 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow8), 16));
}

AVX2 inline float dot(const float* q, const bf16* k, long C) {
  __m256 sum = _mm256_setzero_ps();
  for (long c = 0; c < C; c += 8) sum = _mm256_fmadd_ps(_mm256_loadu_ps(q + c), widen8(k + c), sum);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// out[c .. c + 8 N) += the weighted sum of those columns of n values.
template <int N>
AVX2 inline void add_values(const bf16* const* values, const float* weights, long n, long c, float* out) {
  __m256 sum[N];
  for (int j = 0; j < N; ++j) sum[j] = _mm256_loadu_ps(out + c + 8 * j);
  for (long i = 0; i < n; ++i) {
    const __m256 weight = _mm256_broadcast_ss(weights + i);
    for (int j = 0; j < N; ++j) sum[j] = _mm256_fmadd_ps(widen8(values[i] + c + 8 * j), weight, sum[j]);
  }
  for (int j = 0; j < N; ++j) _mm256_storeu_ps(out + c + 8 * j, sum[j]);
}

inline void prefetch(const bf16* p, long C) {
  for (long c = 0; c < C; c += 32) _mm_prefetch(reinterpret_cast<const char*>(p + c), _MM_HINT_T0);
}

// A query head's softmax so far: sum of exp(score - max), and of that times value. (Milakov and Gimelshein, 2018)
struct Head {
  float max = -INFINITY, sum = 0.0f;
  std::vector<float> q, out;

  AVX2 void add(const float* scores, const bf16* const* values, long n, long C) {
    float higher = max;
    for (long i = 0; i < n; ++i) higher = std::max(higher, scores[i]);
    const float shrink = exp_(max - higher);
    float weights[PIECE];
    for (long i = 0; i < n; ++i) weights[i] = exp_(scores[i] - higher);
    max = higher, sum *= shrink;
    for (long i = 0; i < n; ++i) sum += weights[i];
    for (long c = 0; c < C; ++c) out[c] *= shrink;
    long c = 0;
    for (; c + 32 <= C; c += 32) add_values<4>(values, weights, n, c, out.data());
    for (; c < C; c += 8) add_values<1>(values, weights, n, c, out.data());
  }
};

// The R heads that share a key head of one sequence. `k` and `v` begin at that head's slot 0, `step` values per slot.
AVX2 void attend(const bf16* q, const bf16* k, const bf16* v, long step, const int32_t* blocks, long block_size,
                 long context, long R, long C, float scale, bf16* out) {
  std::vector<Head> heads(R);
  for (long r = 0; r < R; ++r) {
    heads[r].q.resize(C), heads[r].out.resize(C);
    for (long c = 0; c < C; ++c) heads[r].q[c] = widen(q[r * C + c]) * scale;
  }
  std::vector<float> scores(R * PIECE);
  for (long first = 0; first < context; first += PIECE) {
    const long n = std::min(PIECE, context - first);
    const bf16 *keys[PIECE], *values[PIECE];
    for (long i = 0; i < n; ++i) {
      const long token = first + i, slot = blocks[token / block_size] * block_size + token % block_size;
      keys[i] = k + slot * step, values[i] = v + slot * step;
    }
    for (long i = 0; i < n; ++i) {
      prefetch(keys[std::min(i + AHEAD, n - 1)], C), prefetch(values[i], C);
      for (long r = 0; r < R; ++r) scores[r * PIECE + i] = dot(heads[r].q.data(), keys[i], C);
    }
    for (long r = 0; r < R; ++r) heads[r].add(scores.data() + r * PIECE, values, n, C);
  }
  for (long r = 0; r < R; ++r)
    for (long c = 0; c < C; ++c) out[r * C + c] = narrow(heads[r].out[c] / heads[r].sum);
}

}  // namespace

// out [S, H, C] = softmax(scale * q k) v over each sequence's first contexts[s] > 0 tokens. q [S, H, C], rows q_stride
// apart; blocks [S, B].
EXPORT void outcrop_attention(long threads, const bf16* q, long q_stride, const int64_t* contexts, long S,
                              const int32_t* blocks, long B, long block_size, const bf16* k, const bf16* v, long H,
                              long G, long C, float scale, bf16* out) {
  State& s = state();
  std::lock_guard<std::mutex> guard(s.one_call);
  const long R = H / G;
  s.pool.run(S * G, threads, [&](long item) {
    const long row = item / G, g = item % G;
    attend(q + row * q_stride + g * R * C, k + g * C, v + g * C, G * C, blocks + row * B, block_size, contexts[row], R,
           C, scale, out + (row * H + g * R) * C);
  });
}
