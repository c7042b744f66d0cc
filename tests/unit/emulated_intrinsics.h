// AVX512-BF16, AVX512-VNNI and AMX as Intel's manual defines them, in plain C++: what is written with them can be run,
// slowly, on any CPU with AVX2. Force-included before the kernels. What it can't tell: whether the real instructions
// round alike.

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>  // before `target` means nothing: a member of it has that name

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define target(isa)  // functions are compiled for what the command line says
#define __builtin_cpu_supports(feature) 1
#define syscall(...) 0

namespace emulated {

struct Floats { float at[16]; };
struct Pairs { uint16_t at[32]; };

inline float widen(uint16_t v) {
  uint32_t bits = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline Floats zero() { return {}; }
inline Pairs load(const void* p) { Pairs v; std::memcpy(&v, p, 64); return v; }
inline Pairs spread(int32_t pair) {
  Pairs v;
  for (int i = 0; i < 16; ++i) std::memcpy(v.at + 2 * i, &pair, 4);
  return v;
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, 64); }
inline Floats dot_pairs(Floats sum, Pairs a, Pairs b) {
  for (int i = 0; i < 32; ++i) sum.at[i / 2] += widen(a.at[i]) * widen(b.at[i]);
  return sum;
}

template <typename T>
inline T lane(Pairs v, int number) { T value; std::memcpy(&value, reinterpret_cast<char*>(&v) + number * sizeof(T), sizeof(T)); return value; }
inline Pairs no_sums() { return {}; }
inline Pairs dot_bytes(Pairs sum, Pairs a, Pairs b) {  // unsigned by signed, modulo 2^32
  for (int i = 0; i < 16; ++i) {
    uint32_t total = lane<uint32_t>(sum, i);
    for (int part = 0; part < 4; ++part) total += uint32_t(lane<uint8_t>(a, 4 * i + part) * lane<int8_t>(b, 4 * i + part));
    std::memcpy(sum.at + 2 * i, &total, 4);
  }
  return sum;
}
inline Pairs minus(Pairs a, Pairs b) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t difference = lane<uint32_t>(a, i) - lane<uint32_t>(b, i);
    std::memcpy(a.at + 2 * i, &difference, 4);
  }
  return a;
}
inline Floats from_int32(Pairs v) {
  Floats f;
  for (int i = 0; i < 16; ++i) f.at[i] = float(lane<int32_t>(v, i));
  return f;
}
inline Floats load_floats(const void* p) { Floats v; std::memcpy(&v, p, 64); return v; }
inline Floats spread_float(float value) { Floats v; for (float& each : v.at) each = value; return v; }
inline Floats times(Floats a, Floats b) { for (int i = 0; i < 16; ++i) a.at[i] *= b.at[i]; return a; }

// Eight tiles of up to 16 rows of 64 bytes. An instruction on a tile that is not configured is a fault.
struct Tile { int rows = 0, bytes = 0; char at[16][64]; };
inline thread_local Tile tiles[8];
inline std::atomic<long> configurations{0};

inline Tile& tile(int number) {
  if (!tiles[number].rows || !tiles[number].bytes) std::abort();
  return tiles[number];
}
inline void configure(const void* config) {
  const char* c = static_cast<const char*>(config);
  if (c[0] != 1) std::abort();  // the palette
  ++configurations;
  for (int i = 0; i < 8; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, c + 16 + 2 * i, 2);
    tiles[i].rows = c[48 + i], tiles[i].bytes = bytes;
    if (tiles[i].rows > 16 || bytes > 64) std::abort();
  }
}
inline void release() { for (Tile& t : tiles) t = Tile(); }
inline void clear(int number) { std::memset(tile(number).at, 0, sizeof tiles[number].at); }
inline void load_tile(int number, const void* p, long stride) {
  Tile& t = tile(number);
  for (int row = 0; row < t.rows; ++row) std::memcpy(t.at[row], static_cast<const char*>(p) + row * stride, t.bytes);
}
inline void store_tile(int number, void* p, long stride) {
  Tile& t = tile(number);
  for (int row = 0; row < t.rows; ++row) std::memcpy(static_cast<char*>(p) + row * stride, t.at[row], t.bytes);
}
inline float product(uint16_t x, uint16_t y) { return widen(x) * widen(y); }
inline int32_t product(int8_t x, int8_t y) { return x * y; }

template <typename Item, typename Sum>
inline void dot_tiles(int sums, int left, int right) {
  Tile &c = tile(sums), &a = tile(left), &b = tile(right);
  if (a.rows != c.rows || a.bytes != 4 * b.rows || b.bytes != c.bytes) std::abort();
  for (int row = 0; row < c.rows; ++row)
    for (int k = 0; k < b.rows; ++k)
      for (int column = 0; column < c.bytes / 4; ++column)
        for (size_t part = 0; part < 4; part += sizeof(Item)) {
          Item x, y;
          Sum sum;
          std::memcpy(&x, a.at[row] + 4 * k + part, sizeof x);
          std::memcpy(&y, b.at[k] + 4 * column + part, sizeof y);
          std::memcpy(&sum, c.at[row] + 4 * column, 4);
          sum += product(x, y);
          std::memcpy(c.at[row] + 4 * column, &sum, 4);
        }
}

}  // namespace emulated

// For tests: how often tiles have been configured, and how many this thread has not released.
#define EMULATED extern "C" __attribute__((visibility("default"), weak))
EMULATED long emulated_configurations() { return emulated::configurations; }
EMULATED long emulated_tiles_in_use() {
  long number = 0;
  for (const emulated::Tile& tile : emulated::tiles) number += tile.rows > 0;
  return number;
}

#define __m512 emulated::Floats
#define __m512bh emulated::Pairs
#define _mm512_setzero_ps emulated::zero
#define _mm512_loadu_si512 emulated::load
#define _mm512_set1_epi32 emulated::spread
#define _mm512_storeu_ps emulated::store
#define _mm512_dpbf16_ps emulated::dot_pairs
#define __m512i emulated::Pairs
#define _mm512_setzero_si512 emulated::no_sums
#define _mm512_dpbusd_epi32 emulated::dot_bytes
#define _mm512_sub_epi32 emulated::minus
#define _mm512_cvtepi32_ps emulated::from_int32
#define _mm512_loadu_ps emulated::load_floats
#define _mm512_set1_ps emulated::spread_float
#define _mm512_mul_ps emulated::times
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig emulated::configure
#define _tile_release emulated::release
#define _tile_zero emulated::clear
#define _tile_loadd emulated::load_tile
#define _tile_stored emulated::store_tile
#define _tile_dpbf16ps (emulated::dot_tiles<uint16_t, float>)
#define _tile_dpbssd (emulated::dot_tiles<int8_t, int32_t>)
