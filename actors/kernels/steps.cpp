// A step's way through the layers in one call, as long as nothing is out of the ordinary.

#include "exchange.h"
#include "stream.h"

EXPORT int64_t outcrop_steps(const Steps* steps, int64_t first, int* outcome) {
  const Steps& s = *steps;
  for (int64_t layer = first; layer < s.L; ++layer) {
    const Layer& weights = *s.layers[layer];
    const Batch& batch = *s.batches[layer];
    int64_t* ids = s.ids + layer * batch.T * weights.K;
    outcrop_front_layer(int(s.isa), s.threads, &weights, &batch, s.k + layer * s.cache, s.v + layer * s.cache,
                        layer ? s.combined : nullptr, s.x, s.h, ids, s.gates);
    const int64_t began = now_ns();
    *outcome = outcrop_exchange(s.exchange, s.homes + layer, layer, batch.T, weights.D, weights.K,
                                reinterpret_cast<const char*>(s.h), ids, reinterpret_cast<const char*>(s.gates),
                                reinterpret_cast<char*>(s.combined), s.parts + layer * s.exchange->G);
    s.seconds[layer] = now_ns() - began;
    if (*outcome) return layer;
  }
  return s.L;
}
