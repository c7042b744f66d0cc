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

// out [T, H, C] = softmax(scale * q k) v of each token over its sequence up to itself. Rows of q are q_stride apart.
// Scores and sums are float32; queries and weights of a prompt are rounded to bfloat16 where the kernel takes such
// activations. Only slots of tokens that were written are read.
void attention(const Call& call, const Batch& batch, const Cache& cache, long H, float scale, const float* q,
               long q_stride, float* out);
