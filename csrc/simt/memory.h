// Weak memory. What is written goes to the real bytes at once; a record keeps what was there
// before, and whoever is not yet entitled to the new value may be given the old one. README.md has
// the rules.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <deque>
#include <unordered_map>
#include <vector>

#include "simt/random.h"

namespace moebius::simt {

constexpr int kMaxRanks = 40;
constexpr int kMaxWarps = 32;  // of a block

// What a thread is entitled to see: of its block's warps, of its rank, and of every rank, all that
// was stamped up to here. Stamps come from one counter; zero is no stamp.
struct View {
  uint32_t rank = 0;
  uint32_t ranks[kMaxRanks] = {};
  uint32_t warps[kMaxWarps] = {};

  void merge_ranks(const View& other, int num_ranks) {
    for (int r = 0; r < num_ranks; ++r) {
      if (other.ranks[r] > ranks[r]) ranks[r] = other.ranks[r];
    }
  }
  void merge(const View& other, int num_ranks, int num_warps) {
    if (other.rank > rank) rank = other.rank;
    merge_ranks(other, num_ranks);
    for (int w = 0; w < num_warps; ++w) {
      if (other.warps[w] > warps[w]) warps[w] = other.warps[w];
    }
  }
};

// What the reader of a released word comes to know.
struct Release {
  View seen, proxied;
  int rank = 0;
  bool is_sys = false;  // for other ranks too
};

struct RecordRef {
  uint32_t index, generation;
};

// A store to one 16-byte granule that not everybody is entitled to see.
struct Record {
  uintptr_t granule;
  uint32_t next;  // of the bucket; newest first
  uint32_t generation;
  uint64_t deadline;  // in steps; from then on everybody sees it
  uint64_t thread, block;
  uint32_t order;  // of the thread's stores
  // When it became known to its block, to the block's bulk copies, to its rank, to all ranks.
  uint32_t warp_stamp, proxy_stamp, rank_stamp, sys_stamp;
  uint16_t mask;  // bytes that were written
  uint8_t rank, warp;
  bool is_live, is_pending_bulk;
  const Release* release;  // what the word tells its readers
  uint8_t old[16];
};

// Who reads, by which proxy.
struct Reader {
  const View* view;    // what it knows by the proxy it reads through
  const View* fences;  // warps' stamps up to which fenced stores are known; null: generic proxy
  uint64_t thread, block;
  uint32_t own;  // of its own stores it sees this many
  int rank;
};

struct Writer {
  uint64_t thread, block;
  uint32_t order;
  uint32_t fenced;  // own stores before its last proxy fence
  uint8_t rank, warp;
};

class Memory {
 public:
  Memory();

  // `laziness` 0: everybody sees everything at once; 3: most stores stay hidden for long.
  void configure(bool is_weak, int laziness, int num_ranks, Random* random);
  bool is_weak() const { return is_weak_; }
  int num_ranks() const { return num_ranks_; }
  void advance() { ++now_; }

  // [p, p + n) lies within one granule. Returns what the value read releases, or null.
  const Release* read(const void* p, size_t n, void* out, const Reader& by) {
    memcpy(out, p, n);
    const uint32_t head = heads_[bucket(p)];
    if (head == kNone && base_.empty()) return nullptr;
    return read_old(p, n, out, by, head);
  }
  void read_plain(const void* p, size_t n, void* out, const Reader& by) {
    memcpy(out, p, n);
    const uint32_t head = heads_[bucket(p)];
    if (head != kNone) read_old(p, n, out, by, head);
  }
  // Returns an invalid reference where nothing needs to be remembered.
  RecordRef write(void* p,
                  const void* data,
                  size_t n,
                  const Writer& by,
                  bool is_soon,
                  const Release* release,
                  bool is_sync,
                  bool is_bulk);
  // What the newest value of the word releases.
  const Release* newest_release(const void* p, size_t n) const;
  // A live record of the granule that `by` is not entitled to, or null.
  const Record* find_hidden(const void* p, size_t n, const Reader& by) const;
  // Everybody sees what is in [p, p + n).
  void settle(const void* p, size_t n);
  // Everybody sees everything. Returns whether there was anything to see.
  bool settle_all();
  // Forgets all, releases included: nobody runs.
  void clear();

  Record* find(RecordRef ref) {
    Record& r = records_[ref.index];
    return r.is_live && r.generation == ref.generation ? &r : nullptr;
  }
  static bool is_valid(RecordRef ref) { return ref.index != kNone; }
  uint32_t stamp() { return ++stamp_; }
  Release* new_release() { return &releases_.emplace_back(); }
  size_t num_live() const { return num_live_; }

 private:
  static constexpr uint32_t kNone = ~0u;
  static constexpr size_t kBuckets = 1 << 16;
  static constexpr size_t kMostLive = 1 << 18;

  static uintptr_t granule_of(const void* p) { return reinterpret_cast<uintptr_t>(p) >> 4; }
  static size_t bucket_of(uintptr_t granule) {
    return (granule * 0x9e3779b97f4a7c15u) >> 48 & (kBuckets - 1);
  }
  static size_t bucket(const void* p) { return bucket_of(granule_of(p)); }
  static uint16_t mask_of(const void* p, size_t n) {
    return static_cast<uint16_t>(((1u << n) - 1) << (reinterpret_cast<uintptr_t>(p) & 15));
  }

  bool is_visible(const Record& r, const Reader& by) const;
  const Release* read_old(const void* p, size_t n, void* out, const Reader& by, uint32_t head);
  uint64_t draw_deadline(bool is_soon);
  void drop(size_t bucket, uint32_t index);  // it is seen by all, and what is older is gone
  void drop_expired(size_t bucket, uintptr_t granule);
  void sweep();

  bool is_weak_ = true;
  int laziness_ = 0;
  int num_ranks_ = 1;
  Random* random_ = nullptr;
  uint64_t now_ = 1;
  uint32_t stamp_ = 0;
  size_t num_live_ = 0;
  std::vector<uint32_t> heads_;
  std::vector<Record> records_;
  std::vector<uint32_t> free_;
  std::unordered_map<uintptr_t, const Release*> base_;  // by words without a record
  std::deque<Release> releases_;
};

inline bool Memory::is_visible(const Record& r, const Reader& by) const {
  if (r.deadline <= now_) return true;
  if (r.is_pending_bulk) return false;
  if (r.thread == by.thread && r.order <= by.own) return true;
  if (r.block == by.block) {
    if (r.warp_stamp != 0 && r.warp_stamp <= by.view->warps[r.warp]) return true;
    if (by.fences != nullptr && r.proxy_stamp != 0 && r.proxy_stamp <= by.fences->warps[r.warp]) {
      return true;
    }
  }
  if (r.rank == by.rank && r.rank_stamp != 0 && r.rank_stamp <= by.view->rank) return true;
  return r.sys_stamp != 0 && r.sys_stamp <= by.view->ranks[r.rank];
}

}  // namespace moebius::simt
