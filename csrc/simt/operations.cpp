// Accesses, fences and what they make known.
#include "simt/operations.h"

#include <string.h>

#include <algorithm>

namespace moebius::simt {
namespace {

bool is_shared(const void* p) {
  return static_cast<size_t>(static_cast<const std::byte*>(p) - World::shared_arena()) <
         World::kArenaBytes;
}

std::string hex(const void* p) {
  char text[32];
  snprintf(text, sizeof text, "%p", p);
  return text;
}

void remember(Thread& by, RecordRef ref) {
  if (!Memory::is_valid(ref)) return;
  by.unsynced.push_back(ref);
  by.unfenced.push_back(ref);
}

}  // namespace

void preempt() { world().preempt(*current); }

void check_access(const void* p, size_t n, bool is_gpu_atomic) {
  Thread& by = *current;
  if (reinterpret_cast<uintptr_t>(p) % n != 0) {
    world().fail("misaligned access of " + std::to_string(n) + " bytes at " + hex(p));
  }
  if (!is_shared(p)) return world().check_global(by, p, n, is_gpu_atomic);
  const std::byte* const shared = by.block->shared;
  const auto offset = static_cast<const std::byte*>(p) - shared;
  if (offset < 0 || offset + n > by.block->launch->shape().shared_bytes) {
    world().fail("access of " + std::to_string(n) + " bytes at " + std::to_string(offset) +
                 " of its block's " + std::to_string(by.block->launch->shape().shared_bytes) +
                 " bytes of shared memory");
  }
}

void read(const void* p, size_t n, void* out) {
  touch();
  check_access(p, n);
  world().memory().read_plain(p, n, out, current->reader());
}

void write(void* p, size_t n, const void* data) {
  touch();
  check_access(p, n);
  World& w = world();
  Thread& by = *current;
  if (memcmp(p, data, n) != 0) w.made_progress();
  ++by.num_stores;
  remember(by, w.memory().write(p, data, n, by.writer(), false, nullptr, false, false));
}

void read_constant(const void* p, size_t n, void* out) {
  touch();
  check_access(p, n);
  Thread& by = *current;
  Reader reader = by.reader();
  reader.own = 0;
  if (const Record* r = world().memory().find_hidden(p, n, reader)) {
    world().fail("load_stream at " + hex(p) + " of what rank " + std::to_string(r->rank) +
                 " wrote, and the kernel's start does not follow");
  }
  memcpy(out, p, n);
}

const Release* publish(Thread& by, bool is_sys, const Release* sequence) {
  Memory& memory = world().memory();
  if (!memory.is_weak()) return nullptr;
  const uint32_t stamp = memory.stamp();
  std::vector<RecordRef>& of_rank = world().known_to_rank(by.block->launch->rank);
  auto mark = [&](Record& r, RecordRef ref) {
    r.rank_stamp = stamp;
    if (is_sys) {
      r.sys_stamp = stamp;
    } else {
      of_rank.push_back(ref);
    }
  };
  if (is_sys) {
    size_t kept = 0;
    for (const RecordRef ref : of_rank) {
      Record* const r = memory.find(ref);
      if (r == nullptr) continue;
      const bool is_known = r->rank_stamp <= by.seen.rank || r->thread == by.id ||
                            (r->block == by.block->id && r->warp_stamp != 0 &&
                             r->warp_stamp <= by.seen.warps[r->warp]);
      if (is_known) {
        r->sys_stamp = stamp;
      } else {
        of_rank[kept++] = ref;
      }
    }
    of_rank.resize(kept);
  }
  for (const RecordRef ref : by.unsynced) {
    if (Record* const r = memory.find(ref)) {
      r->warp_stamp = stamp;
      mark(*r, ref);
    }
  }
  if (!by.unsynced.empty()) by.seen.warps[by.warp] = stamp;
  by.unsynced.clear();
  for (int w = 0; w < by.block->num_warps; ++w) {
    std::vector<RecordRef>& synced = by.block->warps[static_cast<size_t>(w)].synced;
    size_t n = 0;
    for (; n < synced.size(); ++n) {
      Record* const r = memory.find(synced[n]);
      if (r == nullptr) continue;
      if (r->warp_stamp > by.seen.warps[w]) break;
      mark(*r, synced[n]);
    }
    synced.erase(synced.begin(), synced.begin() + static_cast<std::ptrdiff_t>(n));
  }
  Release& release = *memory.new_release();
  release.seen = by.seen;
  release.proxied = by.proxied;
  release.rank = by.block->launch->rank;
  release.is_sys = is_sys;
  release.seen.rank = stamp;
  if (is_sys) release.seen.ranks[release.rank] = stamp;
  if (sequence != nullptr) {
    const int n = memory.num_ranks();
    release.seen.merge_ranks(sequence->seen, n);
    if (sequence->rank == release.rank) release.proxied.merge(sequence->proxied, n, 0);
  }
  return &release;
}

void acquire(Thread& by, const Release* release) {
  if (release == nullptr) return;
  const int n = world().memory().num_ranks();
  if (release->rank == by.block->launch->rank) {
    by.seen.merge(release->seen, n, 0);
    by.proxied.merge(release->proxied, n, 0);
  } else if (release->is_sys) {
    by.seen.merge_ranks(release->seen, n);
  }
}

namespace {

// For the fence that may follow a relaxed read.
void hear(Thread& by, const Release* release) {
  if (release == nullptr) return;
  const int n = world().memory().num_ranks();
  if (!by.has_heard) by.heard = Release{};
  by.has_heard = true;
  by.heard.rank = by.block->launch->rank;
  if (release->rank == by.heard.rank) {
    by.heard.seen.merge(release->seen, n, 0);
    by.heard.proxied.merge(release->proxied, n, 0);
  } else if (release->is_sys) {
    by.heard.seen.merge_ranks(release->seen, n);
  }
}

}  // namespace

void read_word(const void* p, size_t n, void* out, Order order) {
  touch();
  check_access(p, n);
  Thread& by = *current;
  const Release* const release = world().memory().read(p, n, out, by.reader());
  if (order == Order::kAcquire) {
    acquire(by, release);
  } else {
    hear(by, release);
  }
}

void write_word(void* p, size_t n, const void* data, Order order) {
  touch();
  check_access(p, n);
  World& w = world();
  Thread& by = *current;
  if (memcmp(p, data, n) != 0) w.made_progress();
  const Release* const release = order == Order::kRelease ? publish(by, true, nullptr) : by.fence;
  ++by.num_stores;
  remember(by, w.memory().write(p, data, n, by.writer(), true, release, true, false));
}

void begin_update(void* p, size_t n, Order order, Scope scope) {
  touch();
  check_access(p, n, scope == Scope::kGpu);
  const Release* const release = world().memory().newest_release(p, n);
  if (order == Order::kRelaxed) {
    hear(*current, release);
  } else {
    acquire(*current, release);
  }
}

void end_update(void* p, size_t n, const void* data, Order order, Scope scope) {
  World& w = world();
  Thread& by = *current;
  if (memcmp(p, data, n) != 0) w.made_progress();
  const Release* release = w.memory().newest_release(p, n);
  if (order != Order::kRelaxed) {
    release = publish(by, scope == Scope::kSys, release);
  } else if (by.fence != nullptr) {
    // Reads of the result follow both the fence and what the word released before.
    Release& both = *w.memory().new_release();
    both = *by.fence;
    if (release != nullptr) {
      both.seen.merge(release->seen, w.memory().num_ranks(), 0);
      both.proxied.merge(release->proxied, w.memory().num_ranks(), 0);
    }
    release = &both;
  }
  ++by.num_stores;
  remember(by, w.memory().write(p, data, n, by.writer(), true, release, true, false));
}

void fence_sys() {
  touch();
  Thread& by = *current;
  if (by.has_heard) acquire(by, &by.heard);
  by.has_heard = false;
  by.fence = publish(by, true, nullptr);
}

void fence_proxy(bool is_global) {
  touch();
  Thread& by = *current;
  if (is_global) by.proxied = by.seen;
  by.num_fenced = by.num_stores;
  by.fenced.insert(by.fenced.end(), by.unfenced.begin(), by.unfenced.end());
  by.unfenced.clear();
}

void synchronise(Thread* const* threads, int num_threads) {
  World& w = *threads[0]->block->launch->world;
  Memory& memory = w.memory();
  Block& block = *threads[0]->block;
  w.made_progress();
  uint32_t stamp = 0;
  bool is_same = true;
  View seen = threads[0]->seen, proxied = threads[0]->proxied;
  for (int i = 0; i < num_threads; ++i) {
    Thread& t = *threads[i];
    if (!t.unsynced.empty() || !t.fenced.empty() || !t.unsynced_barriers.empty()) {
      if (stamp == 0) stamp = memory.stamp();
      for (const RecordRef ref : t.unsynced) {
        if (Record* const r = memory.find(ref)) {
          r->warp_stamp = stamp;
          block.warps[static_cast<size_t>(t.warp)].synced.push_back(ref);
        }
      }
      for (const RecordRef ref : t.fenced) {
        if (Record* const r = memory.find(ref)) r->proxy_stamp = stamp;
      }
      for (const int b : t.unsynced_barriers) {
        block.barriers[static_cast<size_t>(b)].init_stamp = stamp;
      }
      t.unsynced.clear();
      t.fenced.clear();
      t.unsynced_barriers.clear();
      seen.warps[t.warp] = stamp;
    }
    if (i > 0) {
      is_same = is_same && memcmp(&t.seen, &threads[0]->seen, sizeof t.seen) == 0 &&
                memcmp(&t.proxied, &threads[0]->proxied, sizeof t.proxied) == 0;
      if (is_same) continue;
      seen.merge(t.seen, memory.num_ranks(), block.num_warps);
      proxied.merge(t.proxied, memory.num_ranks(), block.num_warps);
    }
  }
  if (is_same && stamp == 0) return;
  for (int i = 0; i < num_threads; ++i) {
    threads[i]->seen = seen;
    threads[i]->proxied = proxied;
  }
}

void arrive(Thread& by, PhaseBarrier& barrier) {
  Memory& memory = world().memory();
  Block& block = *by.block;
  if (!by.unsynced.empty()) {
    const uint32_t stamp = memory.stamp();
    for (const RecordRef ref : by.unsynced) {
      if (Record* const r = memory.find(ref)) {
        r->warp_stamp = stamp;
        block.warps[static_cast<size_t>(by.warp)].synced.push_back(ref);
      }
    }
    by.unsynced.clear();
    by.seen.warps[by.warp] = stamp;
  }
  barrier.seen.merge(by.seen, memory.num_ranks(), block.num_warps);
  barrier.proxied.merge(by.proxied, memory.num_ranks(), block.num_warps);
}

}  // namespace moebius::simt
