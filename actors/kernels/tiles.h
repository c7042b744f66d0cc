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

// Bytes ahead of what is read. Weights pass by once per call: kept out of the caches (NTA), they leave room there for all
// that the processes on this machine do between two layers. It makes a decode step a fifth faster.
constexpr long PREFETCH = 1024;

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

// sums[row][16], float32 or int32, for up to 32 rows of `bytes` bytes: two tiles of sums share each tile of weights.
template <bool is_int8>
AMX inline void amx_sums(const char* w, long bytes, const char* x, long stride, long rows, void* sums) {
  const long first = rows < 16 ? rows : 16, second = rows - first;
  const TileConfig config(first, second);
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  for (long at = 0; at < bytes; at += 64, w += 1024) {
    for (int line = 0; line < 16; ++line) _mm_prefetch(w + 4 * PREFETCH + 64 * line, _MM_HINT_NTA);
    _tile_loadd(4, w, 64);
    _tile_loadd(2, x + at, stride);
    if constexpr (is_int8) _tile_dpbssd(0, 2, 4);
    else _tile_dpbf16ps(0, 2, 4);
    if (second) {
      _tile_loadd(3, x + 16 * stride + at, stride);
      if constexpr (is_int8) _tile_dpbssd(1, 3, 4);
      else _tile_dpbf16ps(1, 3, 4);
    }
  }
  _tile_stored(0, sums, 64);
  if (second) _tile_stored(1, static_cast<char*>(sums) + 16 * TILE * 4, 64);
  _tile_release();
}
