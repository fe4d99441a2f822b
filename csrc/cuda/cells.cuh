// What dispatch has brought here, cell by cell.
#pragma once

#include "cuda/mover.cuh"

namespace moebius::cuda {

// In shared memory.
struct RecvShared {
  MoverShared mover;
  Ending* ending;
  int32_t* first_cell;  // [R + 1] cells of the ranks before; the last is their number
  int32_t* totals;      // [L] tokens of each expert; token_major: of this block's cells
  int32_t* first_row;   // [L, R] expert_major: rows of the ranks before

  MOEBIUS_DEVICE static RecvShared in(std::byte* at, const Shape& s) {
    RecvShared shared;
    shared.mover = MoverShared::in(at);
    shared.ending = reinterpret_cast<Ending*>(at + kMoverSharedBytes);
    shared.first_cell = reinterpret_cast<int32_t*>(shared.ending + 1);
    shared.totals = shared.first_cell + s.num_ranks + 1;
    shared.first_row = shared.totals + s.num_local_experts();
    return shared;
  }
  static size_t num_bytes(const Shape& s) {
    const int num_rows = s.has_positions ? s.num_experts : 0;
    return kMoverSharedBytes + sizeof(Ending) +
           4 * (static_cast<size_t>(s.num_ranks) + 1 + static_cast<size_t>(s.num_local_experts()) +
                static_cast<size_t>(num_rows));
  }
};

// One received cell, as a warp sees it.
struct Cell {
  int src;
  int index;  // among those of its source
  const std::byte* at;
};

MOEBIUS_DEVICE const int32_t* ids_of(const Rank& self, const std::byte* cell) {
  return reinterpret_cast<const int32_t*>(cell + self.layout.ids_in_cell());
}
MOEBIUS_DEVICE const int32_t* positions_of(const Rank& self, const std::byte* cell) {
  return reinterpret_cast<const int32_t*>(cell + self.layout.positions_in_cell());
}

MOEBIUS_DEVICE Cell
cell_of(const Rank& self, int slot, int src, int number, const RecvShared& shared) {
  const int index = number - load(shared.first_cell + src);
  return {src, index, self.heap + self.layout.cell(slot, src, index)};
}
MOEBIUS_DEVICE Cell find_cell(const Rank& self, int slot, int number, const RecvShared& shared) {
  const int src = find_source(shared.first_cell, self.layout.shape.num_ranks, number);
  return cell_of(self, slot, src, number, shared);
}
MOEBIUS_DEVICE Cell warp_find_cell(const Rank& self,
                                   int slot,
                                   int number,
                                   const RecvShared& shared) {
  const int src = warp_find_source(shared.first_cell, self.layout.shape.num_ranks, number);
  return cell_of(self, slot, src, number, shared);
}

// What a peer wrote is an index here only once it is known to be in bounds.
MOEBIUS_DEVICE void fail_cell(const Rank& self, uint64_t epoch, int src) {
  fail(self,
       epoch,
       FaultKind::kProtocol,
       Reason::kDeadline,
       src,
       -1,
       epoch,
       signal_word(epoch, 0),
       0);
}

}  // namespace moebius::cuda
