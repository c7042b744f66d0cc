// The attention of a prompt's tokens, which share keys and values: 64 keys at a time are packed as a matrix, and so are
// their values, and many queries are multiplied with them.

#include "attention_parts.h"

namespace {

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

// A prompt's queries that share a key head: row i is query i % R of token i / R. Keys pass by in pieces.
class Chunk {
 public:
  Chunk(const Kernel& kernel, const Keys& keys, long context, long tokens, long R, const Rule& rule)
      : kernel_(kernel), keys_(keys), rule_(rule), context_(context), R_(R), C_(keys.cache.C), rows_(tokens * R),
        stride_(BFLOAT16.row_bytes(C_, kernel)), channels_(round_up(C_, TILE)) {
    thread_local Scratch softmax, queries, keys_memory, values, scores, weights, sums;
    softmax_ = softmax.at_least<Softmax>(rows_);
    act_ = queries.at_least(rows_ * stride_);
    key_tiles_ = keys_memory.at_least(PIECE / TILE * BFLOAT16.tile_bytes(C_));
    value_tiles_ = values.at_least(channels_ / TILE * BFLOAT16.tile_bytes(PIECE));
    scores_ = scores.at_least<float>(rows_ * PIECE);
    weights_ = kernel.activate ? weights.at_least(rows_ * weight_bytes()) : reinterpret_cast<char*>(scores_);
    sums_ = sums.at_least<float>(rows_ * channels_);
    std::fill_n(softmax_, rows_, Softmax());
    std::fill_n(sums_, rows_ * channels_, 0.0f);
  }

  void attend(const float* q, long q_stride, float* out, long out_stride) {
    for (long i = 0; i < rows_; ++i)
      activation(BFLOAT16, kernel_, C_, act_ + i * stride_, [&](float* row) {
        for (long c = 0; c < C_; ++c) row[c] = q[i / R_ * q_stride + i % R_ * C_ + c] * rule_.scale;
      });
    const long last = context_ + rows_ / R_ - 1;
    // Pieces begin at the same keys wherever a prompt is cut.
    for (long first = rule_.first_of(context_) / PIECE * PIECE; first < last; first += PIECE) {
      const long n = std::min(PIECE, last - first);
      score(first, n);
      weigh(first, n);
      add(first, n);
    }
    for (long i = 0; i < rows_; ++i) {
      float* row = out + i / R_ * out_stride + i % R_ * C_;
      std::copy_n(sums_ + i * channels_, C_, row);
      divide(row, C_, softmax_[i].sum_with(rule_.sinks ? rule_.sinks + keys_.head * R_ + i % R_ : nullptr));
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
      const long context = context_ + i / R_, end = std::max(0L, std::min(n, context - first));
      const long begin = std::max(0L, std::min(end, rule_.first_of(context) - first));
      float* row = scores_ + i * PIECE;
      if (begin < end) softmax_[i].add(row + begin, end - begin, sums_ + i * channels_, C_);
      std::fill(row, row + begin, 0.0f);
      std::fill(row + end, row + PIECE, 0.0f);
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
  const Rule& rule_;
  const long context_, R_, C_, rows_, stride_, channels_;
  Softmax* softmax_;
  char *act_, *key_tiles_, *value_tiles_, *weights_;
  float *scores_, *sums_;
};

}  // namespace

void attend_prompt(const Kernel& kernel, const Keys& keys, long context, long tokens, long R, const Rule& rule,
                   const float* q, long q_stride, float* out, long out_stride) {
  Chunk(kernel, keys, context, tokens, R, rule).attend(q, q_stride, out, out_stride);
}
