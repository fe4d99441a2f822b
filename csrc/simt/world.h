// The devices: all ranks of one process, their streams and their time. One scheduler runs all
// threads; one lock lets the threads of the host in, one at a time.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/runtime.h"
#include "simt/bulk.h"
#include "simt/machine.h"
#include "simt/memory.h"
#include "simt/network.h"
#include "simt/random.h"

namespace moebius::simt {

// Something a kernel did that the device does not allow, or a deadlock. The world has stopped:
// `reset` before anything else.
struct Error : cuda::DeviceError {
  explicit Error(const std::string& text) : cuda::DeviceError("simt", 1, text) {}
};

struct Options {
  uint64_t seed = 0;               // 0: threads and copies in order, nothing late
  bool is_memory_weak = true;      // seed 0 hides nothing
  int num_ranks = 8;               // most; at most kMaxRanks
  int most_resident = 0;           // blocks of a launch at once; 0: by the seed, -1: all
  bool is_programmatic = true;     // kernels may start before the one ahead of them has ended
  bool is_bounds_checked = false;  // global memory is what was registered, nothing else
  int64_t patience_us = 0;  // of real time, before virtual time is let go on: others may yet launch
  int64_t most_idle_ns = 4ll * 3600 * 1000000000;  // virtual, after which polling is a deadlock
  // Virtual time jumps no further at once while nothing but polling happens: finer than any
  // deadline that a delayed thread is to keep.
  int64_t longest_jump_ns = 4ll * 3600 * 1000000000;
  int num_multiprocessors = 4;
  size_t max_shared_bytes = 227 << 10;
};

struct Counters {
  uint64_t num_switches = 0, num_launches = 0, num_bulk_steps = 0, num_idle_jumps = 0;
};

class World {
 public:
  explicit World(const Options& options = {});
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  // The one that runtime.cpp and streams without a world of their own use.
  static World& process();

  // Drops everything that runs and starts over with other options; streams and memory stay.
  void reset(const Options& options);
  const Options& options() const { return options_; }

  Stream* new_stream(int rank);
  void free_stream(Stream* stream);
  void launch(Stream* stream, std::shared_ptr<const LaunchRecipe> recipe);
  void begin_capture(Stream* stream);
  Graph end_capture(Stream* stream);
  void replay(const Graph& graph, Stream* stream);
  bool is_idle(const Stream* stream);
  // Runs until the stream, or every stream, has nothing left. Throws what went wrong.
  void synchronize(const Stream* stream);
  void run_until_idle() { synchronize(nullptr); }

  void register_memory(int rank, void* base, size_t num_bytes);
  void unregister_memory(void* base);
  // The host wrote there.
  void host_wrote(const void* p, size_t num_bytes);

  uint64_t now_ns() const { return now_ns_; }
  const Counters& counters() const { return counters_; }

  // For the functions of the device.
  Memory& memory() { return memory_; }
  BulkCopies& bulk() { return bulk_; }
  Network& network() { return network_; }
  Random& random() { return random_; }
  // Stores that a rank's threads can know and those of other ranks cannot.
  std::vector<RecordRef>& known_to_rank(int rank) { return known_to_rank_[rank]; }
  void check_global(const Thread& by, const void* p, size_t n, bool is_gpu_atomic);
  [[noreturn]] void fail(std::string what);      // on a fiber
  void record_failure(const std::string& what);  // elsewhere
  bool has_failed() const { return !failure_.empty(); }
  void block_thread(Thread& thread, Wait wait, const Site& site, const void* awaited);
  void preempt(Thread& thread);
  void relax(Thread& thread, const Site& site);
  void wake(Thread& thread);
  void made_progress() { is_quiet_ = false; }
  void let_next_start(Block& block);
  void end_if_over(Launch& launch);
  Context& scheduler() { return scheduler_; }
  void end_thread(Thread& thread);
  std::string describe_blocked() const;
  static std::string name_of(const Thread& thread);
  static std::byte* shared_arena();
  static constexpr size_t kArenaBytes = size_t{1} << 31;

 private:
  enum class Outcome { kWorked, kDone, kWaiting };

  Outcome step();
  Outcome poll();  // only pollers are left
  void record_failure_of_current(std::string what);
  void poll_again(Thread& thread, const Site& site);
  bool start_something();
  bool has_copies() const { return !bulk_.is_empty() || !network_.is_empty(); }
  void do_copy();  // one step of one under way
  bool start_block(Launch& launch);
  void start_launches();
  bool may_start(const Stream& stream, size_t i);
  void run_warp(Warp& warp);
  void resume(Thread& thread);
  bool is_slow(const Block& block) const;
  void reclassify(Warp& warp);
  void unlist(Warp& warp);
  void retire(Block& block);
  void stop_all();
  void configure();
  Block* take_block();
  static std::byte* take_shared();
  static std::vector<std::byte*>& free_shared();
  static std::vector<std::unique_ptr<Thread>>& free_threads();

  Options options_;
  Random random_;
  Memory memory_;
  BulkCopies bulk_;
  Network network_;
  Context scheduler_;
  std::string failure_;

  std::vector<RecordRef> known_to_rank_[kMaxRanks];
  View host_;  // what a launch may take for granted
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<Block*> blocks_;  // resident
  std::vector<std::unique_ptr<Block>> free_blocks_;
  std::vector<Launch*> starting_;  // blocks are yet to start
  std::vector<Warp*> lists_[2];    // that can run; that only poll
  std::vector<std::shared_ptr<Launch>> running_;

  struct Region {
    size_t num_bytes;
    int rank;
  };
  std::map<uintptr_t, Region> regions_;

  uint64_t now_ns_ = 1000000;
  uint64_t next_id_ = 1;
  uint64_t num_calls_ = 0;  // of launch
  uint64_t idle_since_call_ = 0;
  int64_t idle_since_ns_ = -1;
  int64_t next_jump_ns_ = 1000, idle_ns_ = 0;
  size_t poller_ = 0, num_polled_ = 0;
  bool is_quiet_ = false;  // nothing happened since the pollers were last asked
  int preempt_mean_ = 0, bulk_rate_ = 1, slow_rank_ = -1;
  uint32_t slow_blocks_ = 0;  // one block in so many
  Counters counters_;
};

// The thread that runs now. Only the holder of the lock touches it.
extern Thread* current;

inline World& world() { return *current->block->launch->world; }

}  // namespace moebius::simt
