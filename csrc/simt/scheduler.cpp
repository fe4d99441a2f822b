// Who runs next, and what time it is.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "simt/operations.h"
#include "simt/world.h"

namespace moebius::simt {

Thread* current = nullptr;

namespace {

constexpr int kActive = 0, kPolling = 1;
constexpr int kLongBudget = 1 << 14;  // operations; who needs more polls, and does not say so
constexpr int kLongTurns = 200;

int64_t real_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Warp& warp_of(Thread& thread) { return thread.block->warps[static_cast<size_t>(thread.warp)]; }

void thread_main() {
  World& w = world();
  entered(w.scheduler());
  Thread& self = *current;
  self.block->launch->recipe->body();
  w.end_thread(self);
  leave(self.context, w.scheduler(), true);
  std::abort();  // it is never entered again
}

}  // namespace

void World::configure() {
  random_.reseed(options_.seed);
  // A schedule is its seed's alone, whatever ran before.
  now_ns_ = 1000000;
  next_id_ = 1;
  num_calls_ = idle_since_call_ = 0;
  idle_since_ns_ = -1;
  next_jump_ns_ = 1000;
  idle_ns_ = 0;
  poller_ = num_polled_ = 0;
  is_quiet_ = false;
  counters_ = {};
  constexpr int kPreempt[] = {0, 300, 60, 16};
  constexpr int kBulkRate[] = {1, 4, 16, 60};
  const bool is_seeded = options_.seed != 0;
  preempt_mean_ = is_seeded ? kPreempt[random_.below(4)] : 0;
  bulk_rate_ = is_seeded ? kBulkRate[random_.below(4)] : 1;
  slow_rank_ = is_seeded && random_.one_in(2)
                   ? static_cast<int>(random_.below(static_cast<uint32_t>(options_.num_ranks)))
                   : -1;
  slow_blocks_ = is_seeded && random_.one_in(2) ? 2 + random_.below(3) : 0;
  const int laziness = is_seeded ? static_cast<int>(random_.below(4)) : 0;
  memory_.configure(options_.is_memory_weak, laziness, options_.num_ranks, &random_);
}

void World::unlist(Warp& warp) {
  if (warp.list < 0) return;
  std::vector<Warp*>& list = lists_[warp.list];
  Warp* const last = list.back();
  list[static_cast<size_t>(warp.position)] = last;
  last->position = warp.position;
  list.pop_back();
  warp.list = -1;
}

void World::reclassify(Warp& warp) {
  const int list = warp.ready == 0 ? -1 : (warp.ready & ~warp.relaxing) != 0 ? kActive : kPolling;
  if (list == warp.list) return;
  unlist(warp);
  if (list < 0) return;
  warp.list = list;
  warp.position = static_cast<int>(lists_[list].size());
  lists_[list].push_back(&warp);
}

void World::block_thread(Thread& thread, Wait wait, const Site& site, const void* awaited) {
  thread.wait = wait;
  thread.site = site;
  thread.awaited = awaited;
  thread.num_turns = 0;
  warp_of(thread).ready &= ~(1u << thread.lane);
  is_quiet_ = false;
  leave(thread.context, scheduler_, false);
}

void World::preempt(Thread& thread) {
  if (thread.num_turns < kLongTurns) {
    thread.num_turns += preempt_mean_ == 0 ? kLongTurns : 1;
    leave(thread.context, scheduler_, false);
  } else {
    poll_again(thread, {"", "it does not call relax", 0});
  }
}

void World::relax(Thread& thread, const Site& site) {
  thread.num_turns = 0;
  poll_again(thread, site);
}

void World::poll_again(Thread& thread, const Site& site) {
  thread.wait = Wait::kRelax;
  thread.site = site;
  warp_of(thread).relaxing |= 1u << thread.lane;
  leave(thread.context, scheduler_, false);
}

void World::wake(Thread& thread) {
  Warp& warp = warp_of(thread);
  warp.ready |= 1u << thread.lane;
  is_quiet_ = false;
  reclassify(warp);
}

// Leaves nothing on the heap that only the stack it gives up knows of.
void World::fail(std::string what) {
  record_failure_of_current(std::move(what));
  leave(current->context, scheduler_, false);
  std::abort();  // what failed is never entered again
}

void World::record_failure_of_current(std::string what) {
  record_failure(name_of(*current) + ": " + what);
}

void World::record_failure(const std::string& what) {
  if (failure_.empty()) failure_ = what + " (seed " + std::to_string(options_.seed) + ")";
}

void World::resume(Thread& thread) {
  if (thread.num_turns >= kLongTurns) {
    thread.budget = 20;
  } else if (preempt_mean_ == 0) {
    thread.budget = kLongBudget;
  } else {
    thread.budget = 1 + static_cast<int>(random_.below(2 * static_cast<uint32_t>(preempt_mean_)));
  }
  memory_.advance();
  now_ns_ += 5 + (counters_.num_switches & 15);
  ++counters_.num_switches;
  current = &thread;
  enter(scheduler_, thread.context);
  current = nullptr;
}

void World::run_warp(Warp& warp) {
  Block& block = *warp.block;
  const bool is_seeded = options_.seed != 0;
  const uint32_t order = is_seeded ? random_.below(64) : 0;
  const int num_lanes =
      is_seeded && random_.one_in(8) ? 1 + static_cast<int>(random_.below(31)) : kWarpSize;
  for (int i = 0; i < num_lanes; ++i) {
    const uint32_t lane =
        ((order & 32) != 0 ? order - static_cast<uint32_t>(i) : order + static_cast<uint32_t>(i)) %
        kWarpSize;
    if ((warp.ready >> lane & 1) == 0) continue;
    warp.relaxing &= ~(1u << lane);
    resume(*warp.lanes[lane]);
    if (has_failed()) return;
  }
  reclassify(warp);
  if (block.num_alive == 0) retire(block);
}

// Some are left behind, so that others overtake them.
bool World::is_slow(const Block& block) const {
  return block.launch->rank == slow_rank_ || (slow_blocks_ != 0 && block.id % slow_blocks_ == 0);
}

void World::do_copy() {
  if (bulk_.is_empty() || (!network_.is_empty() && options_.seed != 0 && random_.one_in(2))) {
    network_.do_one(random_);
  } else {
    bulk_.do_one(random_);
  }
}

World::Outcome World::step() {
  const bool is_seeded = options_.seed != 0;
  if (is_seeded) {
    if (has_copies() && random_.one_in(static_cast<uint32_t>(bulk_rate_))) {
      do_copy();
      if (has_failed()) return Outcome::kWorked;
    }
    if (random_.one_in(8)) start_something();
  }
  std::vector<Warp*>& active = lists_[kActive];
  std::vector<Warp*>& polling = lists_[kPolling];
  if (active.empty()) {
    if (start_something()) return Outcome::kWorked;
    if (has_copies()) {
      do_copy();
      return Outcome::kWorked;
    }
    if (!polling.empty()) return poll();
    if (running_.empty()) return Outcome::kDone;
    record_failure("deadlock\n" + describe_blocked());
    return Outcome::kWorked;
  }
  if (!is_seeded) {
    run_warp(*active.front());
  } else if (!polling.empty() && random_.one_in(8)) {
    run_warp(*polling[random_.below(static_cast<uint32_t>(polling.size()))]);
  } else {
    const auto n = static_cast<uint32_t>(active.size());
    Warp* warp = active[random_.below(n)];
    for (int tries = 0; tries < 3 && is_slow(*warp->block); ++tries) {
      warp = active[random_.below(n)];
    }
    if (is_slow(*warp->block) && !random_.one_in(32)) {
      // Only such are left: first all that others may be waiting for.
      if (has_copies()) {
        do_copy();
        return Outcome::kWorked;
      }
      if (start_something()) return Outcome::kWorked;
      if (!polling.empty()) {
        warp = polling[random_.below(static_cast<uint32_t>(polling.size()))];
      }
    }
    run_warp(*warp);
  }
  return Outcome::kWorked;
}

World::Outcome World::poll() {
  std::vector<Warp*>& polling = lists_[kPolling];
  if (!is_quiet_) {
    num_polled_ = 0;
    idle_ns_ = 0;
    next_jump_ns_ = 1000;
    idle_since_ns_ = -1;
    is_quiet_ = true;
  }
  if (num_polled_ <= 2 * polling.size()) {
    ++num_polled_;
    run_warp(*polling[poller_++ % polling.size()]);
    return Outcome::kWorked;
  }
  // All have looked, and nothing came of it.
  num_polled_ = 0;
  if (memory_.settle_all()) return Outcome::kWorked;
  if (options_.patience_us > 0) {
    const int64_t now = real_ns();
    if (idle_since_ns_ < 0 || num_calls_ != idle_since_call_) {
      idle_since_ns_ = now;
      idle_since_call_ = num_calls_;
    }
    if (now - idle_since_ns_ < options_.patience_us * 1000) return Outcome::kWaiting;
  }
  if (idle_ns_ > options_.most_idle_ns) {
    record_failure("polling without end\n" + describe_blocked());
    return Outcome::kWorked;
  }
  now_ns_ += static_cast<uint64_t>(next_jump_ns_);
  idle_ns_ += next_jump_ns_;
  next_jump_ns_ = std::min(2 * next_jump_ns_, options_.longest_jump_ns);
  ++counters_.num_idle_jumps;
  return Outcome::kWorked;
}

// Of all worlds, with their stacks, as long as the process lives.
std::vector<std::unique_ptr<Thread>>& World::free_threads() {
  static auto& list = *new std::vector<std::unique_ptr<Thread>>;
  return list;
}

Block* World::take_block() {
  if (free_blocks_.empty()) return new Block;
  Block* const block = free_blocks_.back().release();
  free_blocks_.pop_back();
  return block;
}

bool World::start_block(Launch& launch) {
  const Shape& shape = launch.shape();
  Block* const block = take_block();
  block->launch = &launch;
  block->index = launch.to_start.back();
  launch.to_start.pop_back();
  block->id = next_id_++;
  block->num_warps = shape.num_threads / kWarpSize;
  block->num_alive = shape.num_threads;
  block->num_loads = 0;
  block->has_let_next_start = false;
  block->shared = take_shared();
  memset(block->shared, 0xcd, shape.shared_bytes);
  for (Meeting& m : block->meetings) m.arrived.clear();
  block->barriers.clear();
  block->warps.resize(static_cast<size_t>(block->num_warps));
  for (int i = 0; i < shape.num_threads; ++i) {
    if (free_threads().empty()) {
      static StackPool& stacks = *new StackPool;
      free_threads().push_back(std::make_unique<Thread>());
      free_threads().back()->stack = stacks.take();
    }
    block->threads.push_back(std::move(free_threads().back()));
    free_threads().pop_back();
    Thread& t = *block->threads.back();
    t.block = block;
    t.index = i;
    t.lane = i % kWarpSize;
    t.warp = i / kWarpSize;
    t.id = next_id_++;
    t.wait = Wait::kNone;
    t.is_done = false;
    t.seen = t.proxied = launch.start;
    t.num_turns = 0;
    t.num_stores = t.num_fenced = 0;
    t.unsynced.clear();
    t.unfenced.clear();
    t.fenced.clear();
    t.unsynced_barriers.clear();
    t.has_heard = false;
    t.fence = nullptr;
    t.open_group = nullptr;
    t.groups.clear();
    prepare(t.context, t.stack, thread_main);
    block->warps[static_cast<size_t>(t.warp)].lanes[t.lane] = &t;
  }
  blocks_.push_back(block);
  launch.resident.push_back(block);
  for (int w = 0; w < block->num_warps; ++w) {
    Warp& warp = block->warps[static_cast<size_t>(w)];
    warp.block = block;
    warp.index = w;
    warp.ready = ~0u;
    warp.relaxing = warp.done = warp.arrived = 0;
    warp.meeting = Wait::kNone;
    warp.list = -1;
    warp.synced.clear();
    reclassify(warp);
  }
  is_quiet_ = false;
  return true;
}

void World::end_thread(Thread& thread) {
  Launch& launch = *thread.block->launch;
  Warp& warp = warp_of(thread);
  if (warp.arrived != 0) {
    fail(std::string("the thread ends while others of its warp are in ") +
         simt::name_of(warp.meeting));
  }
  bulk_.end_thread(thread);
  launch.end.merge(thread.seen, memory_.num_ranks(), 0);
  launch.unpublished.insert(
      launch.unpublished.end(), thread.unsynced.begin(), thread.unsynced.end());
  thread.is_done = true;
  warp.ready &= ~(1u << thread.lane);
  warp.done |= 1u << thread.lane;
  is_quiet_ = false;
  if (--thread.block->num_alive == 0 && thread.block->num_loads != 0) {
    fail("the block ends and bulk loads into its shared memory are under way");
  }
}

// Its last thread has ended.
void World::retire(Block& block) {
  Launch& launch = *block.launch;
  for (Warp& warp : block.warps) {
    unlist(warp);
    launch.unpublished.insert(launch.unpublished.end(), warp.synced.begin(), warp.synced.end());
  }
  let_next_start(block);
  launch.resident.erase(std::find(launch.resident.begin(), launch.resident.end(), &block));
  blocks_.erase(std::find(blocks_.begin(), blocks_.end(), &block));
  memory_.settle(block.shared, launch.shape().shared_bytes);
  free_shared().push_back(block.shared);
  for (auto& t : block.threads) free_threads().push_back(std::move(t));
  block.threads.clear();
  free_blocks_.emplace_back(&block);
  ++launch.num_ended;
  end_if_over(launch);
}

void World::let_next_start(Block& block) {
  if (block.has_let_next_start) return;
  if (block.num_alive != 0) block.launch->has_let_next_start = true;
  block.has_let_next_start = true;
  ++block.launch->num_letting_next_start;
}

void World::stop_all() {
  lists_[0].clear();
  lists_[1].clear();
  starting_.clear();
  bulk_.clear();
  network_.clear();
  for (Block* block : blocks_) {
    for (auto& t : block->threads) free_threads().push_back(std::move(t));
    block->threads.clear();
    free_shared().push_back(block->shared);
    free_blocks_.emplace_back(block);
  }
  blocks_.clear();
  running_.clear();
  for (auto& s : streams_) {
    s->launches.clear();
    s->is_capturing = false;
    s->captured.clear();
  }
  for (auto& known : known_to_rank_) known.clear();
  memory_.clear();
  failure_.clear();
}

}  // namespace moebius::simt
