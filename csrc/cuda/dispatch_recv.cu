// Dispatch, receive half.
//
// Postcondition, expert_major: the rows of local expert l are the tokens routed to it, in the order
//   (source rank, token), and cell_rows says where each (cell, choice) went. token_major: row
//   src * M + i is cell i of rank src, with its local experts and weights, and -1 where there is
//   none.
// Grid: at most num_sms blocks. A warp takes a window of a cell; each block works out all
// positions. Memory: reads the own inbox; writes the results and the workspace. Nothing remote.
// Synchronisation: [arrived] acquire, by every block; [all-done].
// Requirements: x 16-byte aligned.
// Cost: each received row is read once and written once for each of its local experts.
#include "cuda/launch.cuh"
#include "cuda/launchers.h"
#include "cuda/mover.cuh"
#include "cuda/positions.cuh"
#include "cuda/scales.cuh"

namespace moebius::cuda {
namespace {

struct RecvLaunch {
  DispatchRecvParams args;
  int num_words;  // of the positions
};

struct Shared {
  MoverShared mover;
  int32_t* rows;  // of this warp: where one cell goes
  Positions positions;
  int32_t* first_cell;  // [R + 1] cells of the ranks before; the last is their number
  Ending* ending;
};

constexpr size_t kRowsBytes = kWarpsPerBlock * kMaxTopk * sizeof(int32_t);

MOEBIUS_DEVICE Shared carve(const Shape& s, bool is_token_major, int num_words) {
  Shared shared;
  std::byte* at = shared_memory();
  shared.mover = MoverShared::in(at);
  at += kMoverSharedBytes;
  shared.rows = reinterpret_cast<int32_t*>(at) + warp_index() * kMaxTopk;
  at += kRowsBytes;
  const int num_local = s.num_local_experts();
  shared.positions = Positions::in(at, num_local, is_token_major ? 0 : num_words);
  at += positions_bytes(num_local, is_token_major ? 0 : num_words);
  shared.first_cell = reinterpret_cast<int32_t*>(at);
  shared.ending = reinterpret_cast<Ending*>(shared.first_cell + s.num_ranks + 1);
  return shared;
}
size_t shared_bytes(const Shape& s, bool is_token_major, int num_words) {
  return kMoverSharedBytes + kRowsBytes +
         positions_bytes(s.num_local_experts(), is_token_major ? 0 : num_words) +
         4 * (static_cast<size_t>(s.num_ranks) + 3);
}

// One received cell, as a warp sees it.
struct Cell {
  int src;
  int index;  // among those of its source
  const std::byte* at;
};

MOEBIUS_DEVICE const int32_t* ids_of(const Rank& self, const std::byte* cell) {
  return reinterpret_cast<const int32_t*>(cell + self.layout.head_in_cell + sizeof(CellHead));
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
MOEBIUS_DEVICE bool is_sane(const Rank& self, const std::byte* cell) {
  const Shape& s = self.layout.shape;
  const auto* head = reinterpret_cast<const CellHead*>(cell + self.layout.head_in_cell);
  const int32_t reply_row = load(&head->reply_row);
  const int64_t last = reply_row + (s.has_weights ? 0 : s.num_topk - 1);
  return reply_row >= 0 && last < s.max_num_tokens * s.replies_per_token();
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

constexpr int kPairsAhead = 4;

// expert_major: puts the cells of [begin, end) into the lists of their experts, which have to be
// counted next. A thread for each cell, so that it is found once.
MOEBIUS_DEVICE void list_cells(
    const Rank& self, const Begun& begun, int begin, int end, const Shared& shared) {
  static_assert(sizeof(CellHead) == sizeof(uint64_t), "pairs of ids are aligned");
  const Shape& s = self.layout.shape;
  const int num_local = s.num_local_experts();
  const int num_pairs = (s.num_topk + 1) / 2;
  shared.positions.clear();
  sync_block();
#pragma unroll 1
  for (int number = begin + thread_index(); number < end; number += num_threads()) {
    const Cell cell = find_cell(self, begun.slot, number, shared);
    const auto* pairs = reinterpret_cast<const uint64_t*>(ids_of(self, cell.at));
    bool is_good = is_sane(self, cell.at);
#pragma unroll 1
    for (int first = 0; first < num_pairs; first += kPairsAhead) {
      uint64_t ids[kPairsAhead];  // on their way together
#pragma unroll
      for (int i = 0; i < kPairsAhead; ++i) {
        ids[i] = first + i < num_pairs ? load(pairs + first + i) : ~uint64_t{0};
        // What follows the last id is none.
        if (2 * (first + i) + 1 == s.num_topk) ids[i] |= ~uint64_t{0} << 32;
      }
#pragma unroll
      for (int i = 0; i < 2 * kPairsAhead; ++i) {
        const auto id = static_cast<int32_t>(ids[i / 2] >> (i % 2 * 32));
        if (id < -1 || id >= num_local) {
          is_good = false;
        } else if (id >= 0) {
          shared.positions.mark(id, number - begin);
        }
      }
    }
    if (!is_good) fail_cell(self, begun.epoch, cell.src);
  }
  sync_block();
}

// expert_major. Fills this warp's `rows` with where cell `item` of the chunk goes: expert * R * M +
// row; returns how many.
MOEBIUS_DEVICE int find_rows(const Shape& s, int item, const Shared& shared) {
  const Positions& positions = shared.positions;
  int count = 0;
  sync_warp();
  for (int first = 0; first < positions.num_columns; first += kWarp) {
    const int expert = first + lane();
    const bool is_there = expert < positions.num_columns && positions.has(expert, item);
    const uint32_t which = ballot(is_there);
    if (is_there) {
      store(shared.rows + count + popcount(which & ((1u << lane()) - 1)),
            expert * s.num_ranks * s.max_num_tokens + positions.find(expert, item));
    }
    count += popcount(which);
  }
  sync_warp();
  return count;
}

// The rows of a Mover: a cell goes to each of its experts.
struct ToExperts {
  const DispatchRecvParams& p;
  const Begun& begun;
  const Shared& shared;
  int chunk_begin;
  int num_rows;
  Scales scales;

  MOEBIUS_DEVICE const std::byte* from(int row) const {
    return find_cell(p.self, begun.slot, chunk_begin + row, shared).at;
  }
  MOEBIUS_DEVICE void begin(int row, bool is_first) {
    scales.from = nullptr;
    if (is_first && p.scales != nullptr) scales.read(p, from(row));
    num_rows = find_rows(p.self.layout.shape, row, shared);
  }
  MOEBIUS_DEVICE std::byte* to(int n) const {
    if (n >= num_rows) return nullptr;
    return p.x + load(shared.rows + n) * p.self.layout.shape.payload_bytes;
  }
  MOEBIUS_DEVICE void finish(bool is_first) const {
    if (!is_first || scales.from == nullptr) return;
    const int rows_of_expert = p.self.layout.shape.num_ranks * p.self.layout.shape.max_num_tokens;
    for (int n = 0; n < num_rows; ++n) {
      const int32_t at = load(shared.rows + n);
      scales.write(p, at / rows_of_expert, at % rows_of_expert);
    }
  }
};

// What is noted of each row of the cells [begin, end): a thread for each (cell, choice).
MOEBIUS_DEVICE void describe_rows(
    const DispatchRecvParams& p, const Begun& begun, int begin, int end, const Shared& shared) {
  const Shape& s = p.self.layout.shape;
  const int num_rows = s.num_ranks * s.max_num_tokens;
  int32_t* rows = in_workspace<int32_t>(p.self, begun.slot, p.self.layout.cell_rows);
  const int num_choices = (end - begin) * s.num_topk;
  for (int i = block_index() * num_threads() + thread_index(); i < num_choices;
       i += num_blocks() * num_threads()) {
    const int item = i / s.num_topk, choice = i % s.num_topk;
    const Cell cell = find_cell(p.self, begun.slot, begin + item, shared);
    const int32_t id = load(ids_of(p.self, cell.at) + choice);
    const auto* head = reinterpret_cast<const CellHead*>(cell.at + p.self.layout.head_in_cell);
    const int32_t token = load(&head->token);
    const bool is_here = id >= 0 && id < s.num_local_experts();
    const int32_t at = is_here ? id * num_rows + shared.positions.find(id, item) : -1;
    const int64_t inbox = int64_t{cell.src} * s.max_num_tokens + cell.index;
    store(rows + inbox * s.num_topk + choice, at);
    if (is_here) store(p.src_info + at, token);
  }
}

// Block 0: the rows of each (expert, source), as far as its cells begin or end in this chunk.
MOEBIUS_DEVICE void note_ranges(
    const DispatchRecvParams& p, int begin, int end, bool is_final, const Shared& shared) {
  const Shape& s = p.self.layout.shape;
  for (int i = thread_index(); i < s.num_experts; i += num_threads()) {
    const int expert = i / s.num_ranks, src = i % s.num_ranks;
    const int first = load(shared.first_cell + src), last = load(shared.first_cell + src + 1);
    const auto rows_before = [&](int cell) {
      return cell < end ? shared.positions.find(expert, cell - begin)
                        : load(shared.positions.totals + expert);
    };
    int64_t* range = p.layout_range + i;
    const bool begins = first >= begin && (first < end || is_final);
    const bool ends = first < last && last > begin && last <= end;
    int64_t from = 0;
    if (begins) {
      from = rows_before(first);
    } else if (ends) {
      from = load(range) >> 32;  // of a chunk before
    }
    if (begins || ends) store(range, from << 32 | (ends ? rows_before(last) - from : 0));
  }
}

MOEBIUS_DEVICE void receive_expert_major(const RecvLaunch& l,
                                         const Begun& begun,
                                         const Shared& shared) {
  const DispatchRecvParams& p = l.args;
  const Shape& s = p.self.layout.shape;
  const int num_cells = load(shared.first_cell + s.num_ranks);
  const int chunk = l.num_words * 32;
  Mover<ToExperts> mover{
      shared.mover, {p, begun, shared, 0, 0, {}}, s.payload_bytes, Share::of_grid()};
  for (int begin = 0;;) {
    const int end = static_cast<int>(min_of(begin + chunk, num_cells));
    mover.rows.chunk_begin = begin;
    list_cells(p.self, begun, begin, end, shared);
    // Not before: what the list is made from would stand behind these loads in the queue.
    mover.start(end - begin);
    shared.positions.count();
    sync_block();
    // Nothing fails from here on: the blocks meet while the rows are on their way.
    if (end == num_cells && is_bookkeeper()) arrive(p.self, Half::kDispatchRecv, shared.ending);
    describe_rows(p, begun, begin, end, shared);
    if (block_index() == 0) note_ranges(p, begin, end, end == num_cells, shared);
    mover.run();
    if (end == num_cells) return;
    begin = end;
    sync_block();
  }
}

// The rows of a Mover: cell i of rank src goes to row src * M + i.
struct ToRows {
  const DispatchRecvParams& p;
  const Begun& begun;
  const Shared& shared;
  int64_t number;  // of the row in x
  Scales scales;

  MOEBIUS_DEVICE const std::byte* from(int row) const {
    return find_cell(p.self, begun.slot, row, shared).at;
  }
  MOEBIUS_DEVICE void begin(int row, bool is_first) {
    const Shape& s = p.self.layout.shape;
    const Cell cell = find_cell(p.self, begun.slot, row, shared);
    number = int64_t{cell.src} * s.max_num_tokens + cell.index;
    scales.from = nullptr;
    if (is_first && p.scales != nullptr) scales.read(p, cell.at);
  }
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
    if (lane() == 0 && !is_sane(p.self, cell.at)) fail_cell(p.self, begun.epoch, cell.src);
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
    if (is_first) add_shared(shared.positions.totals + id, 1);
    if (lane() < s.num_topk) {
      const auto* weights = reinterpret_cast<const float*>(ids + s.num_topk);
      store(p.topk_ids + row * s.num_topk + lane(), id);
      store(p.topk_weights + row * s.num_topk + lane(), load(weights + lane()));
    }
  }
}

MOEBIUS_DEVICE void receive_token_major(const RecvLaunch& l,
                                        const Begun& begun,
                                        const Shared& shared) {
  const DispatchRecvParams& p = l.args;
  const Shape& s = p.self.layout.shape;
  const int num_cells = load(shared.first_cell + s.num_ranks);
  Mover<ToRows> mover{shared.mover, {p, begun, shared, 0, {}}, s.payload_bytes, Share::of_grid()};
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
    const int n = load(shared.positions.totals + expert);
    if (n != 0) add_relaxed_gpu(p.self.expert_counts + expert, n);
  }
  sync_block();
  if (is_bookkeeper()) arrive(p.self, Half::kDispatchRecv, shared.ending);
  mover.run();
}

// Last block: the counts, which only now are known for all blocks.
MOEBIUS_DEVICE void finish(const RecvLaunch& l, const Begun& begun, const Shared& shared) {
  const DispatchRecvParams& p = l.args;
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
    int n = load(shared.positions.totals + expert);
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

MOEBIUS_KERNEL(kThreadsPerBlock) dispatch_recv_kernel(MOEBIUS_PARAMS RecvLaunch l) {
  const DispatchRecvParams& p = l.args;
  const Rank& self = p.self;
  const Shape& s = self.layout.shape;
  const Shared shared = carve(s, self.is_token_major, l.num_words);
  shared.mover.init();
  if (thread_index() == 0) store(&shared.ending->has_failed, 0u);
  shared.positions.clear_totals();
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
    receive_token_major(l, begun, shared);
  } else {
    receive_expert_major(l, begun, shared);
  }
  bulk_wait_all();
  if (!is_ready) let_next_kernel_start();
  sync_block();
  if (load(&shared.ending->met) != 0) finish(l, begun, shared);
}

}  // namespace

void launch_dispatch_recv(const DispatchRecvParams& params, int num_sms, Stream stream) {
  const Shape& s = params.self.layout.shape;
  const int64_t num_cells = int64_t{s.num_ranks} * s.max_num_tokens;
  RecvLaunch l;
  l.args = params;
  l.num_words = positions_words(num_cells, s.num_local_experts());
  const int num_blocks = static_cast<int>(min_of(num_cells, num_sms));
  launch(
      dispatch_recv_kernel,
      LaunchShape{
          num_blocks, kThreadsPerBlock, shared_bytes(s, params.self.is_token_major, l.num_words)},
      l,
      stream);
}

}  // namespace moebius::cuda
