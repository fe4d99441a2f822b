#include "simt/memory.h"

#include <algorithm>

namespace moebius::simt {

Memory::Memory() : heads_(kBuckets, kNone) {}

void Memory::configure(bool is_weak, int laziness, int num_ranks, Random* random) {
  is_weak_ = is_weak;
  laziness_ = laziness;
  num_ranks_ = num_ranks;
  random_ = random;
}

// `is_soon`: words that others poll; a run would only get longer.
uint64_t Memory::draw_deadline(bool is_soon) {
  if (laziness_ == 0) return now_;
  if (is_soon) return now_ + random_->below(laziness_ == 1 ? 8 : 100);
  switch (laziness_ == 3 ? 2 + random_->below(2) : random_->below(4)) {
    case 0:
      return now_;
    case 1:
      return now_ + random_->below(64);
    case 2:
      return now_ + random_->below(4000);
    default:
      return now_ + 4000 + random_->below(laziness_ == 1 ? 1000 : 100000);
  }
}

const Release* Memory::read_old(
    const void* p, size_t n, void* out, const Reader& by, uint32_t head) {
  const uintptr_t granule = granule_of(p), first = reinterpret_cast<uintptr_t>(p) & 15;
  const uint16_t all = mask_of(p, n);
  uint16_t unsettled = all;
  auto* bytes = static_cast<uint8_t*>(out);
  for (uint32_t i = head; i != kNone && unsettled != 0; i = records_[i].next) {
    const Record& r = records_[i];
    const uint16_t mask = r.mask & unsettled;
    if (r.granule != granule || mask == 0) continue;
    if (is_visible(r, by)) {
      if (mask == all) return r.release;
      unsettled &= static_cast<uint16_t>(~mask);
    } else {
      for (size_t b = first; b < first + n; ++b) {
        if (mask >> b & 1) bytes[b - first] = r.old[b];
      }
    }
  }
  if (unsettled != all || base_.empty()) return nullptr;
  const auto found = base_.find(reinterpret_cast<uintptr_t>(p));
  return found == base_.end() ? nullptr : found->second;
}

RecordRef Memory::write(void* p,
                        const void* data,
                        size_t n,
                        const Writer& by,
                        bool is_soon,
                        const Release* release,
                        bool is_sync,
                        bool is_bulk) {
  if (!is_weak_) {
    memcpy(p, data, n);
    return {kNone, 0};
  }
  const uintptr_t granule = granule_of(p), first = reinterpret_cast<uintptr_t>(p) & 15;
  const uint16_t mask = mask_of(p, n);
  const size_t b = bucket_of(granule);
  bool is_known = false;
  for (uint32_t i = heads_[b]; i != kNone; i = records_[i].next) {
    Record& r = records_[i];
    if (r.granule != granule) continue;
    if (!is_known && !is_sync && !is_bulk && r.thread == by.thread && r.mask == mask &&
        r.order > by.fenced && r.warp_stamp == 0 && r.proxy_stamp == 0 && r.rank_stamp == 0 &&
        r.release == nullptr && !r.is_pending_bulk && r.deadline > now_) {
      // Nobody had to see what was there between, and nobody did.
      r.order = by.order;
      memcpy(p, data, n);
      return {kNone, 0};
    }
    is_known = true;
    break;
  }
  if (is_known) {
    drop_expired(b, granule);
  } else if (!is_sync && memcmp(p, data, n) == 0) {
    return {kNone, 0};
  }
  if (num_live_ >= kMostLive) sweep();
  uint32_t index;
  if (free_.empty()) {
    index = static_cast<uint32_t>(records_.size());
    records_.push_back({});
  } else {
    index = free_.back();
    free_.pop_back();
  }
  Record& r = records_[index];
  const uint32_t generation = r.generation + 1;
  r = {};
  r.granule = granule;
  r.next = heads_[b];
  r.generation = generation;
  r.deadline = draw_deadline(is_soon);
  r.thread = by.thread;
  r.block = by.block;
  r.order = by.order;
  r.mask = mask;
  r.rank = by.rank;
  r.warp = by.warp;
  r.is_live = true;
  r.is_pending_bulk = is_bulk;
  r.release = release;
  memcpy(r.old + first, p, n);
  memcpy(p, data, n);
  heads_[b] = index;
  ++num_live_;
  return {index, generation};
}

const Release* Memory::newest_release(const void* p, size_t n) const {
  const uintptr_t granule = granule_of(p);
  for (uint32_t i = heads_[bucket_of(granule)]; i != kNone; i = records_[i].next) {
    const Record& r = records_[i];
    if (r.granule == granule && (r.mask & mask_of(p, n)) != 0) return r.release;
  }
  const auto found = base_.find(reinterpret_cast<uintptr_t>(p));
  return found == base_.end() ? nullptr : found->second;
}

const Record* Memory::find_hidden(const void* p, size_t n, const Reader& by) const {
  const uintptr_t granule = granule_of(p);
  Reader now = by;
  for (uint32_t i = heads_[bucket_of(granule)]; i != kNone; i = records_[i].next) {
    const Record& r = records_[i];
    if (r.granule != granule || (r.mask & mask_of(p, n)) == 0) continue;
    Record timeless = r;
    timeless.deadline = ~0ull;
    if (!is_visible(timeless, now)) return &r;
  }
  return nullptr;
}

// Older records of the same bytes no longer matter to anybody.
void Memory::drop(size_t b, uint32_t index) {
  const Record dropped = records_[index];
  if (dropped.release != nullptr || !base_.empty()) {
    const uintptr_t word =
        (dropped.granule << 4) + static_cast<unsigned>(__builtin_ctz(dropped.mask));
    if (dropped.release != nullptr) {
      base_[word] = dropped.release;
    } else {
      base_.erase(word);
    }
  }
  uint32_t* link = &heads_[b];
  bool is_older = false;
  while (*link != kNone) {
    const uint32_t i = *link;
    Record& r = records_[i];
    const bool is_it = i == index;
    if (is_older && r.granule == dropped.granule) r.mask &= static_cast<uint16_t>(~dropped.mask);
    if (is_it || (is_older && r.mask == 0)) {
      *link = r.next;
      r.is_live = false;
      free_.push_back(i);
      --num_live_;
    } else {
      link = &r.next;
    }
    is_older |= is_it;
  }
}

void Memory::drop_expired(size_t b, uintptr_t granule) {
  constexpr int kMostKept = 8;
  int num_kept = 0;
  for (uint32_t i = heads_[b]; i != kNone; i = records_[i].next) {
    const Record& r = records_[i];
    if (r.granule != granule) continue;
    // Whether it is hidden for longer than the eight after it is of no interest.
    if (r.deadline <= now_ || (++num_kept > kMostKept && !r.is_pending_bulk)) {
      drop(b, i);
      return drop_expired(b, granule);
    }
  }
}

void Memory::sweep() {
  for (uint32_t i = 0; i < records_.size(); ++i) {
    Record& r = records_[i];
    if (r.is_live && (r.deadline <= now_ || i % 2 == 0)) drop(bucket_of(r.granule), i);
  }
}

void Memory::settle(const void* p, size_t n) {
  if (num_live_ == 0) return;
  const uintptr_t from = granule_of(p), to = granule_of(static_cast<const char*>(p) + n - 1);
  if (n == 0) return;
  if (to - from > num_live_) {
    for (uint32_t i = 0; i < records_.size(); ++i) {
      const Record& r = records_[i];
      if (r.is_live && r.granule >= from && r.granule <= to) drop(bucket_of(r.granule), i);
    }
    return;
  }
  for (uintptr_t granule = from; granule <= to; ++granule) {
    const size_t b = bucket_of(granule);
    for (uint32_t i = heads_[b]; i != kNone;) {
      if (records_[i].granule == granule) {
        drop(b, i);
        i = heads_[b];
      } else {
        i = records_[i].next;
      }
    }
  }
}

bool Memory::settle_all() {
  if (num_live_ == 0) return false;
  // The newest of a granule first: dropping it removes what it covers.
  for (size_t b = 0; b < kBuckets; ++b) {
    while (heads_[b] != kNone) drop(b, heads_[b]);
  }
  return true;
}

void Memory::clear() {
  if (num_live_ != 0) {
    std::fill(heads_.begin(), heads_.end(), kNone);
    for (uint32_t i = 0; i < records_.size(); ++i) {
      if (!records_[i].is_live) continue;
      records_[i].is_live = false;
      free_.push_back(i);
    }
    num_live_ = 0;
  }
  base_.clear();
  releases_.clear();  // stamps go on: what ended remembers some
}

}  // namespace moebius::simt
