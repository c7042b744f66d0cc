// All experts of a layer in one call, in four stages: choices are grouped by expert, gate and up are computed, then
// down, then what each token's experts yield is added up.
//
// Letters: T tokens, D hidden, F expert hidden, E experts, K top-k, P pairs.

#include "products.h"

namespace {

AVX2 void silu_times(float* gate, const float* up, long n) {
  for (long i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + exp_(-gate[i])) * up[i];
}

AVX2 void scale_row(const float* row, float factor, long n, float* out) {
  for (long i = 0; i < n; ++i) out[i] = factor * row[i];
}

// The packed experts of a layer.
struct Experts {
  const char* packed;
  long D, F, up_at, down_at, bytes;

  Experts(const Format& format, const char* packed, long D, long F)
      : packed(packed), D(D), F(F), up_at(format.matrix_bytes(F, D)), down_at(2 * up_at),
        bytes(down_at + format.matrix_bytes(D, F)) {}

  const char* gate(long e) const { return packed + e * bytes; }
  const char* up(long e) const { return gate(e) + up_at; }
  const char* down(long e) const { return gate(e) + down_at; }
};

// Stage 1: pairs of a token and one of its choices, those of an expert next to one another.
struct Pairs {
  std::vector<long> start, place;  // an expert's first pair; where a choice's pair lies, or -1: computed elsewhere
  std::vector<long> token;         // a pair's
  std::vector<float> gate;         // likewise
  std::vector<long> busy;          // experts that have pairs

  Pairs(const int64_t* rows, const bf16* gates, long T, long K, long E) : start(E + 1, 0), place(T * K, -1) {
    for (long c = 0; c < T * K; ++c)
      if (rows[c] < E) ++start[rows[c] + 1];
    for (long e = 0; e < E; ++e) {
      if (start[e + 1]) busy.push_back(e);
      start[e + 1] += start[e];
    }
    std::vector<long> next(start.begin(), start.end() - 1);
    token.resize(number()), gate.resize(number());
    for (long c = 0; c < T * K; ++c)
      if (rows[c] < E) {
        const long p = place[c] = next[rows[c]]++;
        token[p] = c / K, gate[p] = widen(gates[c]);
      }
  }

  long number() const { return start.back(); }

  // Calls each(e, first, last, from, to): tiles [first, last) and pairs [from, to) of expert e, until all of a matrix
  // with so many tiles is done for all experts.
  template <typename Each>
  void share_out(const Call& call, long tiles, const Each& each) const {
    const long shares = Share::number(tiles);
    call.run(long(busy.size()) * shares, true, [&](long item) {
      const Share share(item % shares, tiles);
      const long e = busy[item / shares];
      each(e, share.first, share.last, start[e], start[e + 1]);
    });
  }
};

// Stage 2: silu(gate(x)) * up(x) of each pair, [P, F padded]. Both products of 16 hidden units are computed together,
// so that silu needs no second pass. Units between F and a whole tile become zero: their weights are.
float* gate_and_up(const Call& call, const Experts& experts, const Pairs& pairs, const bf16* x) {
  const Format& format = call.format;
  const Kernel& kernel = call.kernel;
  const long D = experts.D, padded = format.padded(D), stride = format.row_bytes(D, kernel);
  const char* act = activations(call, call.s.x, pairs.number(), D,
                                [&](long p, float* row) { widen_row(x + pairs.token[p] * D, D, row); });
  const long width = format.padded(experts.F), tile_bytes = format.tile_bytes(D);
  float* hidden = call.s.hidden.at_least<float>(pairs.number() * width);
  pairs.share_out(call, round_up(experts.F, TILE) / TILE, [&](long e, long first, long last, long from, long to) {
    const char *gate = experts.gate(e), *up = experts.up(e);
    blocks(kernel, first, last, from, to, [&](long tile, long p, long count) {
      float g[MAX_ROWS * TILE], u[MAX_ROWS * TILE];
      kernel.multiply(gate + tile * tile_bytes, padded, act + p * stride, stride, count, g);
      kernel.multiply(up + tile * tile_bytes, padded, act + p * stride, stride, count, u);
      silu_times(g, u, count * TILE);
      for (long m = 0; m < count; ++m) std::copy_n(g + m * TILE, TILE, hidden + (p + m) * width + tile * TILE);
    });
  });
  return hidden;
}

// Those rows as activations, zeros behind the last tile of hidden units: in place where they are wanted as they are.
const char* hidden_activations(const Call& call, long F, long P, float* hidden) {
  const Kernel& kernel = call.kernel;
  const long width = call.format.padded(F), written = round_up(F, TILE), stride = call.format.row_bytes(F, kernel);
  char* converted = kernel.activate ? call.s.hidden_x.at_least(P * stride) : nullptr;
  call.for_rows(converted || written < width ? P : 0, [&](long p) {
    float* row = hidden + p * width;
    std::fill(row + written, row + width, 0.0f);
    if (converted) kernel.activate(row, width, converted + p * stride);
  });
  return converted ? converted : reinterpret_cast<const char*>(hidden);
}

// Stage 3: gate * down(hidden) of each pair, [P, D].
const float* down(const Call& call, const Experts& experts, const Pairs& pairs, const char* hidden) {
  const long D = experts.D;
  float* y = call.s.y.at_least<float>(pairs.number() * D);
  pairs.share_out(call, round_up(D, TILE) / TILE, [&](long e, long first, long last, long from, long to) {
    multiply_tiles(call.format, call.kernel, experts.down(e), experts.F, first, last, hidden, from, to,
                   [&](long p, long d, float* sums) {
                     scale_row(sums, pairs.gate[p], std::min(TILE, D - d), y + p * D + d);
                   });
  });
  return y;
}

// Stage 4: out [T, D], the sum of each token's pairs in the order of its choices.
void add_choices(const Call& call, const Pairs& pairs, const float* y, long T, long K, long D, bf16* out) {
  call.for_rows(T, [&](long t) {
    float* sum = row_of(D);
    std::fill_n(sum, D, 0.0f);
    for (long k = 0; k < K; ++k) {
      const long p = pairs.place[t * K + k];
      if (p >= 0) add_row(y + p * D, D, sum);
    }
    narrow_row(sum, D, out + t * D);
  });
}

}  // namespace

EXPORT void outcrop_experts(int is_int8, int isa, long threads, const bf16* x, long T, long D, long F,
                            const int64_t* rows, const bf16* gates, long K, long E, const char* packed, bf16* out) {
  const Call call(format_of(is_int8), isa, threads);
  const Experts experts(call.format, packed, D, F);
  const Pairs pairs(rows, gates, T, K, E);
  float* hidden = gate_and_up(call, experts, pairs, x);
  const char* act = hidden_activations(call, F, pairs.number(), hidden);
  const float* y = down(call, experts, pairs, act);
  add_choices(call, pairs, y, T, K, D, out);
}
