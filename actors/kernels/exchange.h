// The C ABI of dispatch and combine over stream sockets: the front's end (exchange.cpp), steps of several layers
// (steps.cpp), the replica's end (serving.cpp). abi.py has the same.
//
// All this does what is ordinary. Whatever else happens is handed back as it is: who calls knows what to do about it.
//
// Letters as in abi.h; G groups of experts, R replicas, L layers.

#pragma once

#include "abi.h"
#include "wire.h"

// Where a layer's experts are: home[e][i] are the groups that hold expert e, of which there are numbers[e].
struct Homes {
  int64_t E, most;
  const int16_t *home, *numbers;  // [E, most], [E]
};

struct Replica {
  int64_t fd, num_sent;  // messages since it could be chosen: the least used one of a group gets the next
};

enum PartState : int64_t { NO_TOKENS, ANSWERED, WAITING, ODD, LOST };

// What has become of one group's part of a layer.
struct Part {
  int64_t state, replica, tokens, number;
  int64_t sent_at, answered_at, compute_ns;  // the first two on the monotonic clock
  int64_t sent, length;                      // bytes of the frame
  int64_t received;                          // bytes of the answer's frame ...
  const char* answer;                        // ... which lie here until the thread's next exchange
};

// What stays the same for a step.
struct Exchange {
  int64_t G, dtype, front, step;
  const int64_t* first;     // [G + 1] replicas of group g are first[g] to first[g + 1]
  Replica* replicas;        // [R]
  const int64_t* patience;  // [G, PATIENCE] nanoseconds to wait for an answer, by the bits of its number of tokens
  int64_t next_number;      // of messages
};
constexpr int64_t PATIENCE = 21;

// Dispatch and combine of a layer: x and out [T, D] in the exchange's type, ids [T, K], gates [T, K] as x; parts [G].
// 0 if all is done; 1 if it is not, and parts say how far it is; 2 if nothing has been sent.
EXPORT int outcrop_exchange(Exchange* exchange, const Homes* homes, int64_t layer, int64_t T, int64_t D, int64_t K,
                            const char* x, const int64_t* ids, const char* gates, char* out, Part* parts);

// A step's way through the layers: front half, exchange, next.
struct Steps {
  int64_t isa, threads, L;
  const Layer* const* layers;  // [L]
  const Batch* const* batches;  // [L], which differ in the angles of positions
  bf16 *k, *v;               // of layer 0; those of the next one are `cache` numbers further
  int64_t cache;
  bf16 *x, *h, *combined;    // [T, D] residual stream; what the experts get; what they yield
  int64_t* ids;              // [L, T, K]
  bf16* gates;               // [T, K]
  Exchange* exchange;
  const Homes* homes;        // [L]
  Part* parts;               // [L, G]
  int64_t* seconds;          // [L] nanoseconds of each exchange
};

// Goes on at layer `first`; `combined` is of the layer before, unless it is 0. Returns L if all is done, or the layer
// whose exchange is not: `outcome` is what it returned.
EXPORT int64_t outcrop_steps(const Steps* steps, int64_t first, int* outcome);

// What a replica has computed, and since when it computes (0: it does not). For any thread to read.
struct ServingCounts {
  int64_t began_at, tokens, messages, dropped, nanoseconds;
  int64_t at_most[24];  // messages by their seconds of computation, as the bounds of outcrop_serving_new
};

enum ServingEvent : int { NOTHING, KNOCKED, CAME };

// A message that is out of the ordinary. It lies there until the next call.
struct Arrival {
  int64_t peer, number, length;
  const char* message;
};

struct Serving;

// A replica's end. The bounds [num_bounds] of the histogram are in seconds, ascending. It lasts as long as the process.
EXPORT Serving* outcrop_serving_new(int is_int8, int isa, long L, long num_experts, long D, long F, long K,
                                    const double* bounds, long num_bounds);
EXPORT const ServingCounts* outcrop_serving_counts(Serving* serving);

// From now on a layer has these E experts, packed as outcrop_experts takes them; rows [num_experts]: which of them each
// is, or -1. The memory before may be given back afterwards.
EXPORT void outcrop_serving_set_layer(Serving* serving, long layer, const char* packed, long E, const int64_t* rows);

// The socket that fronts knock at; who calls lets them in.
EXPORT void outcrop_serving_listen(Serving* serving, int listener);

// A front has been let in. Its socket is closed with the connection.
EXPORT void outcrop_serving_add(Serving* serving, int peer);

// Answers dispatches until something is out of the ordinary (see ServingEvent), or for `milliseconds` nobody wants
// anything, or outcrop_serving_stop() is called.
EXPORT int outcrop_serving_run(Serving* serving, long threads, long milliseconds, Arrival* arrival);
EXPORT void outcrop_serving_answer(Serving* serving, int64_t peer, int64_t number, const char* message, long length);
EXPORT void outcrop_serving_stop(Serving* serving);
EXPORT void outcrop_serving_close(Serving* serving);  // all connections, once outcrop_serving_run() has returned
EXPORT long outcrop_serving_num_peers(Serving* serving);
