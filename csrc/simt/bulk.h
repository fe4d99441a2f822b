// Bulk copies between global and shared memory: in pieces, late, in any order.
#pragma once

#include <stdint.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "simt/machine.h"
#include "simt/random.h"

namespace moebius::simt {

class BulkCopies {
 public:
  explicit BulkCopies(World& world) : world_(world) {}

  void load(Thread& by, void* shared, const void* global, uint32_t num_bytes, const void* barrier);
  void store(Thread& by, void* global, const void* shared, uint32_t num_bytes);
  void commit(Thread& by);
  // Whether a wait of `by` for all but its last `most_pending` groups is over.
  static bool is_over(const Thread& by);
  void end_wait(Thread& by, bool is_for_writes);
  void end_thread(Thread& by);

  bool is_empty() const { return steps_.empty(); }
  void do_one(Random& random);  // of the steps under way; not empty
  void clear() { steps_.clear(); }

 private:
  struct Copy {
    std::byte* global;
    std::byte* shared;
    bool is_store;
    uint64_t thread, block_id;
    uint32_t order, own;
    uint8_t warp;
    View seen, proxied;  // of the thread when it issued the copy
    Block* block;        // loads, and stores that are not read yet
    std::shared_ptr<Launch> launch;
    int barrier;       // of the block; loads
    int num_left = 0;  // pieces
    std::shared_ptr<BulkGroup> group;
  };
  struct Step {
    std::shared_ptr<Copy> copy;
    uint32_t offset, num_bytes;
    std::vector<LaneValue> read;  // stores: what was read and is yet to be written
  };

  void add(const std::shared_ptr<Copy>& copy, uint32_t num_bytes);
  void load_piece(Step& step);
  void read_piece(Step& step);
  void write_piece(Step& step);

  World& world_;
  std::vector<Step> steps_;
};

}  // namespace moebius::simt
