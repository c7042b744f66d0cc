// What a call of the ABI computes with: rows of activations and the products of packed matrices with them, shared out
// over the threads.

#pragma once

#include "tiles.h"

constexpr long FEW = 32;    // rows that are not worth waking a thread for
constexpr long PACKED_TOGETHER = 512;  // numbers of a row, a multiple of every padding
constexpr long TILES = 4;   // tiles that a thread takes at a time, ...
constexpr long CHUNK = 24;  // ... and rows that it takes all of them past, so that both stay in its cache

AVX2 inline void add_row(const float* row, long n, float* out) {
  for (long i = 0; i < n; ++i) out[i] += row[i];
}

// One call of the ABI, which alone computes until it ends.
struct Call {
  const Format& format;
  const Kernel& kernel;
  const long threads;
  State& s = state();
  const std::lock_guard<std::mutex> guard{s.one_call};

  Call(const Format& format, int isa, long threads) : format(format), kernel(format.kernels[isa]), threads(threads) {}

  // Calls work(i) for every i in [0, count), on all threads if it is worth waking them.
  template <typename Work>
  void run(long count, bool is_worth_it, const Work& work) const {
    s.pool.run(count, is_worth_it ? threads : 1, std::cref(work), kernel.leave);
  }

  template <typename Work>
  void for_rows(long count, const Work& work) const {
    run(count, count >= FEW, work);
  }
};

// A row of activations; fill(row) writes its D float32 numbers.
template <typename Fill>
void activation(const Format& format, const Kernel& kernel, long D, char* to, Fill fill) {
  const long padded = format.padded(D);
  float* row = kernel.activate ? row_of(padded) : reinterpret_cast<float*>(to);
  fill(row);
  std::fill(row + D, row + padded, 0.0f);
  if (kernel.activate) kernel.activate(row, padded, to);
}

// `count` rows of activations in `scratch`; fill(i, row) writes the numbers of the i-th.
template <typename Fill>
const char* activations(const Call& call, Scratch& scratch, long count, long D, Fill fill) {
  const long stride = call.format.row_bytes(D, call.kernel);
  char* act = scratch.at_least(count * stride);
  call.for_rows(count, [&](long i) {
    activation(call.format, call.kernel, D, act + i * stride, [&](float* row) { fill(i, row); });
  });
  return act;
}

// Calls each(tile, row, count) for all of a matrix's tiles [first, last) and rows [from, to), `count` rows at a time.
template <typename Each>
void blocks(const Kernel& kernel, long first, long last, long from, long to, Each each) {
  for (long chunk = from; chunk < to; chunk += CHUNK) {
    const long rows = std::min(CHUNK, to - chunk), parts = (rows + kernel.max_rows - 1) / kernel.max_rows;
    const long part = (rows + parts - 1) / parts;  // 4 + 4 is faster than 6 + 2
    for (long tile = first; tile < last; ++tile)
      for (long row = 0; row < rows; row += part) each(tile, chunk + row, std::min(part, rows - row));
  }
}

// Tiles [first, last) of the `item`-th share of a matrix.
struct Share {
  long first, last;
  Share(long item, long tiles) : first(item * TILES), last(std::min(tiles, first + TILES)) {}
  static long number(long tiles) { return (tiles + TILES - 1) / TILES; }
};

// Packs rows row_of(0) to row_of(O - 1) [D] as a matrix, with zeros behind them. Where rows have no scales, they are
// packed piece by piece: what the 16 rows of a tile write to stays in the cache until all of them have.
template <typename RowOf>
void pack_rows(const Format& format, long O, long D, char* packed, RowOf row_of) {
  const long padded = format.padded(D), step = format.scales ? padded : PACKED_TOGETHER;
  for (long first = 0; first < round_up(O, TILE); first += TILE)
    for (long d = 0; d < padded; d += step)
      for (long o = first; o < first + TILE; ++o)
        format.pack_row(o < O ? row_of(o) + d : nullptr, o < O ? std::clamp(D - d, 0L, step) : 0,
                        std::min(step, padded - d), o % TILE,
                        packed + o / TILE * format.tile_bytes(D) + d * TILE * format.item);
}

// Tiles [first, last) of a packed matrix with D inputs, times rows [from, to) of activations: calls
// each(row, output, sums) with the 16 outputs from `output` on.
template <typename Each>
void multiply_tiles(const Format& format, const Kernel& kernel, const char* packed, long D, long first, long last,
                    const char* act, long from, long to, Each each) {
  const long padded = format.padded(D), stride = format.row_bytes(D, kernel), tile_bytes = format.tile_bytes(D);
  blocks(kernel, first, last, from, to, [&](long tile, long row, long count) {
    float sums[MAX_ROWS * TILE];
    kernel.multiply(packed + tile * tile_bytes, padded, act + row * stride, stride, count, sums);
    for (long m = 0; m < count; ++m) each(row + m, tile * TILE, sums + m * TILE);
  });
}

// A packed matrix [O, D], times T rows of activations: calls each(row, first, width, sums) with up to 16 outputs.
template <typename Each>
void product(const Call& call, const char* packed, long O, long D, const char* act, long T, Each each) {
  const long tiles = round_up(O, TILE) / TILE, chunks = (T + CHUNK - 1) / CHUNK;
  call.run(Share::number(tiles) * chunks, true, [&](long item) {
    const Share share(item / chunks, tiles);
    const long from = item % chunks * CHUNK, to = std::min(T, from + CHUNK);
    multiply_tiles(call.format, call.kernel, packed, D, share.first, share.last, act, from, to,
                   [&](long t, long first, float* sums) { each(t, first, std::min(TILE, O - first), sums); });
  });
}
