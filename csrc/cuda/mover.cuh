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
//   find(row)              a Found: `at`, where it lies, or null if it does not move
//   ask(found, is_first)   as early as may be: what is read for it is then on its way; is_first:
//                          its first window is among those to come
//   begin(row)             before its stores, and before the wait for its bytes
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
  struct Item {
    Part part;  // whole -1: none
    typename Rows::Found found;
  };
  Item item = {{-1, 0}, {}};   // asked for and served next
  Item ahead = {{-1, 0}, {}};  // asked for after it

  MOEBIUS_DEVICE static int64_t offset_of(const Part& p) { return int64_t{p.part} * kStageBytes; }
  MOEBIUS_DEVICE uint32_t bytes_of(const Part& p) const {
    return static_cast<uint32_t>(min_of(kStageBytes, row_bytes - offset_of(p)));
  }
  MOEBIUS_DEVICE std::byte* stage_of(uint32_t sequence) const {
    return shared.stages + sequence % kMoverStages * kStageBytes;
  }

  // Finds the next item that moves and asks for it.
  MOEBIUS_DEVICE Item request() {
    while (num_left > 0) {
      const Item it = {next, rows.find(next.whole)};
      next.advance(num_windows);
      --num_left;
      if (it.found.at == nullptr) continue;
      warp_bulk_load(stage_of(requested),
                     it.found.at + offset_of(it.part),
                     bytes_of(it.part),
                     shared.filled + requested % kMoverStages);
      ++requested;
      return it;
    }
    return {{-1, 0}, {}};
  }

  MOEBIUS_DEVICE void start(int num_rows) {
    static_assert(kMoverStages == 3, "one item is stored while two are on their way");
    num_windows = static_cast<int>((row_bytes + kStageBytes - 1) / kStageBytes);
    const Run run = Run::of(share, num_rows * num_windows);
    num_left = run.end - run.begin;
    next = Part::at(run.begin, num_windows);
    bulk_wait_read<0>();  // of the list before
    item = request();
    if (item.part.whole >= 0) rows.ask(item.found, item.part.part == 0);
    ahead = request();
  }

  MOEBIUS_DEVICE void run() {
    for (int row = -1; item.part.whole >= 0; ++served) {
      bulk_wait_read<0>();  // the stage that is asked for next was stored from last
      const Item after = request();
      const Part now = item.part;
      if (now.whole != row) rows.begin(row = now.whole);
      barrier_wait(shared.filled + served % kMoverStages, served / kMoverStages % 2);
      for (int n = 0;; ++n) {
        std::byte* to = rows.to(n);
        if (to == nullptr) break;
        warp_bulk_store(to + offset_of(now), stage_of(served), bytes_of(now));
      }
      bulk_commit();
      rows.finish(now.part == 0);
      item = ahead;
      ahead = after;
      if (item.part.whole >= 0 && item.part.whole != row) rows.ask(item.found, item.part.part == 0);
    }
  }
};

}  // namespace moebius::cuda
