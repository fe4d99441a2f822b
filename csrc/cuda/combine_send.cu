// Combine, send half.
//
// Postcondition: every row that this rank owes rank s stands in s's combine inbox, at the row that
// s
//   chose, and then the combine signal of every rank says how many messages of it were answered.
// Grid: at most num_sms blocks. A warp takes a slice of a sum, or a window of a row that only
// moves. Memory: reads expert_out, the own inbox's heads and the workspace; writes the inboxes and
// signals of
//   all ranks.
// Synchronisation: [arrived] release, by the last block; [all-done].
// Requirements: rows of expert_out 16-byte aligned.
// Cost: reads each expert's row once; writes one row per (token, rank), or per (token, choice)
// where
//   the weights are not known here.
#include "cuda/launch.cuh"
#include "cuda/launchers.h"
#include "cuda/mover.cuh"
#include "cuda/sum.cuh"

namespace moebius::cuda {
namespace {

struct Shared {
  MoverShared mover;
  int32_t* first_cell;  // [R + 1] cells of the ranks before
  uint32_t* scratch;
};

MOEBIUS_DEVICE Shared carve(bool has_mover, int num_ranks) {
  Shared shared;
  std::byte* at = shared_memory();
  shared.mover = MoverShared::in(at);
  if (has_mover) at += kMoverSharedBytes;
  shared.first_cell = reinterpret_cast<int32_t*>(at);
  shared.scratch = reinterpret_cast<uint32_t*>(shared.first_cell + num_ranks + 1);
  return shared;
}

// The answer to one cell.
struct Reply {
  int src;
  int64_t number;  // of the cell, in the inbox
  const std::byte* cell;
  int32_t row;  // in the combine inbox of `src`; -1: out of bounds, not sent
};

MOEBIUS_DEVICE Reply find_reply(const Rank& self, int slot, int number, const Shared& shared) {
  const Shape& s = self.layout.shape;
  int src = 0;
  while (load(shared.first_cell + src + 1) <= number) ++src;  // ranks are few
  const int index = number - load(shared.first_cell + src);
  Reply r;
  r.src = src;
  r.number = int64_t{src} * s.max_num_tokens + index;
  r.cell = self.heap + self.layout.cell(slot, src, index);
  r.row = load(&reinterpret_cast<const CellHead*>(r.cell + self.layout.head_in_cell)->reply_row);
  // Seen to be in bounds when it was received; a peer can write here all the same.
  const int64_t last = int64_t{r.row} + (s.has_weights ? 0 : s.num_topk - 1);
  if (r.row < 0 || last >= s.max_num_tokens * s.replies_per_token()) r.row = -1;
  return r;
}

// Where this lane's choice of a cell was put: address in expert_out, or null.
MOEBIUS_DEVICE const std::byte* expert_row(const CombineSendParams& p,
                                           int slot,
                                           const Reply& reply,
                                           int choice) {
  const Shape& s = p.self.layout.shape;
  if (choice >= s.num_topk) return nullptr;
  const int32_t* rows = in_workspace<int32_t>(p.self, slot, p.self.layout.cell_rows);
  const int32_t at = load(rows + reply.number * s.num_topk + choice);
  if (at < 0) return nullptr;
  const int num_rows = s.num_ranks * s.max_num_tokens;
  return p.expert_out + at / num_rows * p.expert_stride + at % num_rows * p.row_stride;
}

// What a sum is made of, one lane for each choice.
struct Sum {
  std::byte* out;        // null: out of bounds, not sent
  const std::byte* row;  // null: not here
  float weight;
};

MOEBIUS_DEVICE Sum find_sum(const CombineSendParams& p,
                            int slot,
                            int number,
                            const Shared& shared) {
  const HeapLayout& layout = p.self.layout;
  const int num_topk = layout.shape.num_topk;
  const Reply reply = find_reply(p.self, slot, number, shared);
  Sum sum{nullptr, expert_row(p, slot, reply, lane()), 0.0f};
  const auto* weights = reinterpret_cast<const float*>(reply.cell + layout.head_in_cell +
                                                       sizeof(CellHead) + 4 * int64_t{num_topk});
  if (lane() < num_topk) sum.weight = load(weights + lane());
  if (reply.row >= 0) {
    sum.out = in_heap<std::byte>(p.self, reply.src, layout.reply(slot, reply.row));
  }
  return sum;
}

// expert_major, weights known: sums of the experts' rows.
template <Dtype kDtype>
MOEBIUS_DEVICE void send_sums(const CombineSendParams& p, int slot, const Shared& shared) {
  const Shape& s = p.self.layout.shape;
  const int slices = num_slices(s.reply_bytes);
  const int num_vectors = static_cast<int>(s.reply_bytes / 16);
  const int num_items = load(shared.first_cell + s.num_ranks) * slices;
  const int step = kWarpsPerBlock * num_blocks();
  int item = warp_index() * num_blocks() + block_index();
  Sum ahead{nullptr, nullptr, 0.0f};
  if (item < num_items) ahead = find_sum(p, slot, item / slices, shared);
  for (; item < num_items; item += step) {
    const Sum sum = ahead;
    // On its way while this one is summed.
    if (item + step < num_items) ahead = find_sum(p, slot, (item + step) / slices, shared);
    if (sum.out == nullptr) continue;
    const int begin = item % slices * kUnroll * kWarp;
    const int end = static_cast<int>(min_of(begin + kUnroll * kWarp, num_vectors));
    const uint32_t which = ballot(sum.row != nullptr);
    sum_rows<kDtype, true>(sum.out, sum.row, sum.weight, which, begin, end);
  }
}

// Rows that only move: token_major, whose experts have summed, and rows of single experts.
struct ToSources {
  const CombineSendParams& p;
  int slot;
  int choices;  // rows of a cell
  const Shared& shared;
  std::byte* reply;

  MOEBIUS_DEVICE const std::byte* from(int row) const {
    const Reply r = find_reply(p.self, slot, row / choices, shared);
    if (r.row < 0) return nullptr;
    if (p.self.is_token_major) return p.expert_out + r.number * p.row_stride;
    return expert_row(p, slot, r, row % choices);
  }
  MOEBIUS_DEVICE void begin(int row) {
    const Reply r = find_reply(p.self, slot, row / choices, shared);
    const int64_t at = p.self.layout.reply(slot, r.row + row % choices);
    reply = in_heap<std::byte>(p.self, r.src, at);
  }
  MOEBIUS_DEVICE std::byte* to(int n) const { return n == 0 ? reply : nullptr; }
};

MOEBIUS_DEVICE void send_rows(const CombineSendParams& p, int slot, const Shared& shared) {
  const Shape& s = p.self.layout.shape;
  const int choices = s.has_weights ? 1 : s.num_topk;
  Mover<ToSources> mover{shared.mover, {p, slot, choices, shared, nullptr}, s.reply_bytes};
  mover.start(load(shared.first_cell + s.num_ranks) * choices);
  mover.run();
  bulk_wait_all();
}

// Last block.
MOEBIUS_DEVICE void announce(const Rank& self, const Begun& begun, const Shared& shared) {
  if (has_failed(self, begun.epoch)) return lose(self, Half::kCombineSend, begun.epoch);
  const Shape& s = self.layout.shape;
  for (int dst = thread_index(); dst < s.num_ranks; dst += num_threads()) {
    if (is_masked(self, dst)) continue;
    const int n = load(shared.first_cell + dst + 1) - load(shared.first_cell + dst);
    // Release: the rows that all blocks have written; and no cell of the round is read here any
    // more. [arrived]
    store_release_sys(signal_at(self, dst, begun.slot, self.rank, SignalKind::kCombine),
                      signal_word(begun.epoch, static_cast<uint64_t>(n)));
  }
  if (thread_index() != 0) return;
  store(&control_of(self, self.rank)->combined[begun.slot], begun.epoch + 1);
}

// `kMoves`: rows only move; else they are summed here.
template <bool kMoves, Dtype kDtype>
MOEBIUS_KERNEL(kThreadsPerBlock)
combine_send_kernel(MOEBIUS_PARAMS CombineSendParams p) {
  const Rank& self = p.self;
  const Shape& s = self.layout.shape;
  const Shared shared = carve(kMoves, s.num_ranks);
  if constexpr (kMoves) shared.mover.init();
  if (thread_index() == 0) store(shared.scratch, 0u);
  sync_block();
  wait_for_previous_kernel();
  const Begun begun = begin_half(self, p.handle, Half::kCombineSend);
  if (begun.is_stale || begun.is_lost) return;
  const int32_t* num_received = in_workspace<int32_t>(self, begun.slot, self.layout.num_received);
  if (thread_index() == 0) {
    int sum = 0;
    store(shared.first_cell, 0);
    for (int src = 0; src < s.num_ranks; ++src) {
      if (!is_masked(self, src)) sum += load(num_received + src);
      store(shared.first_cell + src + 1, sum);
    }
  }
  for (int src = thread_index(); src < s.num_ranks; src += num_threads()) {
    if (src == self.rank || is_masked(self, src) || !is_refused_by(self, src)) continue;
    // Its memory may serve other rounds by now.
    store(shared.scratch, 1u);
    fail(self,
         begun.epoch,
         FaultKind::kTimeout,
         Reason::kReported,
         self.rank,
         src,
         begun.epoch,
         0,
         0);
  }
  sync_block();
  const bool may_send = load(shared.scratch) == 0;
  if constexpr (kMoves) {
    if (may_send) send_rows(p, begun.slot, shared);
  } else {
    if (may_send) send_sums<kDtype>(p, begun.slot, shared);
  }
  let_next_kernel_start();
  if (is_last_block(self, Half::kCombineSend, shared.scratch + 1)) announce(self, begun, shared);
}

template <bool kMoves, Dtype kDtype>
void enqueue(const CombineSendParams& params, int num_sms, Stream stream) {
  const Shape& s = params.self.layout.shape;
  const size_t bytes =
      (kMoves ? kMoverSharedBytes : 0) + 4 * (static_cast<size_t>(s.num_ranks) + 3);
  // As many cells as can come: how many did is known on the device only.
  const int64_t num_items = int64_t{s.num_ranks} * s.max_num_tokens * num_slices(s.reply_bytes);
  launch(combine_send_kernel<kMoves, kDtype>,
         LaunchShape{static_cast<int>(min_of(num_items, num_sms)), kThreadsPerBlock, bytes},
         params,
         stream);
}

}  // namespace

void launch_combine_send(const CombineSendParams& params, int num_sms, Stream stream) {
  if (params.self.is_token_major || !params.self.layout.shape.has_weights) {
    return enqueue<true, Dtype::kBf16>(params, num_sms, stream);
  }
  switch (params.self.output_dtype) {
    case Dtype::kBf16:
      return enqueue<false, Dtype::kBf16>(params, num_sms, stream);
    case Dtype::kFp16:
      return enqueue<false, Dtype::kFp16>(params, num_sms, stream);
    case Dtype::kFp32:
      return enqueue<false, Dtype::kFp32>(params, num_sms, stream);
  }
}

}  // namespace moebius::cuda
