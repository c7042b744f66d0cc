// All experts of a layer in one call. Letters: T tokens, D hidden, F expert hidden, E experts, K top-k, P (token, choice)
// pairs.

#include "products.h"

namespace {

AVX2 void silu_times(float* gate, const float* up, long n) {
  for (long i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + exp_(-gate[i])) * up[i];
}

AVX2 void scale_row(const float* row, float factor, long n, float* out) {
  for (long i = 0; i < n; ++i) out[i] = factor * row[i];
}

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

// out [T, D] = sum over each token's choices of gate * down(silu(gate_up(x)).
// rows [T, K]: which of the E experts, E or more for choices that are computed elsewhere.
// Each expert is packed as gate [F, D], up [F, D] and down [D, F], one behind the other.
EXPORT void outcrop_experts(int is_int8, int number, long threads, const bf16* x, long T, long D, long F,
                            const int64_t* rows, const bf16* gates, long K, long E, const char* experts, bf16* out) {
  const Format& format = is_int8 ? INT8 : BFLOAT16;
  const Kernel& kernel = format.kernels[number];
  State& s = state();
  std::lock_guard<std::mutex> guard(s.one_call);
  const Grouped pairs(rows, gates, T, K, E);
  const long up_at = format.matrix_bytes(F, D), down_at = 2 * up_at, bytes = down_at + format.matrix_bytes(D, F);
  const long P = pairs.num_pairs(), num_busy = long(pairs.busy.size());

  const long padded = format.padded(D), stride = format.row_bytes(D, kernel);
  const char* act = activations(format, kernel, s, s.x, P, D, threads,
                                [&](long p, float* row) { widen_row(x + pairs.token[p] * D, D, row); });

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
  for_rows(s, kernel.activate || hidden_tail ? P : 0, threads, [&](long p) {
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
    multiply_tiles(format, kernel, experts + e * bytes + down_at, F, share.first, share.last, hidden_act, pairs.start[e],
                   pairs.start[e + 1], [&](long p, long first, float* sums) {
                     scale_row(sums, pairs.gate[p], std::min(TILE, D - first), y + p * D + first);
                   });
  });

  // Each token's choices in their order.
  for_rows(s, T, threads, [&](long t) {
    std::vector<float> sum(D, 0.0f);
    for (long k = 0; k < K; ++k) {
      const long at = pairs.slot[t * K + k];
      if (at >= 0) add_row(y + at * D, D, sum.data());
    }
    narrow_row(sum.data(), D, out + t * D);
  });
}
