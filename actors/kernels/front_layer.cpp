// The front's half of a layer in one call: attention and router, with all that lies between.
//
// Rounded to bfloat16 as the model stores them: the residual stream, what the norms yield, keys and values, the router's
// logits and the gates. All else is float32.
//
// Letters: T tokens, D hidden, H query heads, G key/value heads, C head dimension, E experts, K top-k.

#include "attention.h"
#include "products.h"

namespace {

// native.py has the same fields.
struct Layer {
  int64_t D, H, G, C, E, K;
  float eps, residual, scale;
  const bf16 *attention_norm, *moe_norm;  // [D]
  const char *qkv, *out, *router;         // packed [(H + 2 G) C, D], [D, H C], [E, D]
  const bf16 *qkv_bias, *out_bias;        // or null
};

// x += factor * y, rounded.
AVX2 void add_scaled(const bf16* y, float factor, long n, bf16* x) {
  for (long i = 0; i < n; ++i) x[i] = narrow(widen(x[i]) + factor * widen(y[i]));
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

// The K largest of E logits, the first of equal ones first, and their softmax.
void route(const float* logits, long E, long K, int64_t* ids, bf16* gates) {
  std::vector<bool> is_taken(E, false);
  std::vector<float> powers(K);
  float sum = 0.0f;
  for (long k = 0; k < K; ++k) {
    long best = -1;
    for (long e = 0; e < E; ++e)
      if (!is_taken[e] && (best < 0 || logits[e] > logits[best])) best = e;
    is_taken[best] = true, ids[k] = best;
    sum += powers[k] = exp_(logits[best] - logits[ids[0]]);
  }
  for (long k = 0; k < K; ++k) gates[k] = narrow(powers[k] / sum);
}

}  // namespace

// x [T, D], the residual stream, in place: the experts' part of the layer before (`combined`, or null in the first layer) and
// this layer's attention are added. k and v are the layer's cache. What the experts of this layer want: h [T, D],
// ids [T, K], gates [T, K].
EXPORT void outcrop_front_layer(int number, long threads, const Layer* layer, const Batch* batch, bf16* k, bf16* v,
                                const bf16* combined, bf16* x, bf16* h, int64_t* ids, bf16* gates) {
  const Format& format = BFLOAT16;
  const Kernel& kernel = format.kernels[number];
  const Layer& l = *layer;
  State& s = state();
  std::lock_guard<std::mutex> guard(s.one_call);
  const long T = batch->T, D = l.D, C = l.C, queries = l.H * C, keys = l.G * C, width = queries + 2 * keys;

  const char* act = activations(format, kernel, s, s.x, T, D, threads, [&](long t, float* row) {
    if (combined) add_scaled(combined + t * D, l.residual, D, x + t * D);
    rms_norm(x + t * D, l.attention_norm, l.eps, D, row);
  });
  float* qkv = reinterpret_cast<float*>(s.qkv.at_least(T * width * sizeof(float)));
  product(format, kernel, s, l.qkv, width, D, act, T, threads, [&](long t, long first, long some, float* sums) {
    if (l.qkv_bias) add_narrow(l.qkv_bias + first, some, sums);
    std::copy_n(sums, some, qkv + t * width + first);
  });
  for_rows(s, T, threads, [&](long t) {
    float* row = qkv + t * width;
    for (long at = 0; at < queries + keys; at += C) rotate(row + at, batch->cos + t * C, batch->sin + t * C, C);
    narrow_row(row + queries, keys, k + batch->slots[t] * keys);
    narrow_row(row + queries + keys, keys, v + batch->slots[t] * keys);
  });

  float* attended = reinterpret_cast<float*>(s.attended.at_least(T * queries * sizeof(float)));
  attention(kernel, s, threads, *batch, {k, v, l.G, C}, l.H, l.scale, qkv, width, attended);

  act = activations(format, kernel, s, s.x, T, queries, threads,
                    [&](long t, float* row) { std::copy_n(attended + t * queries, queries, row); });
  bf16* y = reinterpret_cast<bf16*>(s.y.at_least(T * D * sizeof(bf16)));
  product(format, kernel, s, l.out, D, queries, act, T, threads, [&](long t, long first, long some, float* sums) {
    if (l.out_bias) add_narrow(l.out_bias + first, some, sums);
    narrow_row(sums, some, y + t * D + first);
  });

  act = activations(format, kernel, s, s.x, T, D, threads, [&](long t, float* row) {
    add_scaled(y + t * D, l.residual, D, x + t * D);
    rms_norm(x + t * D, l.moe_norm, l.eps, D, row);
    narrow_row(row, D, h + t * D);
  });
  float* logits = reinterpret_cast<float*>(s.logits.at_least(T * l.E * sizeof(float)));
  product(format, kernel, s, l.router, l.E, D, act, T, threads, [&](long t, long first, long some, float* sums) {
    for (long i = 0; i < some; ++i) logits[t * l.E + first + i] = widen(narrow(sums[i]));
  });
  for_rows(s, T, threads, [&](long t) { route(logits + t * l.E, l.E, l.K, ids + t * l.K, gates + t * l.K); });
}
