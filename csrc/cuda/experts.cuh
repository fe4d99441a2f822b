// Dispatch receive, expert_major: the row of an expert that a cell gets. It follows from the cell's
// own word (how many tokens before it its source sends there) and from what the sources before its
// own sent, so that nobody has to look at other cells.
#pragma once

#include "cuda/cells.cuh"
#include "cuda/scales.cuh"

namespace moebius::cuda {

// All threads: what each source sends to each expert; `meanwhile` runs while that is on its way.
// Fills first_row and totals: a warp for each expert, a lane for each source.
template <class Meanwhile>
MOEBIUS_DEVICE void read_counts(const Rank& self,
                                const Begun& begun,
                                const RecvShared& shared,
                                const Meanwhile& meanwhile) {
  const Shape& s = self.layout.shape;
  const int num_local = s.num_local_experts();
  const auto cells_of = [&](int src) {
    if (src >= s.num_ranks) return 0;
    return load(shared.first_cell + src + 1) - load(shared.first_cell + src);
  };
  const auto counts_of = [&](int src) {
    return reinterpret_cast<const int32_t*>(self.heap + self.layout.counts(begun.slot, src));
  };
  // What a source without cells left there is of another round.
  const int first_cells = cells_of(lane());
  const int32_t* first_counts = counts_of(lane());
  const auto ask = [&](int expert) {
    return expert < num_local && first_cells > 0 ? load(first_counts + expert) : 0;
  };
  int now = ask(warp_index()), next = ask(warp_index() + kWarpsPerBlock);
  meanwhile();
#pragma unroll 1
  for (int expert = warp_index(); expert < num_local; expert += kWarpsPerBlock) {
    int num_cells = first_cells, n = now, sum = 0;
    now = next;
    next = ask(expert + 2 * kWarpsPerBlock);
#pragma unroll 1
    for (int src = lane();;) {
      if (n < 0 || n > num_cells) {
        fail_cell(self, begun.epoch, src);
        n = 0;
      }
      const int up_to = sum + scan_warp(n);
      if (src < s.num_ranks) store(shared.first_row + expert * s.num_ranks + src, up_to - n);
      sum = shfl(up_to, kWarp - 1);
      src += kWarp;
      if (src - lane() >= s.num_ranks) break;
      num_cells = cells_of(src);
      n = num_cells > 0 ? load(counts_of(src) + expert) : 0;
    }
    if (lane() == 0) store(shared.totals + expert, sum);
  }
  sync_block();
}

// Rows of `expert` that source `src` has.
MOEBIUS_DEVICE int rows_from(const Shape& s, int expert, int src, const RecvShared& shared) {
  const int at = expert * s.num_ranks + src;
  const int end =
      src + 1 < s.num_ranks ? load(shared.first_row + at + 1) : load(shared.totals + expert);
  return end - load(shared.first_row + at);
}

// Row of `expert` that its token number `position` of source `src` has; -1 if that is none.
MOEBIUS_DEVICE int find_row(
    const Shape& s, int expert, int position, int src, const RecvShared& shared) {
  if (expert < 0 || expert >= s.num_local_experts()) return -1;
  if (position < 0 || position >= rows_from(s, expert, src, shared)) return -1;
  return load(shared.first_row + expert * s.num_ranks + src) + position;
}

// The rows of a Mover: a cell goes to each of its experts. A lane for each choice.
struct ToExperts {
  const DispatchRecvParams& p;
  const Begun& begun;
  const RecvShared& shared;
  Scales scales;
  int src, expert, position;  // of the choice
  int row;                    // of the expert
  uint32_t which, rest;       // lanes with a row, once for each row; of them, those to come

  using Found = Cell;
  MOEBIUS_DEVICE Cell find(int number) const {
    return warp_find_cell(p.self, begun.slot, number, shared);
  }
  MOEBIUS_DEVICE void ask(const Cell& cell, bool is_first) {
    const bool is_there = lane() < p.self.layout.shape.num_topk;
    src = cell.src;
    expert = is_there ? load(ids_of(p.self, cell.at) + lane()) : -1;
    position = is_there ? load(positions_of(p.self, cell.at) + lane()) : -1;
    scales.from = nullptr;
    if (is_first && p.scales != nullptr) scales.read(p, cell.at);
  }
  MOEBIUS_DEVICE void begin(int) {
    const Shape& s = p.self.layout.shape;
    row = find_row(s, expert, position, src, shared);
    bool is_one = row >= 0;
#pragma unroll 1
    for (int k = 0; k < s.num_topk; ++k) {
      const int other = shfl(expert, k);
      if (k < lane() && other == expert) is_one = false;  // named twice, it has the token once
    }
    which = ballot(is_one);
  }
  MOEBIUS_DEVICE std::byte* to(int n) {
    if (n == 0) rest = which;
    if (rest == 0) return nullptr;
    const int from = lowest(rest);
    rest &= rest - 1;
    const Shape& s = p.self.layout.shape;
    const int64_t num_rows = int64_t{s.num_ranks} * s.max_num_tokens;
    return p.x + (shfl(expert, from) * num_rows + shfl(row, from)) * s.payload_bytes;
  }
  MOEBIUS_DEVICE void finish(bool is_first) const {
    if (!is_first || scales.from == nullptr) return;
#pragma unroll 1
    for (uint32_t left = which; left != 0; left &= left - 1) {
      scales.write(p, shfl(expert, lowest(left)), shfl(row, lowest(left)));
    }
  }
};

// A choice of a received cell, and what is noted of it.
struct Choice {
  int src, index;  // of the cell
  int expert, position;
  int32_t token, reply_row;
};

// A warp for each 32 choices of the cells, from the last one on: few are spread over the blocks,
// and fall to warps that have no rows to move.
struct Choices {
  const DispatchRecvParams& p;
  const Begun& begun;
  const RecvShared& shared;

  MOEBIUS_DEVICE static int first() {
    const Share share = Share::of(Place::of_block());
    return (share.num_warps - 1 - share.first) * kWarp + lane();
  }
  MOEBIUS_DEVICE int num() const {
    const Shape& s = p.self.layout.shape;
    return load(shared.first_cell + s.num_ranks) * s.num_topk;
  }
  MOEBIUS_DEVICE Choice read(int i) const {
    const Shape& s = p.self.layout.shape;
    const int number = i / s.num_topk, choice = i - number * s.num_topk;
    const Cell cell = find_cell(p.self, begun.slot, number, shared);
    const auto* head = reinterpret_cast<const CellHead*>(cell.at + p.self.layout.head_in_cell);
    return {cell.src,
            cell.index,
            load(ids_of(p.self, cell.at) + choice),
            load(positions_of(p.self, cell.at) + choice),
            load(&head->token),
            load(&head->reply_row)};
  }
  MOEBIUS_DEVICE void note(int i, const Choice& c) const {
    const Shape& s = p.self.layout.shape;
    const int row = find_row(s, c.expert, c.position, c.src, shared);
    if ((row < 0 && c.expert != -1) || !s.is_reply_row(c.reply_row)) {
      fail_cell(p.self, begun.epoch, c.src);
    }
    const int at = row < 0 ? -1 : c.expert * s.num_ranks * s.max_num_tokens + row;
    const int64_t inbox = int64_t{c.src} * s.max_num_tokens + c.index;
    int32_t* rows = in_workspace<int32_t>(p.self, begun.slot, p.self.layout.cell_rows);
    store(rows + inbox * s.num_topk + i % s.num_topk, at);
    if (at >= 0) store(p.src_info + at, c.token);
  }
};

// One block: the rows of each (expert, source), by the last threads first.
MOEBIUS_DEVICE void note_ranges(const DispatchRecvParams& p, const RecvShared& shared) {
  const Shape& s = p.self.layout.shape;
  for (int i = num_threads() - 1 - thread_index(); i < s.num_experts; i += num_threads()) {
    const int expert = i / s.num_ranks, src = i - expert * s.num_ranks;
    const int64_t n = rows_from(s, expert, src, shared);
    store(p.layout_range + i, int64_t{load(shared.first_row + i)} << 32 | n);
  }
}

}  // namespace moebius::cuda
