// Attention of a step's new tokens over the paged cache where it lies.
//
// Letters: T tokens, S sequences, H query heads, G key/value heads, R = H / G, C head dimension, B blocks.

#pragma once

#include "tiles.h"

// A step's new tokens, sequence by sequence: those of sequence s are rows starts[s] to starts[s + 1].
// native.py has the same fields.
struct Batch {
  int64_t T, S, B, block_size;
  const int64_t* slots;     // [T] where the token's key and value go
  const int64_t* starts;    // [S + 1]
  const int64_t* contexts;  // [S] tokens that are in the cache, the new ones among them
  const int32_t* blocks;    // [S, B]
  const bf16 *cos, *sin;    // [T, C] of the token's position; the sign of rotate-half is in the sine
};

// One layer's keys and values, [slots, G, C]; slot blocks[s][n / block_size] * block_size + n % block_size holds token n
// of sequence s.
struct Cache {
  const bf16 *k, *v;
  long G, C;
};

// out [T, H, C] = softmax(scale * q k) v of each token over its sequence up to itself. Rows of q are q_stride apart.
// Scores and sums are float32. Only slots of tokens that were written are read.
void attention(const Kernel& kernel, State& s, long threads, const Batch& batch, const Cache& cache, long H, float scale,
               const float* q, long q_stride, float* out);
