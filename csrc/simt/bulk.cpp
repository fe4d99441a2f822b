#include "simt/bulk.h"

#include <string.h>

#include <algorithm>
#include <string>

#include "simt/operations.h"
#include "simt/world.h"

namespace moebius::simt {
namespace {

const View kNothing;

PhaseBarrier* find(Block& block, const void* address) {
  for (PhaseBarrier& b : block.barriers) {
    if (b.address == address) return &b;
  }
  return nullptr;
}

PhaseBarrier& initialised(Thread& by, const void* address) {
  PhaseBarrier* const b = find(*by.block, address);
  if (b == nullptr) world().fail("the barrier was never initialised");
  const bool is_known = b->init_thread == by.id ||
                        (b->init_stamp != 0 && b->init_stamp <= by.seen.warps[b->init_warp]);
  if (!is_known) {
    world().fail("the barrier is used by a thread that is not synchronised with barrier_init");
  }
  return *b;
}

void flip_if_complete(World& world, PhaseBarrier& b) {
  if (!b.has_arrived || b.num_missing_bytes != 0) return;
  b.has_arrived = false;
  b.phase ^= 1;
  for (Thread* t : b.waiting) world.wake(*t);
  b.waiting.clear();
}

void check_bulk(const void* global, const void* shared, uint32_t num_bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(global) | reinterpret_cast<uintptr_t>(shared) |
                    uintptr_t{num_bytes};
  if (bits % 16 != 0 || num_bytes == 0) {
    world().fail("a bulk copy of " + std::to_string(num_bytes) +
                 " bytes: addresses and size have to be multiples of 16");
  }
  const auto offset =
      reinterpret_cast<uintptr_t>(shared) - reinterpret_cast<uintptr_t>(current->block->shared);
  if (offset > current->block->launch->shape().shared_bytes ||
      offset + num_bytes > current->block->launch->shape().shared_bytes) {
    world().fail("a bulk copy outside of the block's shared memory");
  }
  world().check_global(*current, global, num_bytes, false);
}

}  // namespace

void barrier_init(void* barrier) {
  touch();
  check_access(barrier, 8);
  Thread& by = *current;
  Block& block = *by.block;
  PhaseBarrier* b = find(block, barrier);
  if (b != nullptr && (b->num_copies != 0 || !b->waiting.empty())) {
    world().fail("barrier_init of a barrier in use");
  }
  if (b == nullptr) b = &block.barriers.emplace_back();
  *b = {};
  b->address = barrier;
  b->init_thread = by.id;
  b->init_warp = by.warp;
  for (size_t i = 0; i < block.barriers.size(); ++i) {
    if (&block.barriers[i] == b) by.unsynced_barriers.push_back(static_cast<int>(i));
  }
}

void fence_barrier_init() {
  touch();
  for (PhaseBarrier& b : current->block->barriers) {
    if (b.init_thread == current->id) b.is_init_fenced = true;
  }
}

void barrier_wait(void* barrier, uint32_t parity, const Site& site) {
  touch();
  Thread& by = *current;
  if (parity > 1) world().fail("the parity is " + std::to_string(parity));
  PhaseBarrier& b = initialised(by, barrier);
  while (static_cast<uint32_t>(b.phase) == parity) {
    b.waiting.push_back(&by);
    world().block_thread(by, Wait::kBarrier, site, barrier);
  }
  by.seen.merge(b.seen, world().memory().num_ranks(), by.block->num_warps);
  by.proxied.merge(b.proxied, world().memory().num_ranks(), by.block->num_warps);
}

void bulk_load(void* shared, const void* global, uint32_t num_bytes, void* barrier) {
  touch();
  check_bulk(global, shared, num_bytes);
  world().bulk().load(*current, shared, global, num_bytes, barrier);
}

void bulk_store(void* global, const void* shared, uint32_t num_bytes) {
  touch();
  check_bulk(global, shared, num_bytes);
  world().bulk().store(*current, global, shared, num_bytes);
}

void bulk_commit() { world().bulk().commit(*current); }

void bulk_wait(int most_pending, bool is_for_writes, const Site& site) {
  touch();
  Thread& by = *current;
  by.wait = is_for_writes ? Wait::kBulkAll : Wait::kBulkRead;
  by.most_pending = most_pending;
  while (!BulkCopies::is_over(by)) {
    world().block_thread(by, is_for_writes ? Wait::kBulkAll : Wait::kBulkRead, site, nullptr);
  }
  world().bulk().end_wait(by, is_for_writes);
}

void BulkCopies::add(const std::shared_ptr<Copy>& copy, uint32_t num_bytes) {
  const uint32_t num_granules = num_bytes / 16;
  uint32_t done = 0;
  while (done < num_granules) {
    uint32_t n = num_granules - done;
    if (world_.options().seed != 0 && n > 1) n = 1 + world_.random().below(n);
    if (copy->is_store) {
      ++copy->group->num_unread;
      ++copy->group->num_unwritten;
      ++copy->launch->num_unwritten;
    }
    ++copy->num_left;
    steps_.push_back({copy, done * 16, n * 16, {}});
    done += n;
  }
  // Now and then it is quick: whoever still reads what it overwrites should notice.
  while (!steps_.empty() && steps_.back().copy == copy && world_.options().seed != 0 &&
         world_.random().one_in(4)) {
    Step step = std::move(steps_.back());
    steps_.pop_back();
    if (!copy->is_store) {
      load_piece(step);
    } else if (step.read.empty()) {
      read_piece(step);
      steps_.push_back(std::move(step));
      break;
    }
  }
}

void BulkCopies::load(
    Thread& by, void* shared, const void* global, uint32_t num_bytes, const void* barrier) {
  PhaseBarrier& b = initialised(by, barrier);
  if (!b.is_init_fenced) world_.fail("a bulk load, and no fence_barrier_init after barrier_init");
  if (b.has_arrived) {
    world_.fail("a second arrival at the barrier in one phase: nobody waited for the first");
  }
  arrive(by, b);
  b.has_arrived = true;
  b.num_missing_bytes += num_bytes;
  if (b.num_missing_bytes >= 1 << 20) world_.fail("too many bytes for one phase of a barrier");
  ++b.num_copies;
  ++by.block->num_loads;
  auto copy = std::make_shared<Copy>();
  copy->global = const_cast<std::byte*>(static_cast<const std::byte*>(global));
  copy->shared = static_cast<std::byte*>(shared);
  copy->is_store = false;
  copy->thread = by.id;
  copy->block_id = by.block->id;
  copy->own = by.num_fenced;
  copy->warp = static_cast<uint8_t>(by.warp);
  copy->seen = by.seen;
  copy->proxied = by.proxied;
  copy->block = by.block;
  copy->launch = by.block->launch->shared_from_this();
  for (size_t i = 0; i < by.block->barriers.size(); ++i) {
    if (&by.block->barriers[i] == &b) copy->barrier = static_cast<int>(i);
  }
  add(copy, num_bytes);
}

void BulkCopies::store(Thread& by, void* global, const void* shared, uint32_t num_bytes) {
  if (by.open_group == nullptr) {
    by.open_group = std::make_shared<BulkGroup>();
    by.open_group->owner = &by;
  }
  auto copy = std::make_shared<Copy>();
  copy->global = static_cast<std::byte*>(global);
  copy->shared = const_cast<std::byte*>(static_cast<const std::byte*>(shared));
  copy->is_store = true;
  copy->thread = by.id;
  copy->block_id = by.block->id;
  copy->order = ++by.num_stores;
  copy->own = by.num_fenced;
  copy->warp = static_cast<uint8_t>(by.warp);
  copy->seen = by.seen;
  copy->block = by.block;
  copy->launch = by.block->launch->shared_from_this();
  copy->group = by.open_group;
  add(copy, num_bytes);
}

void BulkCopies::commit(Thread& by) {
  if (by.open_group != nullptr)
    by.groups.push_back(std::move(by.open_group));
  else
    by.groups.push_back(nullptr);  // an empty group counts as well
  by.open_group = nullptr;
}

bool BulkCopies::is_over(const Thread& by) {
  const auto most = static_cast<size_t>(by.most_pending);
  for (size_t i = 0; i + most < by.groups.size(); ++i) {
    const BulkGroup* const g = by.groups[i].get();
    if (g == nullptr) continue;
    if (by.wait == Wait::kBulkAll ? g->num_unwritten != 0 : g->num_unread != 0) return false;
  }
  return true;
}

void BulkCopies::end_wait(Thread& by, bool is_for_writes) {
  by.wait = Wait::kNone;
  if (is_for_writes) {
    for (const auto& group : by.groups) {
      if (group == nullptr) continue;
      ++by.num_stores;
      for (const RecordRef ref : group->records) {
        Record* const r = world_.memory().find(ref);
        if (r == nullptr) continue;
        r->is_pending_bulk = false;
        r->order = by.num_stores;
        by.unsynced.push_back(ref);
        by.unfenced.push_back(ref);
      }
    }
    by.groups.clear();
    return;
  }
  while (!by.groups.empty() && by.groups.front() == nullptr) by.groups.pop_front();
}

void BulkCopies::end_thread(Thread& by) {
  commit(by);
  for (const auto& group : by.groups) {
    if (group == nullptr) continue;
    if (group->num_unread != 0) {
      world_.fail("a thread ends before its bulk stores have read their source");
    }
    group->owner = nullptr;
    for (const RecordRef ref : group->records) {
      if (Record* const r = world_.memory().find(ref)) r->is_pending_bulk = false;
      by.block->launch->unpublished.push_back(ref);
    }
  }
  by.groups.clear();
}

void BulkCopies::do_one(Random& random) {
  const size_t i =
      world_.options().seed == 0 ? 0 : random.below(static_cast<uint32_t>(steps_.size()));
  Step step = std::move(steps_[i]);
  if (world_.options().seed == 0) {
    steps_.erase(steps_.begin());
  } else {
    if (i + 1 != steps_.size()) steps_[i] = std::move(steps_.back());
    steps_.pop_back();
  }
  world_.made_progress();
  if (!step.copy->is_store) {
    load_piece(step);
  } else if (step.read.empty()) {
    read_piece(step);
    steps_.push_back(std::move(step));
  } else {
    write_piece(step);
  }
}

void BulkCopies::load_piece(Step& step) {
  Copy& c = *step.copy;
  Memory& memory = world_.memory();
  const Reader by{&c.proxied, &c.seen, c.thread, c.block_id, c.own, c.launch->rank};
  for (uint32_t at = step.offset; at < step.offset + step.num_bytes; at += 16) {
    LaneValue value;
    memory.read_plain(c.global + at, 16, value.bytes, by);
    memcpy(c.shared + at, value.bytes, 16);
  }
  memory.settle(c.shared + step.offset, step.num_bytes);
  PhaseBarrier& b = c.block->barriers[static_cast<size_t>(c.barrier)];
  b.num_missing_bytes -= step.num_bytes;
  if (--c.num_left == 0) {
    --b.num_copies;
    --c.block->num_loads;
  }
  flip_if_complete(world_, b);
}

void BulkCopies::read_piece(Step& step) {
  Copy& c = *step.copy;
  // Of shared memory it sees what its writers have fenced, nothing else for sure.
  const Reader by{&kNothing, &c.seen, c.thread, c.block_id, c.own, kMaxRanks};
  step.read.resize(step.num_bytes / 16);
  for (uint32_t i = 0; i < step.num_bytes / 16; ++i) {
    world_.memory().read_plain(c.shared + step.offset + i * 16, 16, step.read[i].bytes, by);
  }
  --c.group->num_unread;
  Thread* const owner = c.group->owner;
  if (owner != nullptr && owner->wait == Wait::kBulkRead && is_over(*owner)) world_.wake(*owner);
}

void BulkCopies::write_piece(Step& step) {
  Copy& c = *step.copy;
  Memory& memory = world_.memory();
  Thread* const owner = c.group->owner;
  const Writer by{c.thread, c.block_id, c.order, 0, static_cast<uint8_t>(c.launch->rank), c.warp};
  for (uint32_t i = 0; i < step.num_bytes / 16; ++i) {
    const RecordRef ref = memory.write(
        c.global + step.offset + i * 16, step.read[i].bytes, 16, by, false, nullptr, false, true);
    if (!Memory::is_valid(ref)) continue;
    if (owner != nullptr) {
      c.group->records.push_back(ref);
    } else {
      memory.find(ref)->is_pending_bulk = false;
      c.launch->unpublished.push_back(ref);
    }
  }
  --c.group->num_unwritten;
  if (owner != nullptr && owner->wait == Wait::kBulkAll && is_over(*owner)) world_.wake(*owner);
  if (--c.launch->num_unwritten == 0) world_.end_if_over(*c.launch);
}

}  // namespace moebius::simt
