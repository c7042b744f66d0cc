// What the library tells of itself: abi.py compares it with what Python calls.

#include "exchange.h"

#include <cstddef>
#include <string>
#include <type_traits>

namespace {

template <typename T>
std::string kind() {
  if constexpr (std::is_void_v<T>) return "void";
  else if constexpr (std::is_pointer_v<T>) return "p";
  else return (std::is_floating_point_v<T> ? "f" : "i") + std::to_string(sizeof(T));
}

template <typename Result, typename... Arguments>
std::string signature(Result (*)(Arguments...)) {
  return (kind<Result>() + ... + (" " + kind<Arguments>()));
}

#define FIELD(type, name) (" " #name " " + kind<decltype(type::name)>() + " " + std::to_string(offsetof(type, name)))
#define FUNCTION(name) (#name ": " + signature(name) + "\n")

std::string batch() {
  return "Batch:" + FIELD(Batch, T) + FIELD(Batch, S) + FIELD(Batch, B) + FIELD(Batch, block_size) +
         FIELD(Batch, slots) + FIELD(Batch, starts) + FIELD(Batch, contexts) + FIELD(Batch, blocks) +
         FIELD(Batch, cos) + FIELD(Batch, sin) + " " + std::to_string(sizeof(Batch)) + "\n";
}

std::string layer() {
  return "Layer:" + FIELD(Layer, D) + FIELD(Layer, H) + FIELD(Layer, G) + FIELD(Layer, C) + FIELD(Layer, E) +
         FIELD(Layer, K) + FIELD(Layer, window) + FIELD(Layer, q_norm_width) + FIELD(Layer, k_norm_width) +
         FIELD(Layer, gates_over_all) + FIELD(Layer, is_normalised) + FIELD(Layer, eps) + FIELD(Layer, residual) +
         FIELD(Layer, scale) + FIELD(Layer, clip) + FIELD(Layer, attention_norm) + FIELD(Layer, moe_norm) +
         FIELD(Layer, q_norm) + FIELD(Layer, k_norm) + FIELD(Layer, sinks) + FIELD(Layer, qkv) + FIELD(Layer, out) +
         FIELD(Layer, router) + FIELD(Layer, qkv_bias) + FIELD(Layer, out_bias) + " " +
         std::to_string(sizeof(Layer)) + "\n";
}

std::string heads() {
  return "Frame:" + FIELD(Frame, number) + FIELD(Frame, length) + " " + std::to_string(sizeof(Frame)) +
         "\nDispatchHead:" + FIELD(DispatchHead, magic) + FIELD(DispatchHead, dtype) + FIELD(DispatchHead, front) +
         FIELD(DispatchHead, step) + FIELD(DispatchHead, layer) + FIELD(DispatchHead, top_k) +
         FIELD(DispatchHead, tokens) + FIELD(DispatchHead, hidden) + " " + std::to_string(sizeof(DispatchHead)) +
         "\nPartialHead:" + FIELD(PartialHead, magic) + FIELD(PartialHead, dtype) + FIELD(PartialHead, status) +
         FIELD(PartialHead, tokens) + FIELD(PartialHead, hidden) + FIELD(PartialHead, expert) +
         FIELD(PartialHead, nanoseconds) + " " + std::to_string(sizeof(PartialHead)) + "\n";
}

std::string numbers() {
  std::string all = "wire:";
  for (uint64_t number : {uint64_t(DISPATCH_MAGIC), uint64_t(PARTIAL_MAGIC), uint64_t(MAX_TOKENS), uint64_t(MAX_HIDDEN),
                          uint64_t(MAX_TOP_K), uint64_t(OK), uint64_t(NOT_HELD), MAX_MESSAGE, uint64_t(FLOAT32),
                          uint64_t(BFLOAT16_CODE)})
    all += " " + std::to_string(number);
  return all + "\n";
}

std::string exchange() {
  return "Homes:" + FIELD(Homes, E) + FIELD(Homes, most) + FIELD(Homes, home) + FIELD(Homes, numbers) + " " +
         std::to_string(sizeof(Homes)) + "\nReplica:" + FIELD(Replica, fd) + FIELD(Replica, num_sent) + " " +
         std::to_string(sizeof(Replica)) + "\nPart:" + FIELD(Part, state) + FIELD(Part, replica) + FIELD(Part, tokens) +
         FIELD(Part, number) + FIELD(Part, sent_at) + FIELD(Part, answered_at) + FIELD(Part, compute_ns) +
         FIELD(Part, sent) + FIELD(Part, length) + FIELD(Part, received) + FIELD(Part, answer) + " " +
         std::to_string(sizeof(Part)) + "\nExchange:" + FIELD(Exchange, G) + FIELD(Exchange, dtype) +
         FIELD(Exchange, front) + FIELD(Exchange, step) + FIELD(Exchange, first) + FIELD(Exchange, replicas) +
         FIELD(Exchange, patience) + FIELD(Exchange, next_number) + " " + std::to_string(sizeof(Exchange)) + "\n";
}

std::string steps() {
  return "Steps:" + FIELD(Steps, isa) + FIELD(Steps, threads) + FIELD(Steps, L) + FIELD(Steps, layers) +
         FIELD(Steps, batches) + FIELD(Steps, k) + FIELD(Steps, v) + FIELD(Steps, cache) + FIELD(Steps, x) +
         FIELD(Steps, h) + FIELD(Steps, combined) + FIELD(Steps, ids) + FIELD(Steps, gates) + FIELD(Steps, exchange) +
         FIELD(Steps, homes) + FIELD(Steps, parts) + FIELD(Steps, seconds) + " " + std::to_string(sizeof(Steps)) + "\n";
}

std::string serving() {
  return "ServingCounts:" + FIELD(ServingCounts, began_at) + FIELD(ServingCounts, tokens) +
         FIELD(ServingCounts, messages) + FIELD(ServingCounts, dropped) + FIELD(ServingCounts, nanoseconds) +
         FIELD(ServingCounts, at_most) + " " + std::to_string(sizeof(ServingCounts)) + "\nArrival:" +
         FIELD(Arrival, peer) + FIELD(Arrival, number) + FIELD(Arrival, length) + FIELD(Arrival, message) + " " +
         std::to_string(sizeof(Arrival)) + "\n";
}

std::string functions() {
  return FUNCTION(outcrop_isa_name) + FUNCTION(outcrop_isa_works) + FUNCTION(outcrop_packed_bytes) +
         FUNCTION(outcrop_pack) + FUNCTION(outcrop_linear) + FUNCTION(outcrop_experts) +
         FUNCTION(outcrop_attention) + FUNCTION(outcrop_front_layer) + FUNCTION(outcrop_use_huge_pages) +
         FUNCTION(outcrop_read) + FUNCTION(outcrop_exchange) + FUNCTION(outcrop_steps) + FUNCTION(outcrop_serving_new) +
         FUNCTION(outcrop_serving_listen) + FUNCTION(outcrop_serving_close) +
         FUNCTION(outcrop_serving_counts) + FUNCTION(outcrop_serving_set_layer) +
         FUNCTION(outcrop_serving_add) + FUNCTION(outcrop_serving_run) + FUNCTION(outcrop_serving_answer) +
         FUNCTION(outcrop_serving_stop) + FUNCTION(outcrop_serving_num_peers);
}

}  // namespace

EXPORT const char* outcrop_abi() {
  static const std::string all =
      batch() + layer() + heads() + numbers() + exchange() + steps() + serving() + functions();
  return all.c_str();
}
