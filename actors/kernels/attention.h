// Attention of a step's new tokens over the paged cache where it lies.
//
// Letters: T tokens, S sequences, H query heads, G key/value heads, R = H / G, C head dimension, B blocks.

#pragma once

#include "products.h"

// One layer's keys and values, [slots, G, C]; slot blocks[s][n / block_size] * block_size + n % block_size holds token
// n of sequence s.
struct Cache {
  const bf16 *k, *v;
  long G, C;
};

// How queries attend. `window` tokens are seen, the query's own included; 0 is all. `sinks` [H], or null, are scores of
// nothing: they take their share of a head's weights.
struct Rule {
  long H;
  float scale;
  long window;
  const bf16* sinks;

  // The first token that the query of a token with `context` tokens up to itself sees.
  long first_of(long context) const { return window ? std::max(0L, context - window) : 0; }
};

// out [T, H, C] = softmax(scale * q k) v of each token over its sequence up to itself. Rows of q are q_stride apart.
// Scores and sums are float32; queries and weights of a prompt are rounded to bfloat16 where the kernel takes such
// activations. Only slots of tokens that were written are read.
void attention(const Call& call, const Batch& batch, const Cache& cache, const Rule& rule, const float* q,
               long q_stride, float* out);
