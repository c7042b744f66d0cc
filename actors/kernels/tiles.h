// How matrices are packed, and the products of one tile: a table of types of weights and instruction sets.
//
// A matrix W [O, D] is packed once into tiles of 16 outputs. Inputs are padded with zeros to a multiple of `pad`. Tile t
// holds, for each group of inputs that fit into 32 bits (two bfloat16, four int8), the 16 outputs' values side by side:
// packed[t][group][o][input]. So tiles stream contiguously, and the same bytes are what AVX2, AVX512 and AMX want.
// int8 weights have a scale per output: 16 float32 behind each tile; activations a scale per row, in as many bytes.

#pragma once

#include "common.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")))
#define AMX __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512bf16")))

constexpr long TILE = 16;
constexpr long MAX_ROWS = 32;

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }


// How one instruction set multiplies.
struct Kernel {
  long item;      // bytes of an activation
  long max_rows;  // rows of one call of multiply
  // A row of float32 numbers, padded, as activations. Null: they are wanted as they are.
  void (*activate)(const float* row, long padded, char* out);
  // out[row][16] = sum over inputs, float32, for `rows` rows of activations, `stride` bytes apart.
  void (*multiply)(const char* tile, long padded, const char* x, long stride, long rows, float* out);
};

// A type of weights.
struct Format {
  long item;    // bytes of a weight
  long pad;     // inputs are padded to a multiple of it
  long scales;  // bytes behind a tile, and behind a row of activations
  void (*pack_row)(const bf16* row, long D, long padded, long place, char* tile);  // output `place` of its tile
  Kernel kernels[3];  // by instruction set: AVX2, AVX512, AMX

  long padded(long D) const { return round_up(D, pad); }
  long tile_bytes(long D) const { return TILE * item * padded(D) + scales; }
  long matrix_bytes(long O, long D) const { return round_up(O, TILE) / TILE * tile_bytes(D); }
  long row_bytes(long D, const Kernel& kernel) const { return kernel.item * padded(D) + scales; }
};

extern const Format BFLOAT16, INT8;

struct alignas(64) TileConfig {  // as LDTILECFG reads it: palette 1
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  // Sums in 0 and 1, activations in 2 and 3, weights in 4.
  TileConfig(long first, long second) {
    const uint8_t heights[] = {uint8_t(first), uint8_t(second ? second : 1), uint8_t(first), uint8_t(second ? second : 1), 16};
    for (int i = 0; i < 5; ++i) rows[i] = heights[i], bytes[i] = 64;
  }
};
