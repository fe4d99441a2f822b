// Where a token comes in the list of each rank, and among the tokens of each expert, that it goes
// to. The same for whoever computes it, so that every block does, and none waits for another
// (DESIGN.md, I5).
#pragma once

#include "cuda/rank.cuh"

namespace moebius::cuda {

#if defined(MOEBIUS_SIMT)
constexpr int kFewWords = 2;
#else
constexpr int kFewWords = 32;
#endif

// In shared memory; all threads of the block call everything but `find`.
struct Positions {
  uint32_t* bits;   // [columns, words] items of this chunk that belong to the column
  int32_t* before;  // [columns, words] items of the column before the word
  int32_t* totals;  // [columns] items of the column so far
  int num_columns;
  int num_words;

  MOEBIUS_DEVICE static Positions in(std::byte* shared, int num_columns, int num_words) {
    const int64_t n = int64_t{num_columns} * num_words;
    Positions p;
    p.bits = reinterpret_cast<uint32_t*>(shared);
    p.before = reinterpret_cast<int32_t*>(p.bits + n);
    p.totals = p.before + n;
    p.num_columns = num_columns;
    p.num_words = num_words;
    return p;
  }

  MOEBIUS_DEVICE void clear_totals() const {
#pragma unroll 1
    for (int c = thread_index(); c < num_columns; c += num_threads()) store(totals + c, 0);
  }
  MOEBIUS_DEVICE void clear() const {
#pragma unroll 1
    for (int i = thread_index(); i < num_columns * num_words; i += num_threads()) {
      store(bits + i, 0u);
    }
  }
  // Between clear and count, with a block barrier on either side. Twice is once.
  MOEBIUS_DEVICE void mark(int column, int item) const {
    or_shared(bits + column * num_words + item / 32, 1u << (item % 32));
  }
  // Prefix sums over the words of each column: by a thread, or by a warp if there are many.
  MOEBIUS_DEVICE void count() const {
    if (num_words <= kFewWords) {
#pragma unroll 1
      for (int c = thread_index(); c < num_columns; c += num_threads()) {
        int sum = load(totals + c);
#pragma unroll 1
        for (int at = c * num_words; at < (c + 1) * num_words; ++at) {
          store(before + at, sum);
          sum += popcount(load(bits + at));
        }
        store(totals + c, sum);
      }
      return;
    }
#pragma unroll 1
    for (int c = warp_index(); c < num_columns; c += num_threads() / kWarp) {
      int base = load(totals + c);
#pragma unroll 1
      for (int first = 0; first < num_words; first += kWarp) {
        const int w = first + lane();
        const int here = w < num_words ? popcount(load(bits + c * num_words + w)) : 0;
        const int sum = scan_warp(here);
        if (w < num_words) store(before + c * num_words + w, base + sum - here);
        base += shfl(sum, kWarp - 1);
      }
      sync_warp();
      if (lane() == 0) store(totals + c, base);
    }
  }
  // Items of the column before `item`. After count and a block barrier.
  MOEBIUS_DEVICE int find(int column, int item) const {
    const int at = column * num_words + item / 32;
    return load(before + at) + popcount(load(bits + at) & ((1u << (item % 32)) - 1));
  }
};

// Words of a chunk: all items, if their bitmaps are no larger than this. So small on the host
// executor that a few dozen items are more than one chunk.
#if defined(MOEBIUS_SIMT)
constexpr int64_t kPositionsBytes = 256;
#else
constexpr int64_t kPositionsBytes = 48 * 1024;
#endif

MOEBIUS_HD constexpr int positions_words(int64_t num_items, int num_columns) {
  const int64_t needed = (num_items + 31) / 32;
  const int64_t fitting = kPositionsBytes / (8 * int64_t{num_columns});
  const int64_t words = needed < fitting ? needed : fitting;
  return static_cast<int>(words < 1 ? 1 : words);
}
MOEBIUS_HD constexpr size_t positions_bytes(int num_columns, int num_words) {
  const size_t n = static_cast<size_t>(num_columns) * static_cast<size_t>(num_words) * 8 +
                   static_cast<size_t>(num_columns) * 4;
  return (n + 127) / 128 * 128;
}

}  // namespace moebius::cuda
