// How matrices are packed, and the products of one tile: a table of types of weights and instruction sets.
//
// A matrix W [O, D] is packed once into tiles of 16 outputs. Inputs are padded with zeros to a multiple of `pad`. Tile
// t holds, for each group of inputs that fit into 32 bits (two bfloat16, four int8), the 16 outputs' values side by
// side: packed[t][group][o][input]. So tiles stream contiguously, and the same bytes are what AVX2, AVX512 and AMX
// want. int8 weights have a scale per output: 16 float32 behind each tile; activations a scale per row, in as many
// bytes.

#pragma once

#include <array>
#include <utility>

#include "common.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")))
#define AMX __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512bf16")))

constexpr long TILE = 16;
constexpr long MAX_ROWS = 32;

// Bytes ahead of what is read. Weights pass by once per call: kept out of the caches (NTA), they leave room there for
// all that the processes on this machine do between two layers. It makes a decode step a fifth faster.
constexpr long PREFETCH = 1024;

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

// of<1>(), of<2>() and so on, as an array.
template <int N, typename Of>
constexpr auto by_rows(Of of) {
  return [&]<int... M>(std::integer_sequence<int, M...>) {
    return std::array{of.template operator()<M + 1>()...};
  }(std::make_integer_sequence<int, N>());
}

// How one instruction set multiplies.
struct Kernel {
  long item;      // bytes of an activation
  long max_rows;  // rows of one call of multiply
  // A row of float32 numbers, padded, as activations. Null: they are wanted as they are.
  void (*activate)(const float* row, long padded, char* out);
  // out[row][16] = sum over inputs, float32, for `rows` rows of activations, `stride` bytes apart.
  void (*multiply)(const char* tile, long padded, const char* x, long stride, long rows, float* out);
  // What each thread does after its last multiply, or null.
  void (*leave)() = nullptr;
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
inline const Format& format_of(int is_int8) { return is_int8 ? INT8 : BFLOAT16; }

// Rows of activations that this thread's tiles are configured for, or 0.
inline thread_local long amx_rows = 0;

struct alignas(64) TileConfig {  // as LDTILECFG reads it: palette 1
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Sums in 0 and 1, activations in 2 and 3, weights in 4; for up to 16 rows, 1 and 3 are not used. They stay so until
// amx_leave() or another number of rows: a matrix needs a configuration or a few, not one for every 16 outputs.
AMX inline void amx_configure(long rows) {
  if (rows == amx_rows) return;
  const uint8_t first = uint8_t(std::min(16L, rows)), second = uint8_t(std::max(1L, rows - 16));
  const uint8_t heights[] = {first, second, first, second, 16};
  TileConfig config;
  for (int i = 0; i < 5; ++i) config.rows[i] = heights[i], config.bytes[i] = 64;
  __asm__ volatile("" ::"m"(config));  // g++ believes that the next line reads eight bytes of it, and may drop the rest
  _tile_loadconfig(&config);
  amx_rows = rows;
}

AMX inline void amx_leave() {
  if (amx_rows) _tile_release();
  amx_rows = 0;
}

// sums[row][16], float32 or int32, for up to 32 rows of `bytes` bytes: two tiles of sums share each tile of weights.
template <bool is_int8>
AMX inline void amx_sums(const char* w, long bytes, const char* x, long stride, long rows, void* sums) {
  amx_configure(rows);
  const bool is_second = rows > 16;
  _tile_zero(0);
  _tile_zero(1);
  for (long at = 0; at < bytes; at += 64, w += 1024) {
    for (int line = 0; line < 16; ++line) _mm_prefetch(w + 4 * PREFETCH + 64 * line, _MM_HINT_NTA);
    _tile_loadd(4, w, 64);
    _tile_loadd(2, x + at, stride);
    if constexpr (is_int8) _tile_dpbssd(0, 2, 4);
    else _tile_dpbf16ps(0, 2, 4);
    if (is_second) {
      _tile_loadd(3, x + 16 * stride + at, stride);
      if constexpr (is_int8) _tile_dpbssd(1, 3, 4);
      else _tile_dpbf16ps(1, 3, 4);
    }
  }
  _tile_stored(0, sums, 64);
  if (is_second) _tile_stored(1, static_cast<char*>(sums) + 16 * TILE * 4, 64);
}
