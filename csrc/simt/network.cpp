#include "simt/network.h"

#include <string.h>

#include <algorithm>
#include <string>

#include "simt/operations.h"
#include "simt/world.h"

namespace moebius::simt {

size_t Network::rank_of(const Thread& by) { return static_cast<size_t>(by.block->launch->rank); }

void Network::register_symmetric(int rank, void* base, size_t num_bytes) {
  symmetric_.at(static_cast<size_t>(rank)) = {static_cast<std::byte*>(base), num_bytes};
}

// Where `p`, of `rank`'s memory, is in that of `other`.
std::byte* Network::at(int rank, int other, const void* p, size_t num_bytes) {
  if (other < 0 || other >= kMaxRanks) world_.fail("a put to rank " + std::to_string(other));
  const Symmetric& mine = symmetric_[static_cast<size_t>(rank)];
  const Symmetric& theirs = symmetric_[static_cast<size_t>(other)];
  const auto offset = static_cast<size_t>(static_cast<const std::byte*>(p) - mine.base);
  if (mine.base == nullptr || theirs.base == nullptr || offset > theirs.num_bytes ||
      num_bytes > theirs.num_bytes - offset) {
    world_.fail("a put of " + std::to_string(num_bytes) + " bytes outside of symmetric memory");
  }
  return theirs.base + offset;
}

void Network::add(Thread& by, const std::shared_ptr<Put>& put, size_t num_bytes) {
  constexpr size_t kMostPieces = 6;  // arbitrary; more would only cost time
  Random& random = world_.random();
  put->num_fences = num_fences_[static_cast<size_t>(put->src)];
  put->seen = by.seen;
  put->thread = by.id;
  put->block = by.block->id;
  ++num_open_[static_cast<size_t>(put->src)];
  open_.push_back(put);
  size_t done = 0, pieces = 0;
  while (done < num_bytes) {
    size_t n = num_bytes - done;
    if (world_.options().seed != 0 && n > 1 && pieces + 1 < kMostPieces) {
      n = 1 + random.below(static_cast<uint32_t>(n));
    }
    steps_.push_back({put, done, n, {}, false});
    done += n;
    ++pieces;
  }
  put->num_left = pieces;
  if (pieces == 0) steps_.push_back({put, 0, 0, {}, true});
}

void Network::put(Thread& by,
                  int dst,
                  void* to,
                  const void* from,
                  size_t num_bytes,
                  uint64_t* signal,
                  uint64_t word) {
  const int src = by.block->launch->rank;
  auto made = std::make_shared<Put>();
  made->src = src;
  made->dst = dst;
  made->to = num_bytes != 0 ? at(src, dst, to, num_bytes) : nullptr;
  made->from = static_cast<const std::byte*>(from);
  made->signal =
      signal != nullptr ? reinterpret_cast<uint64_t*>(at(src, dst, signal, sizeof word)) : nullptr;
  made->word = word;
  made->word_bytes = sizeof word;
  ++(num_bytes != 0 ? num_puts_ : num_words_)[static_cast<size_t>(src)];
  add(by, made, num_bytes);
}

void Network::put_word32(Thread& by, int dst, uint32_t* to, uint32_t word) {
  const int src = by.block->launch->rank;
  auto made = std::make_shared<Put>();
  made->src = src;
  made->dst = dst;
  made->to = nullptr;
  made->from = nullptr;
  made->signal = reinterpret_cast<uint64_t*>(at(src, dst, to, sizeof word));
  made->word = word;
  made->word_bytes = sizeof word;
  ++num_words_[static_cast<size_t>(src)];
  add(by, made, 0);
}

bool Network::may_arrive(const Put& put) const {
  return std::none_of(open_.begin(), open_.end(), [&](const std::shared_ptr<Put>& other) {
    return other->src == put.src && other->dst == put.dst && other->num_fences < put.num_fences;
  });
}

// The network writes for all to see at once.
void Network::arrive(void* to, const void* data, size_t num_bytes) {
  world_.memory().settle(to, num_bytes);
  memcpy(to, data, num_bytes);
  world_.made_progress();
}

void Network::end(const Put& put) {
  if (put.signal != nullptr) arrive(put.signal, &put.word, put.word_bytes);
  --num_open_[static_cast<size_t>(put.src)];
  open_.erase(std::find_if(
      open_.begin(), open_.end(), [&](const std::shared_ptr<Put>& p) { return p.get() == &put; }));
}

void Network::do_one(Random& random) {
  size_t i = world_.options().seed == 0 ? 0 : random.below(static_cast<uint32_t>(steps_.size()));
  // The oldest may always arrive, so there is one.
  while (steps_[i].is_read && !may_arrive(*steps_[i].put)) i = (i + 1) % steps_.size();
  Step step = std::move(steps_[i]);
  steps_.erase(steps_.begin() + static_cast<std::ptrdiff_t>(i));
  world_.made_progress();
  Put& put = *step.put;
  if (!step.is_read) {
    const Reader by{&put.seen, nullptr, put.thread, put.block, ~0u, put.src};
    step.read.resize(step.num_bytes);
    for (size_t b = 0; b < step.num_bytes; ++b) {
      world_.memory().read_plain(put.from + step.offset + b, 1, &step.read[b], by);
    }
    step.is_read = true;
    steps_.push_back(std::move(step));
    return;
  }
  if (step.num_bytes != 0) arrive(put.to + step.offset, step.read.data(), step.num_bytes);
  if (put.num_left == 0 || --put.num_left == 0) end(put);
}

void Network::clear() {
  steps_.clear();
  open_.clear();
  num_open_.fill(0);
}

void put_signal(
    int dst, void* to, const void* from, size_t num_bytes, uint64_t* signal, uint64_t word) {
  touch();
  world().network().put(*current, dst, to, from, num_bytes, signal, word);
}

void put_word32(int dst, uint32_t* to, uint32_t word) {
  touch();
  world().network().put_word32(*current, dst, to, word);
}

void network_fence() {
  touch();
  world().network().fence(*current);
}

void network_quiet(const Site& site) {
  while (!world().network().is_quiet(current->block->launch->rank)) relax(site);
}

}  // namespace moebius::simt
