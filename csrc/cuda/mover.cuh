// Rows that move as they are: through shared memory by bulk copies, each warp on its own, several
// in flight.
#pragma once

#include "cuda/rank.cuh"

namespace moebius::cuda {

constexpr int kMoverStages = 3;
constexpr int kMoverWarpBytes = kMoverStages * kStageBytes;

struct MoverShared {
  std::byte* stages;  // of this warp
  Barrier* filled;    // of this warp, one a stage

  MOEBIUS_DEVICE static MoverShared in(std::byte* shared) {
    MoverShared m;
    m.stages = shared + warp_index() * kMoverWarpBytes;
    m.filled = reinterpret_cast<Barrier*>(shared + kWarpsPerBlock * kMoverWarpBytes) +
               warp_index() * kMoverStages;
    return m;
  }
  // By a warp, before its first move.
  MOEBIUS_DEVICE void init() const {
    if (lane() == 0) {
      for (int s = 0; s < kMoverStages; ++s) barrier_init(filled + s);
      fence_barrier_init();
    }
    sync_warp();
  }
};
constexpr size_t kMoverSharedBytes =
    kWarpsPerBlock * (kMoverWarpBytes + kMoverStages * sizeof(Barrier));

// Which warp of how many: of the grid, or of one block.
struct Share {
  int first, step;

  MOEBIUS_DEVICE static Share of_grid() {
    return {warp_index() * num_blocks() + block_index(), kWarpsPerBlock * num_blocks()};
  }
  MOEBIUS_DEVICE static Share of_block() { return {warp_index(), kWarpsPerBlock}; }
};

// Moves rows of `row_bytes` in windows of a stage: items are (row, window), dealt to the warps of
// `share` in turn. `Rows` says what a row is; the whole warp calls:
//   from(row)   where it lies, or null if it does not move
//   begin(row)  before its stores
//   to(n)       its n-th destination, or null past the last
// The whole warp calls start, which asks for the first rows, and run, which does the rest.
template <class Rows>
struct Mover {
  const MoverShared& shared;
  Rows rows;
  int64_t row_bytes;
  Share share;
  // Carries on from list to list: stages and parities do not start again.
  uint32_t requested = 0;
  uint32_t served = 0;
  int num_windows = 0;
  int num_items = 0;
  int next = 0;
  int item = -1;   // asked for and served next; -1: none
  int ahead = -1;  // asked for after it

  MOEBIUS_DEVICE int64_t offset_of(int i) const { return int64_t{i % num_windows} * kStageBytes; }
  MOEBIUS_DEVICE uint32_t bytes_of(int i) const {
    return static_cast<uint32_t>(min_of(kStageBytes, row_bytes - offset_of(i)));
  }
  MOEBIUS_DEVICE std::byte* stage_of(uint32_t sequence) const {
    return shared.stages + sequence % kMoverStages * kStageBytes;
  }

  // Finds the next item that moves and asks for it; -1 at the end.
  MOEBIUS_DEVICE int request() {
    for (; next < num_items; next += share.step) {
      const std::byte* from = rows.from(next / num_windows);
      if (from == nullptr) continue;
      const int found = next;
      next += share.step;
      warp_bulk_load(stage_of(requested),
                     from + offset_of(found),
                     bytes_of(found),
                     shared.filled + requested % kMoverStages);
      ++requested;
      return found;
    }
    return -1;
  }

  MOEBIUS_DEVICE void start(int num_rows) {
    static_assert(kMoverStages == 3, "one item is stored while two are on their way");
    num_windows = static_cast<int>((row_bytes + kStageBytes - 1) / kStageBytes);
    num_items = num_rows * num_windows;
    next = share.first;
    bulk_wait_read<0>();  // of the list before
    item = request();
    ahead = request();
  }

  MOEBIUS_DEVICE void run() {
    for (; item >= 0; ++served) {
      bulk_wait_read<0>();  // the stage that is asked for next was stored from last
      const int after = request();
      rows.begin(item / num_windows);
      barrier_wait(shared.filled + served % kMoverStages, served / kMoverStages % 2);
      for (int n = 0;; ++n) {
        std::byte* to = rows.to(n);
        if (to == nullptr) break;
        warp_bulk_store(to + offset_of(item), stage_of(served), bytes_of(item));
      }
      bulk_commit();
      item = ahead;
      ahead = after;
    }
  }
};

}  // namespace moebius::cuda
