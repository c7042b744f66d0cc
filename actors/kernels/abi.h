// The kernels' C ABI, which knows nothing of torch or Python. abi.py has the same, and outcrop_abi() tells if it has
// not.
//
// `isa` is the number of an instruction set for which outcrop_isa_works(), `threads` how many may compute. Calls may
// come from several threads: one computes at a time. What is computed for a token does not depend on the tokens of
// other sequences, nor on the number of threads.
//
// Letters: T tokens, D inputs of a matrix and hidden size, O outputs, F expert hidden, E experts, K top-k, S sequences,
// H query heads, G key/value heads, C head dimension, B blocks.

#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

using bf16 = uint16_t;

// A step's new tokens, sequence by sequence: those of sequence s are rows starts[s] to starts[s + 1].
struct Batch {
  int64_t T, S, B, block_size;
  const int64_t* slots;     // [T] where the token's key and value go
  const int64_t* starts;    // [S + 1]
  const int64_t* contexts;  // [S] tokens that are in the cache, the new ones among them
  const int32_t* blocks;    // [S, B]
  const bf16 *cos, *sin;    // [T, C] of the token's position; the sign of rotate-half is in the sine. Null: no positions
};

// The weights of the front's half of a layer. Without experts E is 0, and there is no router.
struct Layer {
  int64_t D, H, G, C, E, K;
  int64_t window;                         // tokens that a query sees, itself included; 0: all
  int64_t q_norm_width, k_norm_width;     // numbers normed together: C, or those of all heads; 0: none are
  int64_t gates_over_all, is_normalised;  // whether gates are a softmax over all logits, normalised after the choice
  float eps, residual, scale;             // of the norms; what is added to the stream is multiplied by; of the scores
  float clip;                             // bound of queries, keys and values; 0: none
  const bf16 *attention_norm, *moe_norm;  // [D]
  const bf16 *q_norm, *k_norm;            // [width], or null
  const bf16* sinks;                      // [H], or null
  const char *qkv, *out, *router;         // packed [(H + 2 G) C, D], [D, H C], [E, D]
  const bf16 *qkv_bias, *out_bias;        // or null
};

// A line for each of these structures, with the kinds and places of its fields, and for each of these functions, with
// the kinds of its result and arguments.
EXPORT const char* outcrop_abi();

// Name of an instruction set, or null where there is none; each is faster than those before it.
EXPORT const char* outcrop_isa_name(int isa);

// Whether this CPU, and the operating system, can use it.
EXPORT int outcrop_isa_works(int isa);

// Bytes of a packed matrix [O, D].
EXPORT long outcrop_packed_bytes(int is_int8, long O, long D);

// Packs a matrix w [O, D]: the same bytes for every instruction set.
EXPORT void outcrop_pack(int is_int8, const bf16* w, long O, long D, char* packed);

// y [T, O] = x [T, D] W^T + bias; bias may be null.
EXPORT void outcrop_linear(int isa, long threads, const bf16* x, long T, long D, const char* packed, long O,
                           const bf16* bias, bf16* y);

// out [T, D] = sum over each token's choices of gate * down(silu(gate(x)) * up(x)), all experts of a layer in one call.
// rows [T, K]: which of the E experts, E or more for choices that are computed elsewhere.
// Each expert is packed as gate [F, D], up [F, D] and down [D, F], one behind the other.
EXPORT void outcrop_experts(int is_int8, int isa, long threads, const bf16* x, long T, long D, long F,
                            const int64_t* rows, const bf16* gates, long K, long E, const char* packed, bf16* out);

// Attention by itself: k, v [slots, G, C], q and out [T, H, C] float32; window and sinks as in Layer. See attention.h.
EXPORT void outcrop_attention(int isa, long threads, const Batch* batch, const bf16* k, const bf16* v, long G, long C,
                              long H, float scale, long window, const bf16* sinks, const float* q, float* out);

// The front's half of a layer: attention and router, with all that lies between. x [T, D], the residual stream, in
// place: the experts' part of the layer before (`combined`, or null in the first layer) and this layer's attention are
// added. k and v are the layer's cache. What the experts of this layer want: h [T, D], ids [T, K], gates [T, K]; of a
// layer without experts, h alone.
EXPORT void outcrop_front_layer(int isa, long threads, const Layer* layer, const Batch* batch, bf16* k, bf16* v,
                                const bf16* combined, bf16* x, bf16* h, int64_t* ids, bf16* gates);

// Asks for huge pages for what lies wholly within: fewer misses of the address cache, a fifth more bandwidth.
EXPORT void outcrop_use_huge_pages(char* data, long bytes);

// Reads `bytes` and adds them up: the memory's own speed, for benchmarks.
EXPORT uint64_t outcrop_read(long threads, const char* data, long bytes);
