// The network between ranks that cannot reach each other's memory: puts arrive late, in pieces, in
// any order, and only a put's own signal waits for its data.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <array>
#include <cstddef>
#include <map>
#include <memory>
#include <vector>

#include "simt/machine.h"
#include "simt/random.h"

namespace moebius::simt {

class Network {
 public:
  explicit Network(World& world) : world_(world) {}

  // Memory that every rank has alike: an address in one's own stands for the same place in
  // another's.
  void register_symmetric(int rank, void* base, size_t num_bytes);

  // Posts the copy of `num_bytes` from `from` to the place of `to` at rank `dst`; then, with a
  // `signal`, its word. Addresses are the poster's own; `from` is read late.
  void put(Thread& by,
           int dst,
           void* to,
           const void* from,
           size_t num_bytes,
           uint64_t* signal,
           uint64_t word);
  void put_word32(Thread& by, int dst, uint32_t* to, uint32_t word);
  // What this rank posts from here on arrives after what it has posted to the same rank before.
  void fence(const Thread& by) { ++num_fences_[rank_of(by)]; }
  // Whether all that `rank` has posted has arrived.
  bool is_quiet(int rank) const { return num_open_[static_cast<size_t>(rank)] == 0; }
  static size_t rank_of(const Thread& by);

  // Requests of a rank that carried data, and those that were a word only.
  uint64_t num_puts(int rank) const { return num_puts_[static_cast<size_t>(rank)]; }
  uint64_t num_words(int rank) const { return num_words_[static_cast<size_t>(rank)]; }

  bool is_empty() const { return steps_.empty(); }
  void do_one(Random& random);  // not empty
  void clear();

 private:
  struct Put {
    int src, dst;
    uint64_t num_fences;  // of `src` when it was posted
    std::byte* to;        // in the memory of `dst`
    const std::byte* from;
    uint64_t* signal;  // likewise; null for none
    uint64_t word;
    size_t word_bytes;
    size_t num_left;  // pieces
    // Who posted it: what it knew is what is sent.
    View seen;
    uint64_t thread, block;
  };
  struct Step {
    std::shared_ptr<Put> put;
    size_t offset, num_bytes;
    std::vector<uint8_t> read;
    bool is_read;
  };

  std::byte* at(int rank, int other, const void* p, size_t num_bytes);
  void add(Thread& by, const std::shared_ptr<Put>& put, size_t num_bytes);
  bool may_arrive(const Put& put) const;
  void arrive(void* to, const void* data, size_t num_bytes);
  void end(const Put& put);

  struct Symmetric {
    std::byte* base = nullptr;
    size_t num_bytes = 0;
  };
  World& world_;
  std::array<Symmetric, kMaxRanks> symmetric_;
  std::array<uint64_t, kMaxRanks> num_fences_{}, num_open_{}, num_puts_{}, num_words_{};
  std::vector<Step> steps_;
  std::vector<std::shared_ptr<Put>> open_;  // not arrived
};

}  // namespace moebius::simt
