// Dispatch, send half.
//
// Postcondition: cell (slot, me, i) at rank d holds the i-th of my tokens that has an expert on d,
//   for all i < n, then the dispatch signal of d says n. expert_major: before that, counts (slot,
//   me) at d say how many of them each of its experts gets, and each cell where it comes among
//   them.
// Parts: at most num_sms. A warp takes a slice of a token; each part works out all positions.
// Memory: reads x, topk_ids, topk_weights; writes the cells and signals of all ranks, and what the
//   later halves need into the workspace.
// Synchronisation: [arrived] release, by the last block; [all-done]; the closing wait of round
//   e - D.
// Requirements: rows of x 16-byte aligned.
// Cost: each row of x is read once, and written once to each rank that has one of its experts.
#pragma once

#include <type_traits>

#include "cuda/destinations.cuh"
#include "cuda/launch.cuh"
#include "cuda/payload.cuh"
#include "cuda/turns.cuh"
#include "cuda/work.cuh"

namespace moebius::cuda {

struct SendLaunch {
  DispatchSendParams args;
  int num_words;    // of the positions
  int num_units;    // of a token; see out_unit
  int num_slices;   // of a token
  int slice_units;  // of a slice
  int num_parts;    // that it is dealt out in
};

MOEBIUS_DEVICE int64_t count_valid(const DispatchSendParams& p) {
  if (p.num_valid_tokens == nullptr) return p.num_tokens;
  const int64_t n = p.has_int64_valid
                        ? load(static_cast<const int64_t*>(p.num_valid_tokens))
                        : int64_t{load(static_cast<const int32_t*>(p.num_valid_tokens))};
  return n < 0 ? 0 : min_of(n, p.num_tokens);
}

// Reads what does not change while the kernel runs.
MOEBIUS_DEVICE void read_ranks(const Rank& self, const SendShared& shared) {
#pragma unroll 1
  for (int r = thread_index(); r < self.layout.shape.num_ranks; r += num_threads()) {
    store(shared.heaps + r, r == self.rank ? self.heap : load(self.heaps + r));
    store(shared.is_alive + r, is_masked(self, r) ? 0 : 1);
  }
}

// The warp that sees to the slot while the others begin to list the tokens: that which has the
// least to send.
MOEBIUS_DEVICE bool is_taker() { return warp_index() == kWarpsPerBlock - 1; }

// Makes sure that round `epoch - D`, which had the slot, is closed; else notes the failure. By one
// warp. `combined`: 1 + the last round of the slot that this rank combined.
MOEBIUS_DEVICE void take_slot(
    const Rank& self, uint64_t epoch, int slot, uint64_t combined, const SendShared& shared) {
  const int num_ranks = self.layout.shape.num_ranks;
  const uint64_t depth = static_cast<uint64_t>(self.layout.shape.depth);
  const uint64_t closed = epoch - depth;
  const bool has_last = epoch >= depth;
  if (has_last && combined != closed + 1) {
    // Never combined: the empty combine, by the block that comes first. The others wait for the
    // peers' at once, and need not be resident together with any.
    uint64_t before = 0;
    if (lane() == 0) before = exchange_max_gpu(&self.state->closed[slot], closed + 1);
    const bool is_first = shfl(before, 0) != closed + 1;
#pragma unroll 1
    for (int dst = lane(); is_first && dst < num_ranks; dst += kWarp) {
      if (load(shared.is_alive + dst) == 0) continue;
      send_signal(self, dst, slot, SignalKind::kCombine, signal_word(closed, 0));
    }
  }
#pragma unroll 1
  for (int src = lane(); src < num_ranks; src += kWarp) {
    if (load(shared.is_alive + src) == 0) continue;
    if (src == self.rank) continue;
    // Both are on their way together.
    const bool is_refused = is_refused_by(self, src);
    // Pairs with [arrived] of combine send: it has read what we sent it in that round.
    uint64_t word = load_acquire_sys(signal_at(self, self.rank, slot, src, SignalKind::kCombine));
    bool is_closed = true;
    if (is_refused) {
      // Its memory may serve other rounds by now.
      is_closed =
          fail(self, epoch, FaultKind::kTimeout, Reason::kReported, self.rank, src, epoch, 0, 0);
    } else if (has_last) {
      if (!signal_arrived(word, closed)) {
        word = spin(self, src, SignalKind::kCombine, closed, epoch);
      }
      is_closed = signal_arrived(word, closed);
      if (is_closed && signal_epoch(word) != closed && !signal_is_abort(word)) {
        is_closed =
            fail(self, epoch, FaultKind::kProtocol, Reason::kDeadline, src, -1, closed, word, 0);
      }
    }
    if (!is_closed) store(&shared.ending->has_failed, 1u);
  }
}

// Asks for the first choice, of the tokens of [begin, end), that this thread lists.
MOEBIUS_DEVICE int32_t ask_first(const DispatchSendParams& p, int begin, int end) {
  const int num_topk = p.self.layout.shape.num_topk;
  const int64_t at = int64_t{begin} * num_topk + thread_index();
  return at < int64_t{end} * num_topk ? id_at(p, at) : -1;
}

// Puts the tokens of [begin, end) into their lists, which are empty: by the first `num_listing`
// threads. `next`: what ask_first gave.
MOEBIUS_DEVICE void mark_tokens(const DispatchSendParams& p,
                                uint64_t epoch,
                                int begin,
                                int end,
                                int num_listing,
                                int32_t next,
                                const SendShared& shared) {
  const Shape& s = p.self.layout.shape;
  const int num_local = s.num_local_experts();
  const int64_t base = int64_t{begin} * s.num_topk;
  const int num_choices = (end - begin) * s.num_topk;
#pragma unroll 1
  for (int i = thread_index(); i < num_choices; i += num_listing) {
    const int token = i / s.num_topk;
    const int64_t at = base + i;
    const int32_t id = next;
    if (i + num_listing < num_choices) next = id_at(p, at + num_listing);
    if (id < -1 || id >= s.num_experts) {
      // The first of them is recorded, by the last block.
      const uint64_t place = kMostChoices - static_cast<uint64_t>(min_of(at, kMostChoices));
      exchange_max_gpu(&p.self.state->bad_choice, (epoch + 1) << kCountBits | place);
    } else if (id >= 0 && load(shared.is_alive + id / num_local) != 0) {
      shared.positions.mark(id / num_local, token);
      if (s.has_positions) shared.positions.mark(s.num_ranks + id, token);
    }
  }
}

MOEBIUS_DEVICE void list_tokens(
    const DispatchSendParams& p, uint64_t epoch, int begin, int end, const SendShared& shared) {
  shared.positions.clear();
  sync_block();
  mark_tokens(p, epoch, begin, end, num_threads(), ask_first(p, begin, end), shared);
  sync_block();
  shared.positions.count();
  sync_block();
}

// The scales that were made of units [begin, end).
MOEBIUS_DEVICE void send_scales(
    const Rank& self, int begin, int end, const float* scales, std::byte* cell) {
  std::byte* to = cell + self.layout.scales_in_cell;
  const int first = begin / kGroupUnits;
#pragma unroll 1
  for (int g = lane(); g < (end - begin) / kGroupUnits; g += kWarp) {
    const float scale = load(scales + g);
    if (self.scale_format == ScaleFormat::kUe8m0) {
      store(reinterpret_cast<uint8_t*>(to) + first + g, static_cast<uint8_t>(bits_of(scale)));
    } else {
      store(reinterpret_cast<float*>(to) + first + g, scale);
    }
  }
}

// A slice of a token.
struct Slice {
  int begin, end;  // units

  MOEBIUS_DEVICE static Slice of(const SendLaunch& l, const Part& item) {
    const int begin = item.part * l.slice_units;
    return {begin, static_cast<int>(min_of(begin + l.slice_units, l.num_units))};
  }
};

// What a warp is at; it carries on from chunk to chunk.
template <Encoding kEncoding, Dtype kX>
struct Sender {
  int num_left;                    // items
  Part next;                       // token and slice
  int stage;                       // the other one may still be read
  Fetched<kEncoding, kX> fetched;  // the beginning of `next`
  int found = -1;                  // token that `destinations` are of
  Destinations destinations = {};

  MOEBIUS_DEVICE void fetch(const SendLaunch& l) {
    if (num_left == 0) return;
    const Slice slice = Slice::of(l, next);
    fetched.fetch(l.args.x + next.whole * l.args.x_stride, slice.begin, slice.end);
  }
  // Goes on to the next item, and asks for its beginning.
  MOEBIUS_DEVICE void advance(const SendLaunch& l) {
    --num_left;
    next.advance(l.num_slices);
    fetch(l);
  }
};

// Sends the tokens before `end`, as far as they are listed: from `begin` on.
template <Encoding kEncoding, Dtype kX>
MOEBIUS_DEVICE void send_tokens(const SendLaunch& l,
                                int slot,
                                int begin,
                                int end,
                                const SendShared& shared,
                                Sender<kEncoding, kX>* sender) {
  constexpr int kStep = Fetched<kEncoding, kX>::kUnits;
  const DispatchSendParams& p = l.args;
  Destinations& d = sender->destinations;
#pragma unroll 1
  for (int token = -1; sender->num_left > 0 && sender->next.whole < end;) {
    const Part item = sender->next;
    const Slice slice = Slice::of(l, item);
    if (item.whole != token) {
      token = item.whole;
      if (token != sender->found) {
        d = ask_choices(p, sender->found = token);
        find_ranks(p, shared, &d);
      }
      find_cells(p, slot, token, begin, shared, &d);
    }
    // By another warp than those that send the first heads.
    if (item.part == l.num_slices - 1) note_replies(p.self, slot, token, d);
    if (d.firsts == 0) {
      sender->advance(l);
      continue;
    }
    std::byte* stage = shared.stages + sender->stage * kStageBytes;
    sender->stage ^= 1;
    bulk_wait_read<1>();
    const std::byte* row = p.x + token * p.x_stride;
#pragma unroll 1
    for (int base = slice.begin; base < slice.end; base += kStep) {
      const Fetched<kEncoding, kX> now = sender->fetched;
      if (base + kStep < slice.end) {
        sender->fetched.fetch(row, base + kStep, slice.end);
      } else {
        sender->advance(l);
      }
      fill_stage(p.self, now, base, slice.begin, slice.end, stage, shared.scales);
    }
    fence_proxy_async_shared();
    sync_warp();
    const auto num_bytes = static_cast<uint32_t>((slice.end - slice.begin) * out_unit(kEncoding));
    int who = 0;  // of the token's slices sends the head
#pragma unroll 1
    for (uint32_t rest = d.firsts; rest != 0; rest &= rest - 1) {
      const int from = lowest(rest);
      std::byte* cell = shfl(d.cell, from);
      warp_bulk_store(cell + slice.begin * out_unit(kEncoding), stage, num_bytes);
      if constexpr (kEncoding == Encoding::kQuantise) {
        send_scales(p.self, slice.begin, slice.end, shared.scales, cell);
      }
      if (item.part == who) send_head(p, token, from, d, cell);
      if (++who == l.num_slices) who = 0;
    }
    bulk_commit();
    sync_warp();
  }
}

// Tells each rank how many tokens each of its experts gets. By the warps that have the least to
// send, of the part that has.
MOEBIUS_DEVICE void send_counts(const Rank& self,
                                int slot,
                                const Place& place,
                                const SendShared& shared) {
  constexpr int kNumWarps = 2;
  const HeapLayout& layout = self.layout;
  const Shape& s = layout.shape;
  const int num_local = s.num_local_experts();
  if (!place.is_last() || warp_index() < kWarpsPerBlock - kNumWarps) return;
#pragma unroll 1
  for (int expert = num_threads() - 1 - thread_index(); expert < s.num_experts;
       expert += kNumWarps * kWarp) {
    const int dst = expert / num_local;
    if (load(shared.is_alive + dst) == 0) continue;
    std::byte* heap = load(shared.heaps + dst);
    std::byte* to = kHasNetwork && heap == nullptr
                        ? self.heap + layout.outbox_counts(dst, load(shared.reply_base + dst))
                        : heap + layout.counts(slot, self.rank);
    store(reinterpret_cast<int32_t*>(to) + (expert - dst * num_local),
          load(shared.positions.totals + s.num_ranks + expert));
  }
}

// Last block, one thread: the first choice that names no expert.
MOEBIUS_COLD void record_bad_choice(const DispatchSendParams& p, uint64_t epoch) {
  const uint64_t word = load(&p.self.state->bad_choice);
  const auto at = static_cast<int64_t>(kMostChoices - (word & kLowMask));
  Fault fault;
  fault.kind = FaultKind::kRouting;
  fault.epoch = epoch;
  fault.observed = raw_id_at(p, at);
  fault.token = at / p.self.layout.shape.num_topk;
  fault.choice = at % p.self.layout.shape.num_topk;
  record(p.self, Half::kDispatchSend, fault);
}

// The round has its number: from here on a kernel that begins finds the next one.
MOEBIUS_DEVICE void close_sending(const Rank& self, uint64_t epoch) {
  store(&control_of(self, self.rank)->epoch, epoch + 1);
  clear_awaiting(self);
}

// Last block: the round is begun, and everybody is told.
MOEBIUS_DEVICE void announce(const DispatchSendParams& p,
                             uint64_t epoch,
                             int slot,
                             bool has_failed,
                             const SendShared& shared) {
  const Rank& self = p.self;
  const int num_ranks = self.layout.shape.num_ranks;
  if (has_failed) {
    lose(self, Half::kDispatchSend, epoch);
  } else {
    const auto word_for = [&](int dst) {
      return signal_word(epoch, static_cast<uint64_t>(load(shared.num_sent + dst)));
    };
#pragma unroll 1
    for (int dst = thread_index(); dst < num_ranks; dst += num_threads()) {
      if (load(shared.is_alive + dst) == 0) continue;
      if (kHasNetwork && load(shared.heaps + dst) == nullptr) continue;
      // Release: the cells that all blocks have written. [arrived]
      store_release_sys(signal_at(self, dst, slot, self.rank, SignalKind::kDispatch),
                        word_for(dst));
    }
    // One message for each remote rank: its counts and cells stand together, here and there.
#pragma unroll 1
    for (int dst = warp_index(); kHasNetwork && dst < num_ranks; dst += kWarpsPerBlock) {
      if (load(shared.is_alive + dst) == 0 || load(shared.heaps + dst) != nullptr) continue;
      const int n = load(shared.num_sent + dst);
      warp_put_signal(dst,
                      self.heap + self.layout.counts(slot, self.rank),
                      self.heap + self.layout.outbox_counts(dst, load(shared.reply_base + dst)),
                      n == 0 ? 0 : self.layout.counts_bytes + n * self.layout.cell_bytes,
                      signal_at(self, self.rank, slot, self.rank, SignalKind::kDispatch),
                      word_for(dst));
    }
  }
  if (!is_bookkeeper()) return;
  store(p.handle, epoch);
  const int last = num_ranks - 1;
  const int num_remote = load(shared.reply_base + last) + load(shared.num_sent + last) -
                         load(shared.num_sent + self.rank);
  add_relaxed_gpu(&self.state->remote_bytes, num_remote * self.layout.cell_bytes);
  if (load(&self.state->bad_choice) >> kCountBits == epoch + 1) record_bad_choice(p, epoch);
}

// What a round begins with, the same for all blocks. All threads read it.
struct Opening {
  uint64_t epoch;
  uint64_t combined;  // lane i: of slot i, see take_slot
  int num_valid;      // tokens

  MOEBIUS_DEVICE static Opening read(const DispatchSendParams& p) {
    // All of this is on its way together.
    const Control* control = control_of(p.self, p.self.rank);
    Opening opening;
    opening.epoch = load(&control->epoch);
    opening.combined = lane() < kMaxDepth ? load(control->combined + lane()) : 0;
    opening.num_valid = static_cast<int>(count_valid(p));
    return opening;
  }
};

// Before a part, and before a barrier.
MOEBIUS_DEVICE void prepare_part(const SendShared& shared) {
  shared.positions.clear_totals();
  shared.positions.clear();
}

// One part of the half. `T`: NoTurns where the kernel has no other half; then what follows it may
// stand ready, and the block that is done last closes the sending.
template <Encoding kEncoding, Dtype kX, class T>
MOEBIUS_DEVICE void send_part(const SendLaunch& l,
                              const Opening& opening,
                              const Place& place,
                              const T& turns,
                              const SendShared& shared) {
  constexpr bool kIsAlone = std::is_same<T, NoTurns>::value;
  const DispatchSendParams& p = l.args;
  const Rank& self = p.self;
  const Shape& s = self.layout.shape;
  const uint64_t epoch = opening.epoch;
  const int num_valid = opening.num_valid;
  const int num_items = num_valid * l.num_slices;
  const Run run = Run::of(Share::of(place), num_items);
  Sender<kEncoding, kX> sender{run.end - run.begin, Part::at(run.begin, l.num_slices), 0, {}};
  sender.fetch(l);
  if (sender.num_left > 0) {
    sender.destinations = ask_choices(p, sender.found = sender.next.whole);
  }
  const int chunk = l.num_words * 32;
  const int first_end = static_cast<int>(min_of(chunk, num_valid));
  const int32_t first_id = ask_first(p, 0, first_end);
  read_ranks(self, shared);
  const int slot = self.layout.slot_of(epoch);
  sync_block();
  if (is_taker()) {
    take_slot(self, epoch, slot, shfl(opening.combined, slot), shared);
  } else {
    mark_tokens(p, epoch, 0, first_end, num_threads() - kWarp, first_id, shared);
  }
  if (sender.num_left > 0) find_ranks(p, shared, &sender.destinations);
  sync_block();
  // From here on this part waits for no rank: the next kernel cannot keep out what it waits for.
  const bool is_ready = kIsAlone && is_short(num_items);
  if (is_ready) let_next_kernel_start();
  const bool is_ours = load(&shared.ending->has_failed) == 0;
  shared.positions.count();
  sync_block();
#pragma unroll 1
  for (int begin = chunk; begin < num_valid; begin += chunk) {
    list_tokens(p, epoch, begin, static_cast<int>(min_of(begin + chunk, num_valid)), shared);
  }
#pragma unroll 1
  for (int dst = thread_index(); dst < s.num_ranks; dst += num_threads()) {
    int base = 0;
#pragma unroll 1
    for (int below = 0; below < dst; ++below) base += load(shared.positions.totals + below);
    store(shared.reply_base + dst, base);
    store(shared.num_sent + dst, load(shared.positions.totals + dst));
  }
  if (place.is_first()) {
    int32_t* num_sent = in_workspace<int32_t>(self, slot, self.layout.num_sent);
#pragma unroll 1
    for (int dst = thread_index(); dst < s.num_ranks; dst += num_threads()) {
      store(num_sent + dst, load(shared.positions.totals + dst));
    }
    if (thread_index() == 0) store(num_sent + s.num_ranks, num_valid);
  }
  // What the last rounds left in the outbox has long left it.
  if (kHasNetwork && self.layout.shape.has_outbox && thread_index() == 0) network_quiet();
  sync_block();
  if (s.has_positions && is_ours) send_counts(self, slot, place, shared);
  if (num_valid > chunk) {
    sync_block();
    shared.positions.clear_totals();
  }
#pragma unroll 1
  for (int begin = 0; is_ours && begin < num_valid; begin += chunk) {
    const int end = static_cast<int>(min_of(begin + chunk, num_valid));
    if (num_valid > chunk) {
      // More than the positions hold at once: a second walk over them.
      sync_block();
      list_tokens(p, epoch, begin, end, shared);
    }
    send_tokens<kEncoding, kX>(l, slot, begin, end, shared, &sender);
  }
  bulk_wait_all();
  if (kIsAlone && !is_ready) let_next_kernel_start();
  const uint32_t met = meet(self, Half::kDispatchSend, place.num, shared.ending, turns);
  if (met == 0) return;
  announce(p, epoch, slot, (met & kAnyFailed) != 0, shared);
  if (kIsAlone && is_bookkeeper()) close_sending(self, epoch);
}

// How the half is dealt out: in `num_parts`, one for each of at most `num_sms` blocks.
template <Encoding kEncoding, Dtype kX>
SendLaunch plan_sending(const DispatchSendParams& params, int num_sms) {
  const Shape& s = params.self.layout.shape;
  const int64_t unit = out_unit(kEncoding);
  const int64_t num_units = s.payload_bytes / unit;
  // The size of slice that is done soonest: an item costs its steps, and about one step for itself.
  constexpr int64_t kStep = Fetched<kEncoding, kX>::kUnits;
  const int64_t num_steps = (num_units + kStep - 1) / kStep;
  const int64_t most_steps = kStageBytes / (kStep * unit);
  const int64_t num_warps = int64_t{num_sms} * kWarpsPerBlock;
  int64_t steps = 1, least = INT64_MAX;
  for (int64_t candidate = 1; candidate <= most_steps; ++candidate) {
    const int64_t slices = (num_steps + candidate - 1) / candidate;
    const int64_t turns = (params.num_tokens * slices + num_warps - 1) / num_warps;
    if (turns * (candidate + 1) < least) {
      least = turns * (candidate + 1);
      steps = candidate;
    }
  }
  SendLaunch l;
  l.args = params;
  l.num_words = positions_words(params.num_tokens, num_lists(s));
  l.num_units = static_cast<int>(num_units);
  l.slice_units = static_cast<int>(steps * kStep);
  l.num_slices = static_cast<int>((num_units + l.slice_units - 1) / l.slice_units);
  const int64_t num_items = params.num_tokens * l.num_slices;
  // So few that one block sends them before several would have told each other that they are done.
  l.num_parts = num_items <= kFewItems ? 1 : static_cast<int>(min_of(num_items, num_sms));
  return l;
}

}  // namespace moebius::cuda
