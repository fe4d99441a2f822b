// Dispatch, receive half.
//
// Postcondition, expert_major: the rows of local expert l are the tokens routed to it, in the order
//   (source rank, token), and cell_rows says where each (cell, choice) went. token_major: row
//   src * M + i is cell i of rank src, with its local experts and weights, and -1 where there is
//   none.
// Grid: at most num_sms blocks. A warp takes a window of a cell. Where a cell goes follows from its
//   own word and what the sources before its own sent to that expert.
// Memory: reads the own inbox; writes the results and the workspace. Nothing remote.
// Synchronisation: [arrived] acquire, by every block; [all-done].
// Requirements: x 16-byte aligned.
// Cost: each received row is read once and written once for each of its local experts.
#include "cuda/launch.cuh"
#include "cuda/launchers.h"
#include "cuda/mover.cuh"
#include "cuda/scales.cuh"

namespace moebius::cuda {
namespace {

struct Shared {
  MoverShared mover;
  Ending* ending;
  int32_t* first_cell;  // [R + 1] cells of the ranks before; the last is their number
  int32_t* totals;      // [L] tokens of each expert; token_major: of this block's cells
  int32_t* first_row;   // [L, R] expert_major: rows of the ranks before

  MOEBIUS_DEVICE static Shared in(std::byte* at, const Shape& s) {
    Shared shared;
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

MOEBIUS_DEVICE Cell find_cell(const Rank& self, int slot, int number, const Shared& shared) {
  // The last source that begins at or before it.
  int src = 0, end = self.layout.shape.num_ranks;
  while (end - src > 1) {
    const int middle = (src + end) / 2;
    if (load(shared.first_cell + middle) <= number) {
      src = middle;
    } else {
      end = middle;
    }
  }
  const int index = number - load(shared.first_cell + src);
  return {src, index, self.heap + self.layout.cell(slot, src, index)};
}

// Waits for every source; fills first_cell. What is lost counts as nothing.
MOEBIUS_DEVICE void await_cells(const DispatchRecvParams& p,
                                const Begun& begun,
                                const Shared& shared) {
  const Rank& self = p.self;
  const int num_ranks = self.layout.shape.num_ranks;
  for (int src = thread_index(); src < num_ranks; src += num_threads()) {
    int64_t count = 0;
    if (!begun.is_lost && !is_masked(self, src)) {
      // Pairs with [arrived] of dispatch send.
      count = await_count(self, src, SignalKind::kDispatch, begun.epoch, p.wait_stats);
      if (count < 0) store(&shared.ending->has_failed, 1u);
    }
    store(shared.first_cell + src + 1, static_cast<int32_t>(count < 0 ? 0 : count));
  }
  sync_block();
  if (warp_index() == 0) {
    const bool is_lost = load(&shared.ending->has_failed) != 0;
    int sum = 0;
#pragma unroll 1
    for (int first = 0; first < num_ranks; first += kWarp) {
      const int src = first + lane();
      const bool is_one = src < num_ranks && !is_lost;
      const int up_to = scan_warp(is_one ? load(shared.first_cell + src + 1) : 0);
      if (src < num_ranks) store(shared.first_cell + src + 1, sum + up_to);
      sum += shfl(up_to, kWarp - 1);
    }
    if (lane() == 0) store(shared.first_cell, 0);
  }
  // The bulk loads below read what peers wrote.
  fence_proxy_async();
  sync_block();
}

// What a peer wrote is an index here only once it is known to be in bounds.
MOEBIUS_DEVICE bool is_reply_row(const Shape& s, int32_t row) {
  const int64_t last = int64_t{row} + (s.has_weights ? 0 : s.num_topk - 1);
  return row >= 0 && last < s.max_num_tokens * s.replies_per_token();
}

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

// expert_major, all threads: what each source sends to each expert; `meanwhile` runs while that is
// on its way. Fills first_row and totals.
template <class Meanwhile>
MOEBIUS_DEVICE void read_counts(const Rank& self,
                                const Begun& begun,
                                const Shared& shared,
                                const Meanwhile& meanwhile) {
  const Shape& s = self.layout.shape;
  const int num_local = s.num_local_experts();
  const auto count_at = [&](int i) {
    if (i >= s.num_experts) return 0;
    const int src = i / num_local, expert = i - src * num_local;
    // What a source without cells left there is of another round.
    const int most = load(shared.first_cell + src + 1) - load(shared.first_cell + src);
    if (most == 0) return 0;
    const int n =
        load(in_heap<const int32_t>(self, self.rank, self.layout.counts(begun.slot, src)) + expert);
    if (n >= 0 && n <= most) return n;
    fail_cell(self, begun.epoch, src);
    return 0;
  };
  const auto note = [&](int i, int n) {
    if (i >= s.num_experts) return;
    const int src = i / num_local;
    store(shared.first_row + (i - src * num_local) * s.num_ranks + src, n);
  };
  const int first = count_at(thread_index());
  meanwhile();
  note(thread_index(), first);
#pragma unroll 1
  for (int i = thread_index() + num_threads(); i < s.num_experts; i += num_threads()) {
    note(i, count_at(i));
  }
  sync_block();
#pragma unroll 1
  for (int expert = warp_index(); expert < num_local; expert += kWarpsPerBlock) {
    int32_t* rows = shared.first_row + expert * s.num_ranks;
    int sum = 0;
#pragma unroll 1
    for (int begin = 0; begin < s.num_ranks; begin += kWarp) {
      const int src = begin + lane();
      const int n = src < s.num_ranks ? load(rows + src) : 0;
      const int up_to = scan_warp(n);
      if (src < s.num_ranks) store(rows + src, sum + up_to - n);
      sum += shfl(up_to, kWarp - 1);
    }
    if (lane() == 0) store(shared.totals + expert, sum);
  }
  sync_block();
}

// Rows of `expert` that source `src` has.
MOEBIUS_DEVICE int rows_from(const Shape& s, int expert, int src, const Shared& shared) {
  const int at = expert * s.num_ranks + src;
  const int end =
      src + 1 < s.num_ranks ? load(shared.first_row + at + 1) : load(shared.totals + expert);
  return end - load(shared.first_row + at);
}

// Row of `expert` that its token number `position` of source `src` has; -1 if that is none.
MOEBIUS_DEVICE int find_row(
    const Shape& s, int expert, int position, int src, const Shared& shared) {
  if (expert < 0 || expert >= s.num_local_experts()) return -1;
  if (position < 0 || position >= rows_from(s, expert, src, shared)) return -1;
  return load(shared.first_row + expert * s.num_ranks + src) + position;
}

// The rows of a Mover: a cell goes to each of its experts. A lane for each choice.
struct ToExperts {
  const DispatchRecvParams& p;
  const Begun& begun;
  const Shared& shared;
  Scales scales;
  int src, expert, position;  // of the choice
  int row;                    // of the expert
  uint32_t which, rest;       // lanes with a row, once for each row; of them, those to come

  MOEBIUS_DEVICE const std::byte* from(int cell) const {
    return find_cell(p.self, begun.slot, cell, shared).at;
  }
  MOEBIUS_DEVICE void ask(int number, bool is_first) {
    const Cell cell = find_cell(p.self, begun.slot, number, shared);
    const bool is_there = lane() < p.self.layout.shape.num_topk;
    src = cell.src;
    expert = is_there ? load(ids_of(p.self, cell.at) + lane()) : -1;
    position = is_there ? load(positions_of(p.self, cell.at) + lane()) : -1;
    scales.from = nullptr;
    if (is_first && p.scales != nullptr) scales.read(p, cell.at);
  }
  MOEBIUS_DEVICE void begin(int, bool) {
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

// A warp for each 32 choices of the cells, so that few are spread over the blocks.
struct Choices {
  const DispatchRecvParams& p;
  const Begun& begun;
  const Shared& shared;

  MOEBIUS_DEVICE static int first() { return Share::of_grid().first * kWarp + lane(); }
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
    if ((row < 0 && c.expert != -1) || !is_reply_row(s, c.reply_row)) {
      fail_cell(p.self, begun.epoch, c.src);
    }
    const int at = row < 0 ? -1 : c.expert * s.num_ranks * s.max_num_tokens + row;
    const int64_t inbox = int64_t{c.src} * s.max_num_tokens + c.index;
    int32_t* rows = in_workspace<int32_t>(p.self, begun.slot, p.self.layout.cell_rows);
    store(rows + inbox * s.num_topk + i % s.num_topk, at);
    if (at >= 0) store(p.src_info + at, c.token);
  }
};

// Block 0: the rows of each (expert, source).
MOEBIUS_DEVICE void note_ranges(const DispatchRecvParams& p, const Shared& shared) {
  const Shape& s = p.self.layout.shape;
  for (int i = thread_index(); i < s.num_experts; i += num_threads()) {
    const int expert = i / s.num_ranks, src = i - expert * s.num_ranks;
    const int64_t n = rows_from(s, expert, src, shared);
    store(p.layout_range + i, int64_t{load(shared.first_row + i)} << 32 | n);
  }
}

MOEBIUS_DEVICE void receive_expert_major(const DispatchRecvParams& p,
                                         const Begun& begun,
                                         const Shared& shared) {
  const Shape& s = p.self.layout.shape;
  Mover<ToExperts> mover{
      shared.mover, {p, begun, shared, {}, 0, -1, -1, -1, 0, 0}, s.payload_bytes, Share::of_grid()};
  const Choices choices{p, begun, shared};
  const int num_choices = choices.num();
  // Before the rows, which it would stand behind in the queue.
  int i = Choices::first();
  Choice ahead{};
  if (i < num_choices) ahead = choices.read(i);
  read_counts(p.self, begun, shared, [&] { mover.start(load(shared.first_cell + s.num_ranks)); });
  const int step = Share::of_grid().num_warps * kWarp;
#pragma unroll 1
  while (i < num_choices) {
    choices.note(i, ahead);
    i += step;
    if (i < num_choices) ahead = choices.read(i);
  }
  sync_block();
  // Nothing fails from here on: the blocks meet while the rows are on their way.
  if (is_bookkeeper()) arrive(p.self, Half::kDispatchRecv, shared.ending);
  if (block_index() == 0) note_ranges(p, shared);
  mover.run();
}

// The rows of a Mover: cell i of rank src goes to row src * M + i.
struct ToRows {
  const DispatchRecvParams& p;
  const Begun& begun;
  const Shared& shared;
  Scales scales;
  int64_t number;  // of the row in x

  MOEBIUS_DEVICE const std::byte* from(int row) const {
    return find_cell(p.self, begun.slot, row, shared).at;
  }
  MOEBIUS_DEVICE void ask(int row, bool is_first) {
    const Cell cell = find_cell(p.self, begun.slot, row, shared);
    number = int64_t{cell.src} * p.self.layout.shape.max_num_tokens + cell.index;
    scales.from = nullptr;
    if (is_first && p.scales != nullptr) scales.read(p, cell.at);
  }
  MOEBIUS_DEVICE void begin(int, bool) const {}
  MOEBIUS_DEVICE std::byte* to(int n) const {
    return n == 0 ? p.x + number * p.self.layout.shape.payload_bytes : nullptr;
  }
  MOEBIUS_DEVICE void finish(bool is_first) const {
    if (is_first && scales.from != nullptr) scales.write(p, 0, number);
  }
};

// token_major: what belongs to a row beside its payload, and the count of each expert.
MOEBIUS_DEVICE void describe_cells(const DispatchRecvParams& p,
                                   const Begun& begun,
                                   int num_cells,
                                   const Shared& shared) {
  const Shape& s = p.self.layout.shape;
  for (int number = warp_index() * num_blocks() + block_index(); number < num_cells;
       number += kWarpsPerBlock * num_blocks()) {
    const Cell cell = find_cell(p.self, begun.slot, number, shared);
    const int64_t row = int64_t{cell.src} * s.max_num_tokens + cell.index;
    const auto* head = reinterpret_cast<const CellHead*>(cell.at + p.self.layout.head_in_cell);
    if (lane() == 0 && !is_reply_row(s, load(&head->reply_row))) {
      fail_cell(p.self, begun.epoch, cell.src);
    }
    const int32_t* ids = ids_of(p.self, cell.at);
    int32_t id = lane() < s.num_topk ? load(ids + lane()) : -1;
    if (id < -1 || id >= s.num_local_experts()) {
      fail_cell(p.self, begun.epoch, cell.src);
      id = -1;
    }
    bool is_first = id >= 0;
    for (int k = 0; k < s.num_topk; ++k) {
      const int32_t other = shfl(id, k);
      if (k < lane() && other == id) is_first = false;  // an expert named twice has the token once
    }
    if (is_first) add_shared(shared.totals + id, 1);
    if (lane() < s.num_topk) {
      const auto* weights =
          reinterpret_cast<const float*>(cell.at + p.self.layout.weights_in_cell());
      store(p.topk_ids + row * s.num_topk + lane(), id);
      store(p.topk_weights + row * s.num_topk + lane(), load(weights + lane()));
    }
  }
}

MOEBIUS_DEVICE void receive_token_major(const DispatchRecvParams& p,
                                        const Begun& begun,
                                        const Shared& shared) {
  const Shape& s = p.self.layout.shape;
  const int num_cells = load(shared.first_cell + s.num_ranks);
  Mover<ToRows> mover{shared.mover, {p, begun, shared, {}, 0}, s.payload_bytes, Share::of_grid()};
  mover.start(num_cells);
  describe_cells(p, begun, num_cells, shared);
  // Rows without a token read as unrouted.
  const int64_t per_src = int64_t{s.max_num_tokens} * s.num_topk;
  for (int src = 0; src < s.num_ranks; ++src) {
    const int used = load(shared.first_cell + src + 1) - load(shared.first_cell + src);
    for (int64_t i =
             int64_t{used} * s.num_topk + int64_t{block_index()} * num_threads() + thread_index();
         i < per_src;
         i += int64_t{num_blocks()} * num_threads()) {
      store(p.topk_ids + src * per_src + i, -1);
    }
  }
  sync_block();
  for (int expert = thread_index(); expert < s.num_local_experts(); expert += num_threads()) {
    const int n = load(shared.totals + expert);
    if (n != 0) add_relaxed_gpu(p.self.expert_counts + expert, n);
  }
  sync_block();
  if (is_bookkeeper()) arrive(p.self, Half::kDispatchRecv, shared.ending);
  mover.run();
}

// Last block: the counts, which only now are known for all blocks.
MOEBIUS_DEVICE void finish(const DispatchRecvParams& p, const Begun& begun, const Shared& shared) {
  const Rank& self = p.self;
  const Shape& s = self.layout.shape;
  if (is_bookkeeper()) clear_awaiting(self);
  const bool is_lost = !begun.is_lost && has_failed(self, begun.epoch);
  if (is_lost) lose(self, Half::kDispatchRecv, begun.epoch);
  int32_t* num_received = in_workspace<int32_t>(self, begun.slot, self.layout.num_received);
  for (int src = thread_index(); src < s.num_ranks; src += num_threads()) {
    const int n = load(shared.first_cell + src + 1) - load(shared.first_cell + src);
    store(num_received + src, is_lost ? 0 : n);
    store(p.src_num_tokens + src, is_lost ? 0 : n);
  }
  for (int expert = thread_index(); expert < s.num_local_experts(); expert += num_threads()) {
    int n = load(shared.totals + expert);
    if (self.is_token_major) {
      n = load(self.expert_counts + expert);
      store(self.expert_counts + expert, 0);
    }
    if (is_lost) n = 0;
    store(p.expert_num_tokens + expert, n);
    if (p.expert_stats == nullptr) continue;
    if (p.has_int64_stats) {
      int64_t* stats = static_cast<int64_t*>(p.expert_stats) + expert;
      store(stats, load(stats) + n);
    } else {
      int32_t* stats = static_cast<int32_t*>(p.expert_stats) + expert;
      store(stats, load(stats) + n);
    }
  }
  if (!is_lost || !self.is_token_major) return;
  const int64_t num_ids = int64_t{s.num_ranks} * s.max_num_tokens * s.num_topk;
  for (int64_t i = thread_index(); i < num_ids; i += num_threads()) store(p.topk_ids + i, -1);
}

MOEBIUS_KERNEL(kThreadsPerBlock) dispatch_recv_kernel(MOEBIUS_PARAMS DispatchRecvParams p) {
  const Rank& self = p.self;
  const Shape& s = self.layout.shape;
  const Shared shared = Shared::in(shared_memory(), s);
  shared.mover.init();
  if (thread_index() == 0) store(&shared.ending->has_failed, 0u);
  for (int i = thread_index(); i < s.num_local_experts(); i += num_threads()) {
    store(shared.totals + i, 0);
  }
  sync_block();
  wait_for_previous_kernel();
  const Begun begun = begin_half(self, p.handle, Half::kDispatchRecv);
  if (begun.is_stale) {
    // Its results are somebody else's by now, or never were: none.
    if (block_index() != 0) return;
    for (int i = thread_index(); i < s.num_local_experts(); i += num_threads()) {
      store(p.expert_num_tokens + i, 0);
    }
    for (int i = thread_index(); i < s.num_ranks; i += num_threads())
      store(p.src_num_tokens + i, 0);
    return;
  }
  await_cells(p, begun, shared);
  // From here on this kernel waits for no rank: the next one cannot keep out what it waits for.
  const int num_windows = static_cast<int>((s.payload_bytes + kStageBytes - 1) / kStageBytes);
  const bool is_ready = is_short(load(shared.first_cell + s.num_ranks) * num_windows);
  if (is_ready) let_next_kernel_start();
  if (self.is_token_major) {
    receive_token_major(p, begun, shared);
  } else {
    receive_expert_major(p, begun, shared);
  }
  bulk_wait_all();
  if (!is_ready) let_next_kernel_start();
  sync_block();
  if (load(&shared.ending->met) != 0) finish(p, begun, shared);
}

}  // namespace

void launch_dispatch_recv(const DispatchRecvParams& params, int num_sms, Stream stream) {
  const Shape& s = params.self.layout.shape;
  const int64_t num_cells = int64_t{s.num_ranks} * s.max_num_tokens;
  launch(dispatch_recv_kernel,
         LaunchShape{
             static_cast<int>(min_of(num_cells, num_sms)), kThreadsPerBlock, Shared::num_bytes(s)},
         params,
         stream);
}

}  // namespace moebius::cuda
