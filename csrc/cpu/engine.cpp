#include "cpu/engine.h"

#include <sched.h>

#include <algorithm>
#include <utility>

namespace moebius::cpu {
namespace {

constexpr int64_t kSliceNs = 2'000'000;  // between looks at the peer and its process
// However long a source is held up by others, a wait ends after this many timeouts: one of its own,
// one of the rank that it waits for, and one to spare.
constexpr int64_t kMostTimeouts = 3;
constexpr int64_t kBeatsPerTimeout = 8;  // to remote ranks, in a wait that lasts

}  // namespace

Engine::Engine(const EngineConfig& config,
               int rank,
               std::vector<std::byte*> heaps,
               const std::vector<int>& pids,
               const Kernels& kernels,
               Network* network)
    : config_(config),
      layout_(HeapLayout::of(config.shape)),
      rank_(rank),
      heaps_(std::move(heaps)),
      kernels_(kernels),
      network_(network),
      policy_(wait_policy(config.shape.num_ranks, config.num_cores)) {
  const Shape& s = config_.shape;
  for (int pid : pids) liveness_.emplace_back(pid);
  rank_of_expert_.resize(s.num_experts);
  for (int e = 0; e < s.num_experts; ++e) rank_of_expert_[e] = e / s.num_local_experts();
  topk_ids_.resize(int64_t{s.max_num_tokens} * s.num_topk);
  last_token_.resize(s.num_ranks);
  reply_base_.resize(s.num_ranks);
  tokens_for_.resize(s.num_ranks);
}

void Engine::mask(int rank, bool is_dead) {
  auto* masks = reinterpret_cast<uint32_t*>(heap(rank_, layout_.masks));
  __atomic_store_n(&masks[rank], is_dead ? 1u : 0u, __ATOMIC_RELEASE);
  if (is_remote(rank)) refuse(rank, is_dead);
}

bool Engine::is_refused_by(int rank) const {
  if (!is_remote(rank)) return has_given_up(rank, rank_);
  const auto* refusal = reinterpret_cast<const uint32_t*>(heap(rank_, layout_.refusal(rank)));
  return __atomic_load_n(refusal, __ATOMIC_ACQUIRE) != 0;
}

bool Engine::has_given_up(int who, int rank) const {
  const auto* masks = reinterpret_cast<const uint32_t*>(heap(who, layout_.masks));
  return __atomic_load_n(&masks[rank], __ATOMIC_ACQUIRE) != 0;
}

bool Engine::may_write_to(int dst, uint64_t epoch) {
  if (!is_refused_by(dst)) return true;
  return fail(FaultKind::kTimeout, Reason::kReported, rank_, dst, epoch, 0);
}

bool Engine::fail(FaultKind kind,
                  Reason reason,
                  int rank,
                  int via,
                  uint64_t epoch,
                  uint64_t word,
                  int64_t waited_ns) {
  fault_ = {};
  fault_.kind = kind;
  fault_.reason = reason;
  fault_.rank = rank;
  fault_.via = via;
  fault_.epoch = fault_.expected = epoch;
  fault_.observed = (word & kLowMask) == 0 ? -1 : static_cast<int64_t>(signal_epoch(word));
  fault_.waited_ns = waited_ns;
  if (kind == FaultKind::kTimeout && rank != rank_) mask(rank, true);
  return false;
}

int Engine::find_culprit(int src) const {
  int culprit = src;
  for (int hop = 0; hop < config_.shape.num_ranks; ++hop) {
    // What a remote rank waits for is not seen from here: its beats tell.
    if (is_remote(culprit)) return culprit;
    const uint64_t word = __atomic_load_n(&control(culprit).awaiting, __ATOMIC_ACQUIRE);
    if (word == 0) return culprit;
    const int next = static_cast<int>(signal_value(word) / 2);
    if (next < 0 || next >= config_.shape.num_ranks || next == rank_) return src;
    // What it waits for may have come while it was stopped: then nobody holds it up.
    const auto kind = static_cast<SignalKind>(signal_value(word) % 2);
    const uint64_t epoch = signal_epoch(word);
    const Signal& awaited = signal(culprit, layout_.slot_of(epoch), next, kind);
    if (signal_arrived(load_signal(awaited), epoch)) return culprit;
    culprit = next;
  }
  return src;  // a circle: each waits for the next
}

bool Engine::poll(int src, SignalKind kind, uint64_t epoch, uint64_t* word) {
  Signal& awaited = signal(rank_, layout_.slot_of(epoch), src, kind);
  const int64_t start = now_ns();
  for (int i = 0; policy_.spin_ns > 0; ++i) {
    *word = load_signal(awaited);
    if (signal_arrived(*word, epoch)) return true;
    pause_cpu();
    // Looking at the clock costs as much as 20 polls.
    if (i % 32 == 31 && now_ns() - start > policy_.spin_ns) break;
  }
  Control& self = control(rank_);
  __atomic_store_n(
      &self.awaiting, signal_word(epoch, src * 2 + static_cast<int>(kind)), __ATOMIC_RELEASE);
  const int64_t limit_ns = start + kMostTimeouts * config_.timeout_ns;
  int64_t deadline_ns = start + config_.timeout_ns;
  int64_t next_look_ns = start + kSliceNs;
  int64_t next_beat_ns = start + 2 * config_.timeout_ns / kBeatsPerTimeout;
  SeenBeat seen_beat;
  bool is_here = false;
  for (;;) {
    *word = load_signal(awaited);
    if ((is_here = signal_arrived(*word, epoch))) break;
    const int64_t now = now_ns();
    if (now > next_look_ns || now > deadline_ns) {
      next_look_ns = now + kSliceNs;
      if (network_ != nullptr && now > next_beat_ns) {
        next_beat_ns = now + config_.timeout_ns / kBeatsPerTimeout;
        beat(src);
      }
      int culprit = find_culprit(src);
      if (culprit == src && is_remote(src)) {
        const int awaited = heard_from(src, now, &seen_beat);
        if (awaited >= 0) culprit = awaited;
      }
      // The time in which the source is itself held up is not counted against it.
      if (culprit != src) deadline_ns = std::min(now + config_.timeout_ns, limit_ns);
      const bool is_dead = liveness_[src].is_dead();
      const bool is_refused = is_refused_by(src);
      if (is_dead || is_refused || now > deadline_ns) {
        // It may have signalled as its last act.
        *word = load_signal(awaited);
        if ((is_here = signal_arrived(*word, epoch))) break;
        const int64_t waited_ns = now - start;
        if (is_dead) {
          fail(FaultKind::kTimeout, Reason::kDied, src, -1, epoch, *word, waited_ns);
        } else if (is_refused) {
          fail(FaultKind::kTimeout, Reason::kReported, rank_, src, epoch, *word, waited_ns);
        } else {
          const int via = culprit == src ? -1 : src;
          fail(FaultKind::kTimeout, Reason::kDeadline, culprit, via, epoch, *word, waited_ns);
        }
        break;
      }
    }
    if (now - start < policy_.spin_ns + policy_.yield_ns) {
      sched_yield();
    } else {
      sleep_on(awaited, *word, std::min(kSliceNs, std::max<int64_t>(deadline_ns - now, 1)));
    }
  }
  __atomic_store_n(&self.awaiting, uint64_t{0}, __ATOMIC_RELEASE);
  return is_here;
}

bool Engine::await(int src, SignalKind kind, uint64_t epoch, int64_t* count, int64_t* wait_stats) {
  uint64_t word = load_signal(signal(rank_, layout_.slot_of(epoch), src, kind));
  int64_t waited_ns = 0;
  if (!signal_arrived(word, epoch)) {
    const int64_t start = now_ns();
    const bool is_here = poll(src, kind, epoch, &word);
    waited_ns = now_ns() - start;
    if (wait_stats != nullptr) wait_stats[src] += waited_ns;
    if (!is_here) return false;
  }
  *count = signal_value(word);
  const bool is_abort = signal_is_abort(word);
  const int64_t limit = is_abort ? config_.shape.num_ranks - 1 : config_.shape.max_num_tokens;
  // A rank that loses a later round says so at once, maybe over the word that we wait for.
  const bool is_expected = signal_epoch(word) == epoch || is_abort;
  if (!is_expected || *count > limit) return fail_protocol(src, epoch, word);
  if (!is_abort) return true;
  return fail(FaultKind::kTimeout,
              Reason::kReported,
              static_cast<int>(*count),
              src,
              epoch,
              word,
              waited_ns);
}

void Engine::signal_all(uint64_t epoch, SignalKind kind, uint64_t word) {
  const int num_ranks = config_.shape.num_ranks;
  for (int i = 0; i < num_ranks; ++i) {
    const int dst = (rank_ + 1 + i) % num_ranks;
    if (!is_dead(dst)) send_signal(dst, layout_.slot_of(epoch), kind, word);
  }
}

bool Engine::lose(uint64_t epoch) {
  fault_.epoch = epoch;  // in a closing wait, the round that was awaited is another
  // Cells of this round may have come, or still come, that no receive will count.
  int32_t* num_clean = local(layout_.slot_of(epoch), layout_.num_clean);
  std::fill(num_clean, num_clean + config_.shape.num_ranks, 0);
  Control& self = control(rank_);
  const uint64_t word = abort_word(epoch, static_cast<uint64_t>(fault_.rank));
  if (self.epoch == epoch) {
    // Not sent yet: nobody shall wait for it.
    self.epoch = epoch + 1;
    signal_all(epoch, SignalKind::kDispatch, word);
  }
  uint64_t& combined = self.combined[layout_.slot_of(epoch)];
  if (combined != epoch + 1) {
    combined = epoch + 1;
    signal_all(epoch, SignalKind::kCombine, word);
  }
  return false;
}

bool Engine::close_round(uint64_t epoch) {
  uint64_t& combined = control(rank_).combined[layout_.slot_of(epoch)];
  if (combined != epoch + 1) {
    // Never combined: the empty combine.
    combined = epoch + 1;
    signal_all(epoch, SignalKind::kCombine, signal_word(epoch, 0));
  }
  for (int src = 0; src < config_.shape.num_ranks; ++src) {
    if (src == rank_ || is_dead(src)) continue;
    constexpr SignalKind kind = SignalKind::kCombine;
    uint64_t word = load_signal(signal(rank_, layout_.slot_of(epoch), src, kind));
    // An abort closes the round too, and so does that of a later one: its sender reads nothing of
    // this one any more.
    if (!signal_arrived(word, epoch) && !poll(src, kind, epoch, &word)) return false;
    if (signal_epoch(word) != epoch && !signal_is_abort(word))
      return fail_protocol(src, epoch, word);
  }
  return true;
}

}  // namespace moebius::cpu
