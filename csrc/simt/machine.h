// What runs: threads in warps in blocks in launches on streams.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/memory.h"
#include "simt/site.h"

namespace moebius::simt {

constexpr int kWarpSize = 32;
constexpr int kMaxNamedBarriers = 16;  // of a block; 0 is the block's own

struct Block;
struct Launch;
struct Stream;
struct Thread;
class World;

enum class Wait : uint8_t {
  kNone,
  kRelax,
  kSyncBlock,
  kSyncGroup,
  kSyncWarp,
  kBallot,
  kShuffle,
  kBarrier,
  kBulkRead,
  kBulkAll,
  kPreviousKernel,
};
const char* name_of(Wait wait);

// Bulk stores between two commits of a thread.
struct BulkGroup {
  Thread* owner = nullptr;  // null once it has ended
  int num_unread = 0, num_unwritten = 0;
  std::vector<RecordRef> records;
};

struct Thread {
  Context context;
  std::byte* stack = nullptr;
  Block* block = nullptr;
  int index = 0, lane = 0, warp = 0;
  uint64_t id = 0;
  int budget = 0;     // operations until others get a turn
  int num_turns = 0;  // that ended so, since it last waited
  Wait wait = Wait::kNone;
  Site site;
  const void* awaited = nullptr;
  int most_pending = 0;  // groups, of a bulk wait
  bool is_done = false;

  View seen, proxied;  // through ordinary accesses, and through the bulk copies it issues
  uint32_t num_stores = 0, num_fenced = 0;
  std::vector<RecordRef> unsynced;  // stores that only it knows
  std::vector<RecordRef> unfenced;  // stores that bulk copies may not see
  std::vector<RecordRef> fenced;    // and those they may once the block has synchronised
  std::vector<int> unsynced_barriers;
  Release heard;  // by relaxed loads; known at the next fence
  bool has_heard = false;
  const Release* fence = nullptr;  // what relaxed stores after a fence release

  std::shared_ptr<BulkGroup> open_group;
  std::deque<std::shared_ptr<BulkGroup>> groups;

  Writer writer() const;
  Reader reader() const;
};

struct alignas(16) LaneValue {
  uint8_t bytes[16];
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  Thread* lanes[kWarpSize] = {};
  uint32_t ready = 0;     // lanes that can run
  uint32_t relaxing = 0;  // and those of them that poll
  uint32_t done = 0;
  int list = -1, position = 0;    // in the scheduler
  std::vector<RecordRef> synced;  // stores of this warp known in the block, by stamp
  // The warp function under way.
  Wait meeting = Wait::kNone;
  uint32_t arrived = 0, votes = 0;
  LaneValue in[kWarpSize], out[kWarpSize];
  uint8_t from[kWarpSize];
};

struct Meeting {
  int expected = 0;
  std::vector<Thread*> arrived;
};

// An mbarrier whose phase one arrival completes, with the bytes that it announces.
struct PhaseBarrier {
  const void* address = nullptr;
  int phase = 0;
  bool has_arrived = false;
  int64_t num_missing_bytes = 0;
  int num_copies = 0;  // under way
  uint64_t init_thread = 0;
  int init_warp = 0;
  uint32_t init_stamp = 0;
  bool is_init_fenced = false;
  View seen, proxied;  // of those that arrived
  std::vector<Thread*> waiting;
};

struct Block {
  Launch* launch = nullptr;
  int index = 0;
  uint64_t id = 0;
  int num_warps = 0, num_alive = 0;
  std::byte* shared = nullptr;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Thread>> threads;
  Meeting meetings[kMaxNamedBarriers];
  std::deque<PhaseBarrier> barriers;
  int num_loads = 0;  // bulk loads under way
  bool has_let_next_start = false;
};

struct Shape {
  int num_blocks = 1, num_threads = 32;
  size_t shared_bytes = 0;
};

// What a launch is before it runs: what a capture keeps.
struct LaunchRecipe {
  std::string name;
  std::function<void()> body;
  Shape shape;
};

struct Launch : std::enable_shared_from_this<Launch> {
  World* world = nullptr;
  Stream* stream = nullptr;
  std::shared_ptr<const LaunchRecipe> recipe;
  int rank = 0;
  std::vector<int> to_start;  // blocks, the last one first
  int most_resident = 1;
  std::vector<Block*> resident;
  int num_ended = 0, num_letting_next_start = 0;
  int num_unwritten = 0;  // pieces of bulk stores, of threads that ended included
  bool is_started = false, is_early = false, is_over = false;
  bool is_early_allowed = false;    // decided when it was enqueued
  bool has_waited = false;          // for the previous kernel
  bool has_let_next_start = false;  // asked for it, before its end
  std::vector<Thread*> waiting;     // for it
  View start, end;
  std::vector<RecordRef> unpublished;  // of blocks that ended
  std::shared_ptr<Launch> previous;    // that it may overlap with

  const Shape& shape() const { return recipe->shape; }
  bool can_next_start() const {
    return is_started && num_letting_next_start == recipe->shape.num_blocks;
  }
};

using Graph = std::vector<std::shared_ptr<const LaunchRecipe>>;

struct Stream {
  World* world = nullptr;
  int rank = 0;
  std::deque<std::shared_ptr<Launch>> launches;  // not over; the first ones run
  View end;                                      // of all that is over
  bool is_capturing = false;
  uint64_t num_captures = 0;  // begun so far
  Graph captured;
};

inline Writer Thread::writer() const {
  return {id,
          block->id,
          num_stores,
          num_fenced,
          static_cast<uint8_t>(block->launch->rank),
          static_cast<uint8_t>(warp)};
}
inline Reader Thread::reader() const {
  return {&seen, nullptr, id, block->id, ~0u, block->launch->rank};
}

}  // namespace moebius::simt
