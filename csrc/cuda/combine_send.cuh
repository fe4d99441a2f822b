// Combine, send half.
//
// Postcondition: every row that this rank owes rank s stands in s's combine inbox, at the row that
//   s chose, and then the combine signal of every rank says how many messages of it were answered.
// Parts: at most num_sms. A warp takes a slice of a sum, or a window of a row that only moves.
// Memory: reads expert_out, the own inbox's heads and the workspace; writes the inboxes and signals
//   of all ranks.
// Synchronisation: [arrived] release, by the last block; [all-done].
// Requirements: rows of expert_out 16-byte aligned.
// Cost: reads each expert's row once; writes one row per (token, rank), or per (token, choice)
//   where the weights are not known here.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/replies.cuh"
#include "cuda/sum.cuh"
#include "cuda/turns.cuh"

namespace moebius::cuda {

// expert_major, weights known: the sums that a warp sends, one lane for each choice. They are dealt
// in turn, since they are of one row or of many.
struct Replies {
  const CombineSendParams& p;
  int slot;
  const Wave& wave;
  const ReplyShared& shared;
  int slices, num_vectors;
  int item, end;
  Sum ahead;  // its addresses are on their way while others are summed

  MOEBIUS_DEVICE Replies(const CombineSendParams& params,
                         int slot,
                         const Wave& wave,
                         const ReplyShared& shared)
      : p(params), slot(slot), wave(wave), shared(shared) {
    const int64_t reply_bytes = p.self.layout.shape.reply_bytes;
    slices = num_slices(reply_bytes);
    num_vectors = static_cast<int>(reply_bytes / 16);
    item = wave.begin * slices + wave.share.first;
    end = wave.end * slices;
    find();
  }

  MOEBIUS_DEVICE void find() {
    if (item >= end) return;
    const HeapLayout& layout = p.self.layout;
    const int num_topk = layout.shape.num_topk;
    const Part part = Part::at(item, slices);
    const Reply reply = warp_find_reply(p.self, slot, part.whole, shared);
    const auto* weights = reinterpret_cast<const float*>(reply.cell + layout.weights_in_cell());
    ahead.row = expert_row(p, slot, reply, lane());
    ahead.weight = lane() < num_topk ? load(weights + lane()) : 0.0f;
    ahead.out = reply.row < 0 ? nullptr : place_of(p.self, slot, reply, 0, part.whole, wave);
    ahead.begin = part.part * kSumUnroll * kWarp;
    ahead.end = static_cast<int>(min_of(ahead.begin + kSumUnroll * kWarp, num_vectors));
  }

  MOEBIUS_DEVICE bool next(Sum* sum) {
    while (item < end) {
      *sum = ahead;
      sum->which = ballot(sum->row != nullptr);
      item += wave.share.num_warps;
      find();
      if (sum->out != nullptr) return true;  // null: out of bounds, not sent
    }
    return false;
  }
};

// Rows that only move: token_major, whose experts have summed, and rows of single experts.
struct ToSources {
  const CombineSendParams& p;
  int slot;
  int choices;  // units of a cell
  const ReplyShared& shared;
  Wave wave;
  std::byte* place;

  struct Found {
    const std::byte* at;
  };
  MOEBIUS_DEVICE Found find(int row) const {
    const int unit = wave.begin + row;
    const Reply r = warp_find_reply(p.self, slot, unit / choices, shared);
    if (r.row < 0) return {nullptr};
    if (p.self.is_token_major) return {p.expert_out + r.number * p.row_stride};
    return {expert_row(p, slot, r, unit % choices)};
  }
  MOEBIUS_DEVICE void ask(const Found&, bool) const {}
  MOEBIUS_DEVICE void begin(int row) {
    const int unit = wave.begin + row;
    const Reply r = warp_find_reply(p.self, slot, unit / choices, shared);
    place = place_of(p.self, slot, r, unit % choices, unit, wave);
  }
  MOEBIUS_DEVICE std::byte* to(int n) const { return n == 0 ? place : nullptr; }
  MOEBIUS_DEVICE void finish(bool) const {}
};

MOEBIUS_DEVICE void send_rows(const CombineSendParams& p,
                              int slot,
                              int choices,
                              const Wave& wave,
                              uint32_t* sequence,
                              const ReplyShared& shared) {
  const ToSources rows{p, slot, choices, shared, wave, nullptr};
  Mover<ToSources> mover{shared.mover, rows, p.self.layout.shape.reply_bytes, wave.share};
  mover.requested = mover.served = *sequence;
  mover.start(wave.end - wave.begin);
  mover.run();
  *sequence = mover.served;
  bulk_wait_all();
}

// Statistics: bytes of rows of single experts that this part sends to other ranks.
MOEBIUS_DEVICE void count_rows(const CombineSendParams& p,
                               int slot,
                               int num_units,
                               const Place& place,
                               const ReplyShared& shared) {
  const Rank& self = p.self;
  const int num_topk = self.layout.shape.num_topk;
  int n = 0;
  for (int unit = place.index * num_threads() + thread_index(); unit < num_units;
       unit += num_threads() * place.num) {
    const Reply r = find_reply(self, slot, unit / num_topk, shared);
    const bool is_sent = r.src != self.rank && r.row >= 0;
    n += is_sent && expert_row(p, slot, r, unit % num_topk) != nullptr ? 1 : 0;
  }
  int* sum = shared.counts + ReplyShared::kNumRows;
  if (n != 0) add_shared(sum, n);
  sync_block();
  if (thread_index() == 0 && load(sum) != 0) {
    add_relaxed_gpu(&self.state->remote_bytes, load(sum) * self.layout.shape.reply_bytes);
  }
}

// Last block: the ranks that are reached directly are told, and the books kept.
MOEBIUS_DEVICE void announce(const Rank& self, const Begun& begun, const ReplyShared& shared) {
  for (int i = thread_index(); i < shared.num_direct(); i += num_threads()) {
    const int n = shared.cells_before(i + 1) - shared.cells_before(i);
    // Release: the rows that all blocks have written; and no cell of the round is read here any
    // more. [arrived]
    store_release_sys(
        signal_at(self, load(shared.order + i), begun.slot, self.rank, SignalKind::kCombine),
        signal_word(begun.epoch, static_cast<uint64_t>(n)));
  }
  if (!is_bookkeeper()) return;
  store(&control_of(self, self.rank)->combined[begun.slot], begun.epoch + 1);
  if (!self.layout.shape.has_weights) return;  // then blocks have counted
  const int32_t* received = in_workspace<int32_t>(self, begun.slot, self.layout.num_received);
  const int num_rows = shared.cells_before(shared.num_sources()) - load(received + self.rank);
  add_relaxed_gpu(&self.state->remote_bytes, num_rows * self.layout.shape.reply_bytes);
}

// Whether this rank has been given up by one that it would write to; then the round is lost. By all
// warps but the first.
MOEBIUS_DEVICE void look_for_refusals(const Rank& self,
                                      const Begun& begun,
                                      const ReplyShared& shared) {
  for (int src = thread_index() - kWarp; src < self.layout.shape.num_ranks;
       src += num_threads() - kWarp) {
    if (src == self.rank || is_masked(self, src) || !is_refused_by(self, src)) continue;
    // Its memory may serve other rounds by now.
    store(&shared.ending->has_failed, 1u);
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
}

// One part of the half, of a round that is neither stale nor lost, after a barrier and before one
// until which `ending` says that nothing has failed. `kMoves`: rows only move; else they are summed
// here. `T`: as of dispatch's send_part. `sequence`: of the mover, from part to part.
template <bool kMoves, Dtype kDtype, class T>
MOEBIUS_DEVICE void reply_part(const CombineSendParams& p,
                               const Begun& begun,
                               const Place& place,
                               const T& turns,
                               uint32_t* sequence,
                               const ReplyShared& shared) {
  constexpr bool kIsAlone = std::is_same<T, NoTurns>::value;
  const Rank& self = p.self;
  const Shape& s = self.layout.shape;
  if (warp_index() == 0) {
    order_sources(self, begun.slot, shared);
  } else {
    look_for_refusals(self, begun, shared);
  }
  // What the last round left in the outbox has long left it.
  if (kHasNetwork && s.has_outbox && thread_index() == 0) network_quiet();
  sync_block();
  const int choices = s.has_weights ? 1 : s.num_topk;
  const int num_units = shared.cells_before(shared.num_sources()) * choices;
  // This half waits for no rank: the next kernel cannot keep out what it waits for.
  const bool is_ready = kIsAlone && is_short(num_units * num_slices(s.reply_bytes));
  if (is_ready) let_next_kernel_start();
  // The direct rows, and as many of the others as the outbox holds: all, but for the most uneven
  // routing.
  Wave wave{0, num_units, num_units, true, Share::of(place)};
  if (kHasNetwork) {
    wave.outbox_begin = shared.cells_before(shared.num_direct()) * choices;
    wave.end = static_cast<int>(min_of(num_units, wave.outbox_begin + s.outbox_rows()));
  }
  const auto send = [&]() {
    if constexpr (kMoves) {
      send_rows(p, begun.slot, choices, wave, sequence, shared);
    } else {
      Replies replies(p, begun.slot, wave, shared);
      sum_rows<kDtype, true>(replies);
    }
  };
  if (load(&shared.ending->has_failed) == 0) {
    send();
    if constexpr (kMoves) {
      if (choices != 1) count_rows(p, begun.slot, num_units, place, shared);
    }
  }
  if (kIsAlone && !is_ready) let_next_kernel_start();
  const uint32_t met = meet(self, Half::kCombineSend, place.num, shared.ending, turns);
  if (met == 0) return;
  if ((met & kAnyFailed) != 0) return lose(self, Half::kCombineSend, begun.epoch);
  announce(self, begun, shared);
  if (!kHasNetwork || !s.has_outbox) return;
  wave.begin = wave.outbox_begin;
  for (;;) {
    post_replies(p, begun, choices, wave, shared);
    if (wave.end == num_units) return;
    // What did not fit follows, by this block alone.
    sync_block();
    if (thread_index() == 0) network_quiet();
    sync_block();
    wave.begin = wave.outbox_begin = wave.end;
    wave.end = static_cast<int>(min_of(num_units, wave.begin + s.outbox_rows()));
    wave.is_first = false;
    wave.share = Share::of_block();
    send();
    sync_block();
  }
}

// As many parts as can have something to do: how many cells came is known on the device only.
inline int parts_to_reply(const Shape& s, int num_sms) {
  const int64_t num_items = int64_t{s.num_ranks} * s.max_num_tokens * num_slices(s.reply_bytes);
  return static_cast<int>(min_of(num_items, num_sms));
}
inline bool rows_only_move(const Rank& self) {
  return self.is_token_major || !self.layout.shape.has_weights;
}

}  // namespace moebius::cuda
