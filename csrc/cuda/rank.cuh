// What the kernels share: addresses in the heaps, waiting with a deadline, giving a round up, and
// the end of a kernel. Failure rules: DESIGN.md, "When a rank fails".
#pragma once

#include "cuda/device.cuh"
#include "cuda/params.h"

namespace moebius::cuda {

// Of every kernel; few for the host executor, which pays for each thread.
#if defined(MOEBIUS_SIMT)
constexpr int kWarpsPerBlock = 2;
constexpr int kUnroll = 2;     // 16-byte vectors that a lane has in flight
constexpr int kSumUnroll = 2;  // of a row that is summed
constexpr int kStageBytes = 1024;
constexpr int kFewItems = 2;  // that a grid of one block does
#else
constexpr int kWarpsPerBlock = 16;
constexpr int kUnroll = 4;
constexpr int kSumUnroll = kHasNetwork ? 2 : 4;  // what posts besides has registers for no more
constexpr int kStageBytes = 4096;
constexpr int kFewItems = 16;
#endif
constexpr int kThreadsPerBlock = kWarpsPerBlock * kWarp;

// The sum of what the lanes up to this one have.
MOEBIUS_DEVICE int scan_warp(int value) {
#pragma unroll
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const int below = shfl_up(value, delta);
    if (lane() >= delta) value += below;
  }
  return value;
}

// The lane of the lowest bit.
MOEBIUS_DEVICE int lowest(uint32_t bits) { return popcount((bits & (0u - bits)) - 1); }

template <class T>
MOEBIUS_DEVICE T* in_heap(const Rank& self, int rank, int64_t offset) {
  std::byte* heap = rank == self.rank ? self.heap : load(self.heaps + rank);
  return reinterpret_cast<T*>(heap + offset);
}
// Whether a rank's memory is not mapped here: then only the network reaches it.
MOEBIUS_DEVICE bool is_remote(const Rank& self, int rank) {
  return kHasNetwork && rank != self.rank && load(self.heaps + rank) == nullptr;
}
MOEBIUS_DEVICE Control* control_of(const Rank& self, int rank) {
  return in_heap<Control>(self, rank, self.layout.control);
}
MOEBIUS_DEVICE uint64_t* signal_at(const Rank& self, int at, int slot, int src, SignalKind kind) {
  return &in_heap<Signal>(self, at, self.layout.signal(slot, src, kind))->word;
}
template <class T>
MOEBIUS_DEVICE T* in_workspace(const Rank& self, int slot, int64_t what) {
  return in_heap<T>(self, self.rank, self.layout.local(slot, what));
}
// Tells rank `dst` a word of round `slot`; what this thread has seen written is published with it.
MOEBIUS_DEVICE void send_signal(
    const Rank& self, int dst, int slot, SignalKind kind, uint64_t word) {
  if (is_remote(self, dst)) {
    put_word(dst, signal_at(self, self.rank, slot, self.rank, kind), word);
  } else {
    store_release_sys(signal_at(self, dst, slot, self.rank, kind), word);
  }
}
MOEBIUS_DEVICE bool is_masked(const Rank& self, int rank) {
  return load(in_heap<const uint32_t>(self, self.rank, self.layout.masks) + rank) != 0;
}
MOEBIUS_DEVICE bool is_refused_by(const Rank& self, int rank) {
  return load_relaxed_sys(in_heap<const uint32_t>(self, self.rank, self.layout.refusals) + rank) !=
         0;
}

// The first fault stays until the host has taken it. One thread at a time.
MOEBIUS_DEVICE void record(const Rank& self, Half half, const Fault& fault) {
  if (load_relaxed_sys(&self.record->is_set) != 0) return;
  store(&self.record->half, half);
  Fault& f = self.record->fault;
  store(&f.kind, fault.kind);
  store(&f.rank, fault.rank);
  store(&f.via, fault.via);
  store(&f.reason, fault.reason);
  store(&f.epoch, fault.epoch);
  store(&f.expected, fault.expected);
  store(&f.observed, fault.observed);
  store(&f.waited_ns, fault.waited_ns);
  store(&f.token, fault.token);
  store(&f.choice, fault.choice);
  store_release_sys(&self.record->is_set, 1u);
}

// Notes why round `epoch` is lost, if nobody has yet; the last block acts on it. Returns false.
MOEBIUS_COLD bool fail(const Rank& self,
                       uint64_t epoch,
                       FaultKind kind,
                       Reason reason,
                       int rank,
                       int via,
                       uint64_t expected,
                       uint64_t word,
                       uint64_t waited_ns) {
  Failure& failure = self.state->failures[self.layout.slot_of(epoch)];
  if (exchange_max_gpu(&failure.claimed, epoch + 1) == epoch + 1) return false;
  Fault& f = failure.fault;
  store(&f.kind, kind);
  store(&f.rank, rank);
  store(&f.via, via);
  store(&f.reason, reason);
  store(&f.epoch, epoch);
  store(&f.expected, expected);
  const bool is_empty = (word & kLowMask) == 0;
  store(&f.observed, is_empty ? int64_t{-1} : static_cast<int64_t>(signal_epoch(word)));
  store(&f.waited_ns, static_cast<int64_t>(waited_ns));
  store(&f.token, int64_t{-1});
  store(&f.choice, int64_t{-1});
  store_release_sys(&failure.noted, epoch + 1);
  return false;
}

// Who holds `src` up: follows the ranks that wait for one another. `src` itself if it waits for
// nobody, or for us.
MOEBIUS_DEVICE int find_culprit(const Rank& self, int src) {
  int culprit = src;
  const int num_ranks = self.layout.shape.num_ranks;
  for (int hop = 0; hop < num_ranks; ++hop) {
    if (is_remote(self, culprit)) return culprit;  // what it waits for cannot be seen from here
    const uint64_t word = load_acquire_sys(&control_of(self, culprit)->awaiting);
    if (word == 0) return culprit;
    const int next = static_cast<int>(signal_value(word) / 2);
    if (next < 0 || next >= num_ranks || next == self.rank) return src;
    // What it waits for may have come while it was stopped: then nobody holds it up.
    const auto kind = static_cast<SignalKind>(signal_value(word) % 2);
    const uint64_t epoch = signal_epoch(word);
    const uint64_t* awaited = signal_at(self, culprit, self.layout.slot_of(epoch), next, kind);
    if (signal_arrived(load_acquire_sys(awaited), epoch)) return culprit;
    culprit = next;
  }
  return src;  // a circle: each waits for the next
}

constexpr uint64_t kLookNs = 2'000'000;  // between looks at what else could be wrong
// However long a source is held up by others, a wait ends after this many timeouts: one of its own,
// one of the rank that it waits for, and one to spare.
constexpr uint64_t kMostTimeouts = 3;

// Whether a wait of the running kernel has failed, maybe in another block.
MOEBIUS_DEVICE bool is_given_up(const Rank& self, uint64_t epoch) {
  const Failure& failure = self.state->failures[self.layout.slot_of(epoch)];
  return load_relaxed_sys(&failure.claimed) == epoch + 1;
}

// The only spin of the engine. The word of `awaited_epoch` once it is there; what is there instead
// once it will not come: then round `epoch` is lost.
MOEBIUS_COLD uint64_t
spin(const Rank& self, int src, SignalKind kind, uint64_t awaited_epoch, uint64_t epoch) {
  const uint64_t* awaited =
      signal_at(self, self.rank, self.layout.slot_of(awaited_epoch), src, kind);
  uint64_t word = 0;
  // Blocks that run one after the other do not wait for a deadline each.
  if (is_given_up(self, epoch)) return word;
  const uint64_t* own =
      signal_at(self, self.rank, self.layout.slot_of(awaited_epoch), self.rank, kind);
  const uint64_t timeout = static_cast<uint64_t>(self.timeout_ns);
  uint64_t start = now_ns();
  const uint64_t look_ns = min_of(static_cast<int64_t>(kLookNs), self.timeout_ns / 4 + 1);
  uint64_t deadline = start + timeout;
  uint64_t next_look = start + look_ns;
  for (;;) {
    word = load_acquire_sys(awaited);
    if (signal_arrived(word, awaited_epoch)) return word;
    relax();
    const uint64_t now = now_ns();
    if (now < next_look && now < deadline) continue;
    next_look = now + look_ns;
    if (is_given_up(self, epoch)) return word;
    if (!signal_arrived(load_acquire_sys(own), awaited_epoch)) {
      // This kernel has yet to send itself (see turns.cuh), and may have to wait for that: it is
      // then for that wait to say who holds it up. The others cannot have had our part.
      start = now;
      deadline = start + timeout;
      continue;
    }
    // For those who wait for us: whom we wait for. Any block: the others may not have begun.
    const uint64_t whom = static_cast<uint64_t>(src) * 2 + static_cast<uint64_t>(kind);
    store_release_sys(&control_of(self, self.rank)->awaiting, signal_word(awaited_epoch, whom));
    const int culprit = find_culprit(self, src);
    // The time in which the source is itself held up is not counted against it.
    if (culprit != src) {
      const uint64_t later = now + timeout, limit = start + kMostTimeouts * timeout;
      deadline = later < limit ? later : limit;
    }
    const bool is_refused = is_refused_by(self, src);
    if (!is_refused && now < deadline) continue;
    // It may have signalled as its last act.
    word = load_acquire_sys(awaited);
    if (signal_arrived(word, awaited_epoch)) return word;
    const Reason reason = is_refused ? Reason::kReported : Reason::kDeadline;
    const int rank = is_refused ? self.rank : culprit;
    const int via = is_refused || culprit != src ? src : -1;
    const uint64_t waited_ns = now - start;
    fail(self, epoch, FaultKind::kTimeout, reason, rank, via, awaited_epoch, word, waited_ns);
    return word;
  }
}

// What `src` has signalled so far, in the slot of round `epoch`.
MOEBIUS_DEVICE uint64_t look(const Rank& self, int src, SignalKind kind, uint64_t epoch) {
  // Pairs with [arrived] in the kernels that send: what the signal announces can be read from here.
  return load_acquire_sys(signal_at(self, self.rank, self.layout.slot_of(epoch), src, kind));
}

// Waits for the signal of `src` in round `epoch`, after a look at it; its count, or -1 when the
// round is lost.
MOEBIUS_DEVICE int64_t await_count(const Rank& self,
                                   int src,
                                   SignalKind kind,
                                   uint64_t epoch,
                                   uint64_t word,
                                   int64_t* wait_stats) {
  uint64_t waited_ns = 0;
  if (!signal_arrived(word, epoch)) {
    const uint64_t start = now_ns();
    word = spin(self, src, kind, epoch, epoch);
    waited_ns = now_ns() - start;
    // A rank does not wait for itself, though a block may for the others of its kernel.
    if (wait_stats != nullptr && block_index() == 0 && src != self.rank) {
      store(wait_stats + src, load(wait_stats + src) + static_cast<int64_t>(waited_ns));
    }
    if (!signal_arrived(word, epoch)) return -1;
  }
  const int64_t value = signal_value(word);
  const bool is_abort = signal_is_abort(word);
  const int64_t limit =
      is_abort ? self.layout.shape.num_ranks - 1 : self.layout.shape.max_num_tokens;
  // A rank that loses a later round says so at once, maybe over the word that we wait for.
  const bool is_expected = signal_epoch(word) == epoch || is_abort;
  if (is_expected && !is_abort && value <= limit) return value;
  const bool is_sane = is_expected && value <= limit;
  fail(self,
       epoch,
       is_sane ? FaultKind::kTimeout : FaultKind::kProtocol,
       is_sane ? Reason::kReported : Reason::kDeadline,
       is_sane ? static_cast<int>(value) : src,
       is_sane ? src : -1,
       epoch,
       word,
       waited_ns);
  return -1;
}

// Which of the parts that a half is dealt out in: one for each block of its kernel, or as turns.cuh
// says.
struct Place {
  int index, num;

  MOEBIUS_DEVICE static Place of_block() { return {block_index(), num_blocks()}; }
  MOEBIUS_DEVICE bool is_first() const { return index == 0; }
  MOEBIUS_DEVICE bool is_last() const { return index == num - 1; }
};

// Of a block, in shared memory: how its part of a half ends.
struct Ending {
  uint32_t has_failed;  // a wait of this block is over without success
  uint32_t met;         // of these bits:
};
constexpr uint32_t kIsLast = 1;  // the last part to be done, whose block sees what all have written
constexpr uint32_t kAnyFailed = 2;         // and one of them has failed
constexpr uint32_t kOneFailed = 1u << 16;  // in num_done, above the number of blocks

// One thread, after a block barrier: the part is done with what the last block waits for. `num`:
// of parts. The block may read `met` after the next barrier.
MOEBIUS_DEVICE void arrive(const Rank& self, Half half, int num, Ending* ending) {
  uint32_t* num_done = &self.state->num_done[static_cast<int>(half)];
  const uint32_t mine = 1 + (load(&ending->has_failed) != 0 ? kOneFailed : 0);
  // Release of this block's writes, acquire of those of the blocks before. [all-done]
  const uint32_t all = add_acq_rel_gpu(num_done, mine) + mine;
  const bool is_last = all % kOneFailed == static_cast<uint32_t>(num);
  if (is_last) store(num_done, 0u);
  store(&ending->met, is_last ? kIsLast | (all >= kOneFailed ? kAnyFailed : 0) : 0u);
}

// All threads: ends a part; `met`. `turns`: asked for the next one meanwhile, if there are several.
template <class T>
MOEBIUS_DEVICE uint32_t meet(const Rank& self, Half half, int num, Ending* ending, const T& turns) {
  sync_block();
  if (num == 1) return kIsLast | (load(&ending->has_failed) != 0 ? kAnyFailed : 0);
  if (thread_index() == 0) arrive(self, half, num, ending);
  if (thread_index() == kWarp) turns.ask();
  sync_block();
  return load(&ending->met);
}

// The thread that keeps the books at the end of a kernel, while the first ones do what others wait
// for. It has the least else to do.
MOEBIUS_DEVICE bool is_bookkeeper() { return thread_index() == num_threads() - 1; }

// Last block, all threads: gives round `epoch` up and tells whoever may wait for it.
MOEBIUS_COLD void lose(const Rank& self, Half half, uint64_t epoch) {
  const int slot = self.layout.slot_of(epoch);
  const Failure& failure = self.state->failures[slot];
  // By a block that may be in the other half, where a kernel does both; it is about to.
  while (load_acquire_sys(&failure.noted) != epoch + 1) relax();
  const Fault& noted = failure.fault;
  const int culprit = load(&noted.rank);
  uint64_t* combined = &control_of(self, self.rank)->combined[slot];
  const bool is_combined = load(combined) == epoch + 1;
  const uint64_t word = abort_word(epoch, static_cast<uint64_t>(culprit));
  sync_block();
  for (int dst = thread_index(); dst < self.layout.shape.num_ranks; dst += num_threads()) {
    if (is_masked(self, dst)) continue;
    network_fence();  // or the words of rounds before could arrive over these
    if (half == Half::kDispatchSend) send_signal(self, dst, slot, SignalKind::kDispatch, word);
    if (!is_combined) send_signal(self, dst, slot, SignalKind::kCombine, word);
  }
  sync_block();
  if (thread_index() != 0) return;
  store(combined, epoch + 1);
  store(&self.state->lost[slot], epoch + 1);
  Fault fault;
  fault.kind = load(&noted.kind);
  fault.rank = culprit;
  fault.via = load(&noted.via);
  fault.reason = load(&noted.reason);
  fault.epoch = load(&noted.epoch);
  fault.expected = load(&noted.expected);
  fault.observed = load(&noted.observed);
  fault.waited_ns = load(&noted.waited_ns);
  if (fault.kind == FaultKind::kTimeout && culprit != self.rank) {
    store(in_heap<uint32_t>(self, self.rank, self.layout.masks) + culprit, 1u);
    const int64_t refusal = self.layout.refusal(self.rank);
    if (is_remote(self, culprit)) {
      put_word(culprit, in_heap<uint32_t>(self, self.rank, refusal), 1u);
    } else {
      store_release_sys(in_heap<uint32_t>(self, culprit, refusal), 1u);
    }
  }
  record(self, half, fault);
}

// Whether anything failed in the running kernel. For the last block.
MOEBIUS_DEVICE bool has_failed(const Rank& self, uint64_t epoch) {
  const int slot = self.layout.slot_of(epoch);
  return load(&self.state->failures[slot].claimed) == epoch + 1;
}

// A round as the halves after dispatch send find it.
struct Begun {
  uint64_t epoch;
  int slot;
  bool is_lost;   // given up: nothing to wait for, nothing to send
  bool is_stale;  // its memory serves a later round: nothing may be touched
};

MOEBIUS_COLD void record_stale(const Rank& self, Half half, uint64_t epoch, uint64_t next) {
  Fault fault;
  fault.kind = FaultKind::kStale;
  fault.epoch = epoch;
  fault.expected = next;
  record(self, half, fault);
}

// All threads call.
MOEBIUS_DEVICE Begun begin_half(const Rank& self, const uint64_t* handle, Half half) {
  Begun begun;
  // All of this is on its way together.
  begun.epoch = load(handle);
  const uint64_t next = load(&control_of(self, self.rank)->epoch);
  const uint64_t lost = lane() < kMaxDepth ? load(self.state->lost + lane()) : 0;
  begun.slot = self.layout.slot_of(begun.epoch);
  begun.is_lost = shfl(lost, begun.slot) == begun.epoch + 1;
  const uint64_t depth = static_cast<uint64_t>(self.layout.shape.depth);
  begun.is_stale = begun.epoch >= next || next - begun.epoch > depth;
  if (begun.is_stale && block_index() == 0 && thread_index() == 0) {
    record_stale(self, half, begun.epoch, next);
  }
  return begun;
}

// Last block, one thread: nobody waits here any more.
MOEBIUS_DEVICE void clear_awaiting(const Rank& self) {
  uint64_t* awaiting = &control_of(self, self.rank)->awaiting;
  if (load(awaiting) != 0) store_release_sys(awaiting, uint64_t{0});
}

// As arrive, for the receive halves, whose blocks meet once nothing can fail any more: while their
// rows are on their way the last block learns whether the round is lost now, and says that this
// rank waits no longer.
MOEBIUS_DEVICE void arrive_received(const Rank& self,
                                    const Begun& begun,
                                    Half half,
                                    Ending* ending) {
  arrive(self, half, num_blocks(), ending);
  if (load(&ending->met) == 0) return;
  // Given up in this half: not before, be it in this kernel.
  const bool was_lost = load(&self.state->lost[begun.slot]) == begun.epoch + 1;
  const bool is_lost = has_failed(self, begun.epoch) && !was_lost;
  store(&ending->met, kIsLast | (is_lost ? kAnyFailed : 0));
  clear_awaiting(self);
}

}  // namespace moebius::cuda
