// What the library tells of itself: abi.py compares it with what Python calls.

#include "abi.h"

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

std::string functions() {
  return FUNCTION(outcrop_isa_name) + FUNCTION(outcrop_isa_works) + FUNCTION(outcrop_packed_bytes) +
         FUNCTION(outcrop_pack) + FUNCTION(outcrop_linear) + FUNCTION(outcrop_experts) +
         FUNCTION(outcrop_attention) + FUNCTION(outcrop_front_layer) + FUNCTION(outcrop_use_huge_pages) +
         FUNCTION(outcrop_read);
}

}  // namespace

EXPORT const char* outcrop_abi() {
  static const std::string all = batch() + layer() + functions();
  return all.c_str();
}
