// Rows that move as they are: through shared memory by bulk copies, each warp on its own, several
// in flight.
#pragma once

#include "cuda/work.cuh"

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

// Moves rows of `row_bytes` in windows of a stage: items are (row, window), dealt to the warps of
// `share`. `Rows` says what a row is; the whole warp calls:
//   from(row)              where it lies, or null if it does not move
//   ask(row, is_first)     as early as may be: what is read for it is then on its way; is_first:
//                          its first window is among those to come
//   begin(row, is_first)   before its stores, and before the wait for its bytes
//   to(n)                  its n-th destination, or null past the last
//   finish(is_first)       after the stores of a window
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
  int num_left = 0;  // items not asked for
  Part next = {0, 0};
  Part item = {-1, 0};   // asked for and served next; whole -1: none
  Part ahead = {-1, 0};  // asked for after it

  MOEBIUS_DEVICE static int64_t offset_of(const Part& p) { return int64_t{p.part} * kStageBytes; }
  MOEBIUS_DEVICE uint32_t bytes_of(const Part& p) const {
    return static_cast<uint32_t>(min_of(kStageBytes, row_bytes - offset_of(p)));
  }
  MOEBIUS_DEVICE std::byte* stage_of(uint32_t sequence) const {
    return shared.stages + sequence % kMoverStages * kStageBytes;
  }

  // Finds the next item that moves and asks for it.
  MOEBIUS_DEVICE Part request() {
    while (num_left > 0) {
      const Part found = next;
      next.advance(num_windows);
      --num_left;
      const std::byte* from = rows.from(found.whole);
      if (from == nullptr) continue;
      warp_bulk_load(stage_of(requested),
                     from + offset_of(found),
                     bytes_of(found),
                     shared.filled + requested % kMoverStages);
      ++requested;
      return found;
    }
    return {-1, 0};
  }

  MOEBIUS_DEVICE void start(int num_rows) {
    static_assert(kMoverStages == 3, "one item is stored while two are on their way");
    num_windows = static_cast<int>((row_bytes + kStageBytes - 1) / kStageBytes);
    const Run run = Run::of(share, num_rows * num_windows);
    num_left = run.end - run.begin;
    next = Part::at(run.begin, num_windows);
    bulk_wait_read<0>();  // of the list before
    item = request();
    ahead = request();
  }

  MOEBIUS_DEVICE void run() {
    for (int row = -1; item.whole >= 0; ++served) {
      const bool is_first = item.part == 0;
      const bool is_new = item.whole != row;
      if (is_new) rows.ask(row = item.whole, is_first);
      bulk_wait_read<0>();  // the stage that is asked for next was stored from last
      const Part after = request();
      if (is_new) rows.begin(row, is_first);
      barrier_wait(shared.filled + served % kMoverStages, served / kMoverStages % 2);
      for (int n = 0;; ++n) {
        std::byte* to = rows.to(n);
        if (to == nullptr) break;
        warp_bulk_store(to + offset_of(item), stage_of(served), bytes_of(item));
      }
      bulk_commit();
      rows.finish(is_first);
      item = ahead;
      ahead = after;
    }
  }
};

}  // namespace moebius::cuda
