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
#pragma once

#include "cuda/experts.cuh"
#include "cuda/launch.cuh"

namespace moebius::cuda {

// Waits for every source; fills first_cell. What is lost counts as nothing.
MOEBIUS_DEVICE void await_cells(const DispatchRecvParams& p,
                                const Begun& begun,
                                const RecvShared& shared) {
  const Rank& self = p.self;
  const int num_ranks = self.layout.shape.num_ranks;
  for (int src = thread_index(); src < num_ranks; src += num_threads()) {
    int64_t count = 0;
    // Both are on their way together.
    const bool is_dead = is_masked(self, src);
    const uint64_t word = look(self, src, SignalKind::kDispatch, begun.epoch);
    if (!begun.is_lost && !is_dead) {
      count = await_count(self, src, SignalKind::kDispatch, begun.epoch, word, p.wait_stats);
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

// How many cells came from each source.
MOEBIUS_DEVICE void note_sources(const DispatchRecvParams& p,
                                 const Begun& begun,
                                 bool is_lost,
                                 const RecvShared& shared) {
  int32_t* received = in_workspace<int32_t>(p.self, begun.slot, p.self.layout.num_received);
  for (int src = thread_index(); src < p.self.layout.shape.num_ranks; src += num_threads()) {
    const int n = load(shared.first_cell + src + 1) - load(shared.first_cell + src);
    store(received + src, is_lost ? 0 : n);
    store(p.src_num_tokens + src, is_lost ? 0 : n);
  }
}

MOEBIUS_DEVICE void receive_expert_major(const DispatchRecvParams& p,
                                         const Begun& begun,
                                         const RecvShared& shared) {
  const Shape& s = p.self.layout.shape;
  Mover<ToExperts> mover{shared.mover,
                         {p, begun, shared, {}, 0, -1, -1, -1, 0, 0},
                         s.payload_bytes,
                         Share::of(Place::of_block())};
  const Choices choices{p, begun, shared};
  const int num_choices = choices.num();
  // Before the rows, which it would stand behind in the queue.
  int i = Choices::first();
  Choice ahead{};
  if (i < num_choices) ahead = choices.read(i);
  read_counts(p.self, begun, shared, [&] { mover.start(load(shared.first_cell + s.num_ranks)); });
  const int step = Share::of(Place::of_block()).num_warps * kWarp;
#pragma unroll 1
  while (i < num_choices) {
    choices.note(i, ahead);
    i += step;
    if (i < num_choices) ahead = choices.read(i);
  }
  if (block_index() == num_blocks() - 1) {
    note_sources(p, begun, false, shared);
    for (int expert = thread_index(); expert < s.num_local_experts(); expert += num_threads()) {
      store(p.expert_num_tokens + expert, load(shared.totals + expert));
    }
  }
  sync_block();
  // Nothing fails from here on: the blocks meet while the rows are on their way.
  if (is_bookkeeper()) arrive_received(p.self, begun, Half::kDispatchRecv, shared.ending);
  if (block_index() == 0) note_ranges(p, shared);
  mover.run();
}

// The rows of a Mover: cell i of rank src goes to row src * M + i.
struct ToRows {
  const DispatchRecvParams& p;
  const Begun& begun;
  const RecvShared& shared;
  Scales scales;
  int64_t number;  // of the row in x

  using Found = Cell;
  MOEBIUS_DEVICE Cell find(int row) const {
    return warp_find_cell(p.self, begun.slot, row, shared);
  }
  MOEBIUS_DEVICE void ask(const Cell& cell, bool is_first) {
    number = int64_t{cell.src} * p.self.layout.shape.max_num_tokens + cell.index;
    scales.from = nullptr;
    if (is_first && p.scales != nullptr) scales.read(p, cell.at);
  }
  MOEBIUS_DEVICE void begin(int) const {}
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
                                   const RecvShared& shared) {
  const Shape& s = p.self.layout.shape;
  for (int number = warp_index() * num_blocks() + block_index(); number < num_cells;
       number += kWarpsPerBlock * num_blocks()) {
    const Cell cell = find_cell(p.self, begun.slot, number, shared);
    const int64_t row = int64_t{cell.src} * s.max_num_tokens + cell.index;
    const auto* head = reinterpret_cast<const CellHead*>(cell.at + p.self.layout.head_in_cell);
    if (lane() == 0 && !s.is_reply_row(load(&head->reply_row))) {
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
                                        const RecvShared& shared) {
  const Shape& s = p.self.layout.shape;
  const int num_cells = load(shared.first_cell + s.num_ranks);
  Mover<ToRows> mover{
      shared.mover, {p, begun, shared, {}, 0}, s.payload_bytes, Share::of(Place::of_block())};
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
  if (is_bookkeeper()) arrive_received(p.self, begun, Half::kDispatchRecv, shared.ending);
  mover.run();
}

// Last block: the counts, where they are not known before.
MOEBIUS_DEVICE void finish(const DispatchRecvParams& p,
                           const Begun& begun,
                           const RecvShared& shared) {
  const Rank& self = p.self;
  const Shape& s = self.layout.shape;
  const bool is_lost = (load(&shared.ending->met) & kAnyFailed) != 0;
  if (is_lost) lose(self, Half::kDispatchRecv, begun.epoch);
  if (!is_lost && !self.is_token_major && p.expert_stats == nullptr) return;
  note_sources(p, begun, is_lost, shared);
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

// Before the half, and before a barrier.
MOEBIUS_DEVICE void prepare_receiving(const RecvShared& shared, int num_local) {
  shared.mover.init();
  if (thread_index() == 0) store(&shared.ending->has_failed, 0u);
  for (int i = thread_index(); i < num_local; i += num_threads()) store(shared.totals + i, 0);
}

// The half, of a round that is not stale, by all blocks of the kernel. Leaves in `ending` who came
// last.
MOEBIUS_DEVICE void receive(const DispatchRecvParams& p,
                            const Begun& begun,
                            const RecvShared& shared) {
  const Rank& self = p.self;
  const Shape& s = self.layout.shape;
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

// As many blocks as can have something to do.
inline int blocks_to_receive(const Shape& s, int num_sms) {
  return static_cast<int>(min_of(int64_t{s.num_ranks} * s.max_num_tokens, num_sms));
}

}  // namespace moebius::cuda
