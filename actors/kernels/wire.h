// What travels over a stream between front and replica: heads.py has the same as tables, and outcrop_abi() tells if it
// has not. Little-endian, without gaps.
//
//   frame     Frame | message
//   dispatch  DispatchHead | x [T, D] | gates [T, K] | expert ids [T, K] int16, -1: not for this group
//   partial   PartialHead | partial sums [T, D], or, if the status is not OK, a text

#pragma once

#include <cstdint>

struct __attribute__((packed)) Frame {
  uint64_t number, length;  // the number that the answer repeats, bytes of the message
};

struct __attribute__((packed)) DispatchHead {
  uint32_t magic;
  uint16_t dtype, front;
  uint32_t step;
  uint16_t layer, top_k;
  uint32_t tokens, hidden;
};

struct __attribute__((packed)) PartialHead {
  uint32_t magic;
  uint16_t dtype, status;
  uint32_t tokens, hidden;
  int32_t expert;
  uint64_t nanoseconds;
};

constexpr uint32_t DISPATCH_MAGIC = 0x3244434f, PARTIAL_MAGIC = 0x3150434f;  // "OCD2", "OCP1"
constexpr uint32_t MAX_TOKENS = 1 << 20, MAX_HIDDEN = 1 << 16, MAX_TOP_K = 256;
constexpr uint16_t OK = 0, NOT_HELD = 1;
constexpr uint64_t MAX_MESSAGE = 512ull << 20;
constexpr uint16_t FLOAT32 = 0, BFLOAT16_CODE = 1;
