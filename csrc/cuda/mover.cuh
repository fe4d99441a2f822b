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

// Moves rows of `row_bytes` in windows of a stage: items are (row, window), dealt to the warps of
// the grid in turn. `Rows` says what a row is; the whole warp calls:
//   from(row)              where it lies, or null if it does not move
//   begin(row, is_whole)   before its stores, for each window; `is_whole` once a row
//   to(row, n)             its n-th destination, or null past the last
// `count` carries on from call to call: stages and parities do not start again.
template <class Rows>
MOEBIUS_DEVICE void move_rows(
    const MoverShared& shared, int num_rows, int64_t row_bytes, uint32_t* count, Rows& rows) {
  const int num_windows = static_cast<int>((row_bytes + kStageBytes - 1) / kStageBytes);
  const int num_items = num_rows * num_windows;
  const auto offset_of = [&](int item) { return int64_t{item % num_windows} * kStageBytes; };
  const auto bytes_of = [&](int item) {
    return static_cast<uint32_t>(min_of(kStageBytes, row_bytes - offset_of(item)));
  };
  int next = warp_index() * num_blocks() + block_index();
  uint32_t requested = *count;
  // Finds the next item that moves and asks for it; -1 at the end.
  const auto request = [&]() {
    for (; next < num_items; next += kWarpsPerBlock * num_blocks()) {
      const int item = next;
      const std::byte* from = rows.from(item / num_windows);
      if (from == nullptr) continue;
      const int stage = static_cast<int>(requested++ % kMoverStages);
      warp_bulk_load(shared.stages + stage * kStageBytes,
                     from + offset_of(item),
                     bytes_of(item),
                     shared.filled + stage);
      next += kWarpsPerBlock * num_blocks();
      return item;
    }
    return -1;
  };
  static_assert(kMoverStages == 3, "one item is stored while two are on their way");
  uint32_t served = *count;
  int item = request();
  int ahead = request();
  for (; item >= 0; ++served) {
    bulk_wait_read<0>();  // the stage that is asked for next was stored from last
    const int after = request();
    const int row = item / num_windows;
    const int stage = static_cast<int>(served % kMoverStages);
    rows.begin(row, item % num_windows == 0);
    barrier_wait(shared.filled + stage, served / kMoverStages % 2);
    for (int n = 0;; ++n) {
      std::byte* to = rows.to(row, n);
      if (to == nullptr) break;
      warp_bulk_store(to + offset_of(item), shared.stages + stage * kStageBytes, bytes_of(item));
    }
    bulk_commit();
    item = ahead;
    ahead = after;
  }
  *count = served;
}

}  // namespace moebius::cuda
