// Combine, receive half.
//
// Postcondition: out[t] = sum of t's rows in fp32, ascending rank (or ascending choice, with
//   weights given here), rounded once; zeros for a token that went nowhere.
// Grid: at most num_sms blocks. A warp takes a slice of a token.
// Memory: reads the own combine inbox and the workspace; writes out. Nothing remote.
// Synchronisation: [arrived] acquire, by every block, of the ranks that owe rows; [all-done].
// Requirements: rows of out 16-byte aligned.
// Cost: reads each reply once, writes each row of out once.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/sum.cuh"

namespace moebius::cuda {

// Waits for the rows that rank `src` owes; false when they will not come.
MOEBIUS_DEVICE bool await_rows(const CombineRecvParams& p, const Begun& begun, int src) {
  const Rank& self = p.self;
  // All of this is on its way together.
  const int owed = load(in_workspace<int32_t>(self, begun.slot, self.layout.num_sent) + src);
  const bool is_dead = is_masked(self, src);
  const uint64_t word = look(self, src, SignalKind::kCombine, begun.epoch);
  // The closing wait will look for the signal of one that owes nothing. The own one says whether
  // the round was lost meanwhile.
  if (owed == 0 && src != self.rank) return true;
  if (is_dead && !signal_arrived(word, begun.epoch)) {
    // Given up after it was sent to. What it said before still holds.
    return fail(
        self, begun.epoch, FaultKind::kTimeout, Reason::kDeadline, src, -1, begun.epoch, word, 0);
  }
  const int64_t count =
      await_count(self, src, SignalKind::kCombine, begun.epoch, word, p.wait_stats);
  if (count < 0) return false;
  if (count == owed) return true;
  return fail(self,
              begun.epoch,
              FaultKind::kProtocol,
              Reason::kDeadline,
              src,
              -1,
              begun.epoch,
              signal_word(begun.epoch, 0),
              0);
}

// The sums that a warp makes, one lane for each reply to a token.
template <bool kHasWeights>
struct TokenSums {
  const CombineRecvParams& p;
  int slot;
  int num_valid;  // tokens that were sent
  int unroll;     // vectors a lane of a slice
  int slices, num_items, num_vectors, replies;
  const int32_t* reply_rows;
  int item;
  int32_t row = -1;  // on its way while others are summed
  float weight = 1.0f;

  MOEBIUS_DEVICE TokenSums(const CombineRecvParams& params, int slot, int num_valid, int unroll)
      : p(params), slot(slot), num_valid(num_valid), unroll(unroll) {
    const HeapLayout& layout = p.self.layout;
    slices = num_slices(layout.shape.reply_bytes, unroll);
    num_items = static_cast<int>(p.num_tokens) * slices;
    num_vectors = static_cast<int>(layout.shape.reply_bytes / 16);
    replies = static_cast<int>(layout.shape.replies_per_token());
    reply_rows = in_workspace<int32_t>(p.self, slot, layout.reply_rows);
    item = Share::of(Place::of_block()).first;
    find();
  }

  MOEBIUS_DEVICE void find() {
    const int token = item / slices;
    const bool is_there = item < num_items && token < num_valid && lane() < replies;
    row = is_there ? load(reply_rows + token * replies + lane()) : -1;
    if (kHasWeights && is_there) {
      weight = load(p.topk_weights + token * p.self.layout.shape.num_topk + lane());
    }
  }

  MOEBIUS_DEVICE bool next(Sum* sum) {
    if (item >= num_items) return false;
    const Part part = Part::at(item, slices);
    sum->out = p.out + part.whole * p.out_stride;
    sum->row = row >= 0 ? p.self.heap + p.self.layout.reply(slot, row) : nullptr;
    sum->weight = weight;
    sum->which = ballot(row >= 0);
    sum->begin = part.part * unroll * kWarp;
    sum->end = static_cast<int>(min_of(sum->begin + unroll * kWarp, num_vectors));
    item += Share::of(Place::of_block()).num_warps;
    find();
    return true;
  }
};

// The half, of a round that is not stale, by all blocks of the kernel, after a barrier.
template <Dtype kDtype, bool kHasWeights>
MOEBIUS_DEVICE void add_replies(const CombineRecvParams& p, const Begun& begun, Ending* ending) {
  const Rank& self = p.self;
  const HeapLayout& layout = self.layout;
  const Shape& s = layout.shape;
  const int num_sent = load(in_workspace<int32_t>(self, begun.slot, layout.num_sent) + s.num_ranks);
  for (int src = thread_index(); !begun.is_lost && src < s.num_ranks; src += num_threads()) {
    if (!await_rows(p, begun, src)) store(&ending->has_failed, 1u);
  }
  sync_block();
  // So few that each warp has one narrow slice at most: then it is their latency that counts.
  const int num_tokens = static_cast<int>(p.num_tokens);
  const bool is_narrow = is_short(num_tokens * num_slices(s.reply_bytes, 1));
  // From here on this kernel waits for no rank: the next one cannot keep out what it waits for. And
  // nothing fails any more: the blocks meet while the rows are on their way.
  const bool is_ready = is_narrow || is_short(num_tokens * num_slices(s.reply_bytes));
  if (is_ready) let_next_kernel_start();
  if (is_bookkeeper()) arrive_received(self, begun, Half::kCombineRecv, ending);
  const bool is_lost = begun.is_lost || load(&ending->has_failed) != 0;
  TokenSums<kHasWeights> sums(p, begun.slot, is_lost ? 0 : num_sent, is_narrow ? 1 : kSumUnroll);
  if (is_narrow) {
    sum_narrow_rows<kDtype, kHasWeights>(sums);
  } else {
    sum_rows<kDtype, kHasWeights>(sums);
  }
  if (!is_ready) let_next_kernel_start();
  sync_block();
  if ((load(&ending->met) & kAnyFailed) != 0) lose(self, Half::kCombineRecv, begun.epoch);
}

// As many blocks as can have something to do.
inline int blocks_to_add(const CombineRecvParams& params, int num_sms) {
  const int64_t num_items = params.num_tokens * num_slices(params.self.layout.shape.reply_bytes, 1);
  return static_cast<int>(num_items < 1 ? 1 : min_of(num_items, num_sms));
}

}  // namespace moebius::cuda
