// The front's half of a layer in one call: attention and router, with all that lies between.
//
// Rounded to bfloat16 as the model stores them: the residual stream, what the norms yield, the attention's part of the
// stream, keys and values, the router's logits and the gates. All else is float32, but for what a kernel with bfloat16
// activations multiplies.
//
// Letters: T tokens, D hidden, H query heads, G key/value heads, C head dimension, E experts, K top-k.

#include "attention.h"
#include "products.h"

namespace {

// x += factor * y, rounded.
AVX2 void add_scaled(const bf16* y, float factor, long n, bf16* x) {
  for (long i = 0; i < n; ++i) x[i] = narrow(widen(x[i]) + factor * widen(y[i]));
}

// The same of float32 numbers, in place; nothing is rounded.
AVX2 void norm_row(float* x, const bf16* weight, float eps, long n) {
  float parts[8] = {}, sum = 0.0f;
  long i = 0;
  for (; i + 8 <= n; i += 8)
    for (long j = 0; j < 8; ++j) parts[j] += x[i + j] * x[i + j];
  for (; i < n; ++i) sum += x[i] * x[i];
  for (float part : parts) sum += part;
  const float inverse = 1.0f / std::sqrt(sum / n + eps);
  for (i = 0; i < n; ++i) x[i] *= inverse * widen(weight[i]);
}

AVX2 void clamp_row(float* x, float bound, long n) {
  for (long i = 0; i < n; ++i) x[i] = x[i] > bound ? bound : x[i] < -bound ? -bound : x[i];  // NaN stays NaN
}

// As transformers has it: normalised, rounded, scaled by the weight, rounded.
AVX2 void rms_norm(const bf16* x, const bf16* weight, float eps, long n, float* out) {
  float parts[8] = {}, sum = 0.0f;
  long i = 0;
  for (; i + 8 <= n; i += 8)
    for (long j = 0; j < 8; ++j) parts[j] += widen(x[i + j]) * widen(x[i + j]);
  for (; i < n; ++i) sum += widen(x[i]) * widen(x[i]);
  for (float part : parts) sum += part;
  const float inverse = 1.0f / std::sqrt(sum / n + eps);
  for (i = 0; i < n; ++i) out[i] = widen(narrow(widen(narrow(widen(x[i]) * inverse)) * widen(weight[i])));
}

// x * cos + rotate_half(x) * sin, in place.
AVX2 void rotate(float* x, const bf16* cos, const bf16* sin, long C) {
  const long half = C / 2;
  for (long c = 0; c < half; ++c) {
    const float low = x[c], high = x[c + half];
    x[c] = low * widen(cos[c]) + high * widen(sin[c]);
    x[c + half] = high * widen(cos[c + half]) + low * widen(sin[c + half]);
  }
}

// The K largest of E scores, the first of equal ones first.
void choose(const float* scores, long E, long K, int64_t* ids) {
  thread_local Scratch taken;
  bool* is_taken = taken.at_least<bool>(E);
  std::fill_n(is_taken, E, false);
  for (long k = 0; k < K; ++k) {
    long best = -1;
    for (long e = 0; e < E; ++e)
      if (!is_taken[e] && (best < 0 || scores[e] > scores[best])) best = e;
    is_taken[best] = true, ids[k] = best;
  }
}

// x becomes its softmax, times anything.
AVX2 void exp_row(float* x, long n) {
  float max = x[0];
  for (long i = 1; i < n; ++i) max = x[i] > max ? x[i] : max;
  for (long i = 0; i < n; ++i) x[i] = exp_(x[i] - max);
}

// Experts and gates by the layer's rule. Where a softmax goes over all logits, its results are what is compared: they
// may be equal where logits are not. Overwrites logits then.
void route(const Layer& l, float* logits, int64_t* ids, bf16* gates) {
  float* powers = row_of(l.K);
  if (l.gates_over_all) {
    exp_row(logits, l.E);
    float all = 0.0f;
    for (long e = 0; e < l.E; ++e) all += logits[e];
    for (long e = 0; e < l.E; ++e) logits[e] /= all;
  }
  choose(logits, l.E, l.K, ids);
  for (long k = 0; k < l.K; ++k) powers[k] = logits[ids[k]];
  if (!l.gates_over_all) exp_row(powers, l.K);
  float sum = 0.0f;
  for (long k = 0; k < l.K; ++k) sum += powers[k];
  if (!l.is_normalised) sum = 1.0f;
  for (long k = 0; k < l.K; ++k) gates[k] = narrow(powers[k] / sum);
}

// A layer's front half over a step's tokens, and what lies between its parts.
class FrontHalf {
 public:
  FrontHalf(const Call& call, const Layer& layer, const Batch& batch)
      : call_(call), l_(layer), batch_(batch), T_(batch.T), queries_(l_.H * l_.C), keys_(l_.G * l_.C),
        width_(queries_ + 2 * keys_) {}

  // x += residual * y, y null for nothing; its norm as activations, and rounded in h where h is not null.
  const char* add_and_norm(const bf16* y, bf16* x, const bf16* weight, bf16* h) const {
    const long D = l_.D;
    return activations(call_, call_.s.x, T_, D, [&](long t, float* row) {
      if (y) add_scaled(y + t * D, l_.residual, D, x + t * D);
      rms_norm(x + t * D, weight, l_.eps, D, row);
      if (h) narrow_row(row, D, h + t * D);
    });
  }

  // Queries, keys and values, [T, (H + 2 G) C]; the first two turned, the last two in the cache as well.
  const float* project(const char* act, bf16* k, bf16* v) const {
    float* qkv = call_.s.qkv.at_least<float>(T_ * width_);
    product(call_, l_.qkv, width_, l_.D, act, T_, [&](long t, long first, long some, float* sums) {
      if (l_.qkv_bias) add_narrow(l_.qkv_bias + first, some, sums);
      std::copy_n(sums, some, qkv + t * width_ + first);
    });
    call_.for_rows(T_, [&](long t) {
      float* row = qkv + t * width_;
      for (long at = 0; l_.q_norm && at < queries_; at += l_.q_norm_width)
        norm_row(row + at, l_.q_norm, l_.eps, l_.q_norm_width);
      for (long at = queries_; l_.k_norm && at < queries_ + keys_; at += l_.k_norm_width)
        norm_row(row + at, l_.k_norm, l_.eps, l_.k_norm_width);
      if (l_.clip) clamp_row(row, l_.clip, width_);
      for (long at = 0; batch_.cos && at < queries_ + keys_; at += l_.C)
        rotate(row + at, batch_.cos + t * l_.C, batch_.sin + t * l_.C, l_.C);
      narrow_row(row + queries_, keys_, k + batch_.slots[t] * keys_);
      narrow_row(row + queries_ + keys_, keys_, v + batch_.slots[t] * keys_);
    });
    return qkv;
  }

  // The attention's part of the residual stream, [T, D].
  const bf16* attend(const float* qkv, const bf16* k, const bf16* v) const {
    float* attended = call_.s.attended.at_least<float>(T_ * queries_);
    attention(call_, batch_, {.k = k, .v = v, .G = l_.G, .C = l_.C},
              {.H = l_.H, .scale = l_.scale, .window = l_.window, .sinks = l_.sinks}, qkv, width_, attended);
    const char* act = activations(call_, call_.s.x, T_, queries_, [&](long t, float* row) {
      std::copy_n(attended + t * queries_, queries_, row);
    });
    bf16* y = call_.s.y.at_least<bf16>(T_ * l_.D);
    product(call_, l_.out, l_.D, queries_, act, T_, [&](long t, long first, long some, float* sums) {
      if (l_.out_bias) add_narrow(l_.out_bias + first, some, sums);
      narrow_row(sums, some, y + t * l_.D + first);
    });
    return y;
  }

  void choose_experts(const char* act, int64_t* ids, bf16* gates) const {
    const long E = l_.E, K = l_.K;
    if (!E) return;
    float* logits = call_.s.logits.at_least<float>(T_ * E);
    product(call_, l_.router, E, l_.D, act, T_, [&](long t, long first, long some, float* sums) {
      for (long i = 0; i < some; ++i) logits[t * E + first + i] = widen(narrow(sums[i]));
    });
    call_.for_rows(T_, [&](long t) { route(l_, logits + t * E, ids + t * K, gates + t * K); });
  }

 private:
  const Call& call_;
  const Layer& l_;
  const Batch& batch_;
  const long T_, queries_, keys_, width_;
};

}  // namespace

EXPORT void outcrop_front_layer(int isa, long threads, const Layer* layer, const Batch* batch, bf16* k, bf16* v,
                                const bf16* combined, bf16* x, bf16* h, int64_t* ids, bf16* gates) {
  const Call call(BFLOAT16, isa, threads);
  const FrontHalf front(call, *layer, *batch);
  const char* act = front.add_and_norm(combined, x, layer->attention_norm, nullptr);
  const float* qkv = front.project(act, k, v);
  const bf16* y = front.attend(qkv, k, v);
  act = front.add_and_norm(y, x, layer->moe_norm, h);
  front.choose_experts(act, ids, gates);
}
