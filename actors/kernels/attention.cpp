// A sequence with one new token reads its keys and values once, as they lie: decode is bound by memory. The tokens of a
// prompt share them: 64 keys at a time are packed as a matrix, and so are their values, and many queries are multiplied with
// them. Either way, what is computed for a token depends on its sequence alone, not on where a prompt is cut (but that a piece
// of one token goes the first way).

#include "attention.h"

#include "products.h"

namespace {

constexpr long PIECE = 64;          // keys whose scores are computed before their values are read
constexpr long AHEAD = 4;           // keys fetched in advance
constexpr long TOGETHER = 128;      // tokens of a prompt that share packed keys
constexpr long ITEMS = 4;           // that each thread should find, so that all end at about the same time
constexpr long WORTH_IT = 1 << 18;  // products of numbers that are worth waking a thread for

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

AVX2 inline __m256 widen8(const bf16* p) {
  const __m128i narrow8 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow8), 16));
}

AVX2 inline float sum_of(__m256 lanes) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
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
};

AVX2 void divide(float* row, long n, float by) {
  for (long i = 0; i < n; ++i) row[i] /= by;
}

// The queries of one token with `heads` key heads, R with each.
AVX2 void attend_single(const float* q, const Keys& keys, long heads, long context, long R, float scale, float* out) {
  const long C = keys.cache.C, H = heads * R;
  std::vector<Softmax> softmax(H);
  std::vector<float> scaled(H * C);
  for (long i = 0; i < H * C; ++i) scaled[i] = q[i] * scale;
  std::fill_n(out, H * C, 0.0f);
  for (long first = 0; first < context; first += PIECE) {
    const long n = std::min(PIECE, context - first);
    const bf16 *key[PIECE], *value[PIECE];
    for (long i = 0; i < n; ++i) key[i] = keys.key(first + i), value[i] = keys.value(first + i);
    for (long h = 0; h < H; ++h) {
      const long at = h / R * C;
      float weights[PIECE], *sums = out + h * C;
      long i = 0;
      for (; i + 4 <= n; i += 4) {
        if (h == 0)
          for (long j = i; j < i + 4; ++j) prefetch(key[std::min(j + AHEAD, n - 1)], heads * C), prefetch(value[j], heads * C);
        dots<4>(scaled.data() + h * C, key + i, at, C, weights + i);
      }
      for (; i < n; ++i) dots<1>(scaled.data() + h * C, key + i, at, C, weights + i);
      softmax[h].add(weights, n, sums, C);
      long c = 0;
      for (; c + 64 <= C; c += 64) add_values<8>(value, weights, n, at + c, sums + c);
      for (; c < C; c += 8) add_values<1>(value, weights, n, at + c, sums + c);
    }
  }
  for (long h = 0; h < H; ++h) divide(out + h * C, C, softmax[h].sum);
}

// Values of tokens [first, first + n) as a packed matrix [C, PIECE]; zeros behind them.
AVX2 void pack_values(const Keys& keys, long first, long n, char* packed) {
  const long C = keys.cache.C, tile_bytes = BFLOAT16.tile_bytes(PIECE);
  static const bf16 nothing[TILE] = {};
  for (long i = 0; i < PIECE; i += 2) {
    const bf16 *even = i < n ? keys.value(first + i) : nullptr, *odd = i + 1 < n ? keys.value(first + i + 1) : nullptr;
    for (long c = 0; c < C; c += TILE) {
      const long width = std::min(TILE, C - c);
      const bf16 *a = even ? even + c : nothing, *b = odd ? odd + c : nothing;
      uint32_t* to = reinterpret_cast<uint32_t*>(packed + c / TILE * tile_bytes) + i / 2 * TILE;
      for (long j = 0; j < width; ++j) to[j] = uint32_t(a[j]) | uint32_t(b[j]) << 16;
    }
  }
}

// The queries of successive tokens that share a key head: row i is query i % R of token i / R. The first token sees
// `context` keys, each of the others one more. Keys pass by in pieces.
class Chunk {
 public:
  Chunk(const Kernel& kernel, const Keys& keys, long context, long tokens, long R)
      : kernel_(kernel), keys_(keys), context_(context), R_(R), C_(keys.cache.C), rows_(tokens * R),
        stride_(BFLOAT16.row_bytes(C_, kernel)), channels_(round_up(C_, TILE)), softmax_(rows_) {
    thread_local Scratch queries, keys_memory, values, scores, weights, sums;
    act_ = queries.at_least(rows_ * stride_);
    key_tiles_ = keys_memory.at_least(PIECE / TILE * BFLOAT16.tile_bytes(C_));
    value_tiles_ = values.at_least(channels_ / TILE * BFLOAT16.tile_bytes(PIECE));
    scores_ = reinterpret_cast<float*>(scores.at_least(rows_ * PIECE * sizeof(float)));
    weights_ = kernel.activate ? weights.at_least(rows_ * weight_bytes()) : reinterpret_cast<char*>(scores_);
    sums_ = reinterpret_cast<float*>(sums.at_least(rows_ * channels_ * sizeof(float)));
    std::fill_n(sums_, rows_ * channels_, 0.0f);
  }

  // q and out begin at the first query; tokens are `q_stride` and `out_stride` apart.
  void attend(const float* q, long q_stride, float scale, float* out, long out_stride) {
    for (long i = 0; i < rows_; ++i)
      activation(BFLOAT16, kernel_, C_, act_ + i * stride_, [&](float* row) {
        for (long c = 0; c < C_; ++c) row[c] = q[i / R_ * q_stride + i % R_ * C_ + c] * scale;
      });
    const long last = context_ + rows_ / R_ - 1;
    for (long first = 0; first < last; first += PIECE) {
      const long n = std::min(PIECE, last - first);
      score(first, n);
      weigh(first, n);
      add(first, n);
    }
    for (long i = 0; i < rows_; ++i) {
      float* row = out + i / R_ * out_stride + i % R_ * C_;
      std::copy_n(sums_ + i * channels_, C_, row);
      divide(row, C_, softmax_[i].sum);
    }
  }

 private:
  void score(long first, long n) {
    pack_rows(BFLOAT16, n, C_, key_tiles_, [&](long i) { return keys_.key(first + i); });
    multiply_tiles(BFLOAT16, kernel_, key_tiles_, C_, 0, round_up(n, TILE) / TILE, act_, 0, rows_,
                   [&](long i, long key, float* sums) { std::copy_n(sums, TILE, scores_ + i * PIECE + key); });
  }

  // Scores become weights; zero for what a query does not see.
  void weigh(long first, long n) {
    for (long i = 0; i < rows_; ++i) {
      const long seen = std::max(0L, std::min(n, context_ + i / R_ - first));
      float* row = scores_ + i * PIECE;
      if (seen) softmax_[i].add(row, seen, sums_ + i * channels_, C_);
      std::fill(row + seen, row + PIECE, 0.0f);
      if (kernel_.activate) kernel_.activate(row, PIECE, weights_ + i * weight_bytes());
    }
  }

  void add(long first, long n) {
    pack_values(keys_, first, n, value_tiles_);
    multiply_tiles(BFLOAT16, kernel_, value_tiles_, PIECE, 0, channels_ / TILE, weights_, 0, rows_,
                   [&](long i, long c, float* sums) { add_row(sums, TILE, sums_ + i * channels_ + c); });
  }

  long weight_bytes() const { return BFLOAT16.row_bytes(PIECE, kernel_); }

  const Kernel& kernel_;
  const Keys& keys_;
  const long context_, R_, C_, rows_, stride_, channels_;
  std::vector<Softmax> softmax_;
  char *act_, *key_tiles_, *value_tiles_, *weights_;
  float *scores_, *sums_;
};

// Tokens [first, first + count) of the step's rows, all of sequence s, and key heads from `head` on.
struct Item {
  long s, first, count, head, heads;
};

// A prompt's queries go head by head. A single token's keys are read once for as many heads as leave enough to do for all
// threads.
std::vector<Item> cut(const Batch& batch, long G, long threads) {
  const long heads = std::max(1L, G * batch.S / std::max(1L, threads * ITEMS));
  std::vector<Item> items;
  for (long s = 0; s < batch.S; ++s) {
    const long end = batch.starts[s + 1], each = end - batch.starts[s] == 1 ? std::min(heads, G) : 1;
    for (long first = batch.starts[s]; first < end; first += TOGETHER)
      for (long head = 0; head < G; head += each)
        items.push_back({s, first, std::min(TOGETHER, end - first), head, std::min(each, G - head)});
  }
  return items;
}

}  // namespace

void attention(const Kernel& kernel, State& s, long threads, const Batch& batch, const Cache& cache, long H, float scale,
               const float* q, long q_stride, float* out) {
  const long C = cache.C, R = H / cache.G;
  const std::vector<Item> items = cut(batch, cache.G, threads);
  long work = 0;
  for (const Item& item : items) work += item.count * item.heads * batch.contexts[item.s] * R * C;
  s.pool.run(long(items.size()), work < WORTH_IT ? 1 : threads, [&](long number) {
    const Item& item = items[number];
    const long last = batch.starts[item.s + 1] - 1, context = batch.contexts[item.s] - (last - item.first);
    const Keys keys{cache, batch.blocks + item.s * batch.B, batch.block_size, item.head};
    const float* here = q + item.first * q_stride + item.head * R * C;
    float* to = out + (item.first * H + item.head * R) * C;
    if (batch.starts[item.s] == last) attend_single(here, keys, item.heads, context, R, scale, to);
    else Chunk(kernel, keys, context, item.count, R).attend(here, q_stride, scale, to, H * C);
  });
}

// As attention(), by itself: k, v [slots, G, C], q and out [T, H, C].
EXPORT void outcrop_attention(int number, long threads, const Batch* batch, const bf16* k, const bf16* v, long G, long C,
                              long H, float scale, const float* q, float* out) {
  State& s = state();
  std::lock_guard<std::mutex> guard(s.one_call);
  attention(BFLOAT16.kernels[number], s, threads, *batch, {k, v, G, C}, H, scale, q, H * C, out);
}
