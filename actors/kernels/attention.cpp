// A step's attention, cut into items for the threads: a sequence with one new token goes one way
// (attention_single.cpp), the tokens of a prompt go another (attention_prompt.cpp). Either way, what is computed for a
// token depends on its sequence alone, not on where a prompt is cut (but that a piece of one token goes the first way).

#include "attention_parts.h"

namespace {

constexpr long TOGETHER = 128;      // tokens of a prompt that share packed keys
constexpr long ITEMS = 4;           // that each thread should find, so that all end at about the same time
constexpr long WORTH_IT = 1 << 18;  // products of numbers that are worth waking a thread for

// Tokens [first, first + count) of the step's rows, all of sequence s, and key heads from `head` on.
struct Item {
  long s, first, count, head, heads;
};

// A prompt's queries go head by head. A single token's keys are read once for as many heads as leave enough to do for
// all threads.
std::vector<Item> cut(const Batch& batch, long G, long threads) {
  const long heads = std::max(1L, G * batch.S / std::max(1L, threads * ITEMS));
  std::vector<Item> items;
  for (long s = 0; s < batch.S; ++s) {
    const long end = batch.starts[s + 1], each = end - batch.starts[s] == 1 ? std::min(heads, G) : 1;
    for (long first = batch.starts[s]; first < end; first += TOGETHER)
      for (long head = 0; head < G; head += each)
        items.push_back({.s = s,
                         .first = first,
                         .count = std::min(TOGETHER, end - first),
                         .head = head,
                         .heads = std::min(each, G - head)});
  }
  return items;
}

}  // namespace

void attention(const Call& call, const Batch& batch, const Cache& cache, const Rule& rule, const float* q,
               long q_stride, float* out) {
  const long C = cache.C, H = rule.H, R = H / cache.G;
  const std::vector<Item> items = cut(batch, cache.G, call.threads);
  long work = 0;
  for (const Item& item : items) {
    const long context = batch.contexts[item.s];
    work += item.count * item.heads * (context - rule.first_of(context)) * R * C;
  }
  call.run(long(items.size()), work >= WORTH_IT, [&](long number) {
    const Item& item = items[number];
    const long last = batch.starts[item.s + 1] - 1, context = batch.contexts[item.s] - (last - item.first);
    const Keys keys = {.cache = cache,
                       .blocks = batch.blocks + item.s * batch.B,
                       .block_size = batch.block_size,
                       .head = item.head};
    const float* here = q + item.first * q_stride + item.head * R * C;
    float* to = out + (item.first * H + item.head * R) * C;
    if (batch.starts[item.s] == last) attend_single(keys, item.heads, context, R, rule, here, to);
    else attend_prompt(call.kernel, keys, context, item.count, R, rule, here, q_stride, to, H * C);
  });
}

EXPORT void outcrop_attention(int isa, long threads, const Batch* batch, const bf16* k, const bf16* v, long G, long C,
                              long H, float scale, long window, const bf16* sinks, const float* q, float* out) {
  const Call call(BFLOAT16, isa, threads);
  attention(call, *batch, {.k = k, .v = v, .G = G, .C = C},
            {.H = H, .scale = scale, .window = window, .sinks = sinks}, q, H * C, out);
}
