// What the host sees: streams, launches, captures, memory.
#include "simt/world.h"

#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>

#include "simt/operations.h"

namespace moebius::simt {
namespace {

std::mutex mutex;
std::atomic<int> num_waiting{0};

// The lock of all worlds, which a thread that runs one gives up now and then.
class Hold {
 public:
  Hold() { take(); }
  ~Hold() { mutex.unlock(); }
  static bool is_awaited() { return num_waiting.load(std::memory_order_relaxed) != 0; }
  void give_others_a_turn() {
    if (!is_awaited()) return;
    mutex.unlock();
    for (int i = 0; i < 100 && is_awaited(); ++i) sched_yield();
    take();
  }
  void sleep_us(int64_t us) {
    mutex.unlock();
    const timespec time{0, static_cast<long>(us * 1000)};
    nanosleep(&time, nullptr);
    take();
  }

 private:
  static void take() {
    num_waiting.fetch_add(1, std::memory_order_relaxed);
    mutex.lock();
    num_waiting.fetch_sub(1, std::memory_order_relaxed);
  }
};

constexpr size_t kSharedSpacing = 256 << 10;
constexpr int kSlice = 256;  // steps

void check(const Options& options) {
  if (options.num_ranks < 1 || options.num_ranks > kMaxRanks) {
    throw Error("a world has 1 to " + std::to_string(kMaxRanks) + " ranks (got " +
                std::to_string(options.num_ranks) + ")");
  }
  if (options.max_shared_bytes > kSharedSpacing) {
    throw Error("a block has at most " + std::to_string(kSharedSpacing) +
                " bytes of shared memory (got " + std::to_string(options.max_shared_bytes) + ")");
  }
}

}  // namespace

std::byte* World::shared_arena() {
  static std::byte* const arena = [] {
    void* const p = mmap(nullptr,
                         kArenaBytes,
                         PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                         -1,
                         0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return static_cast<std::byte*>(p);
  }();
  return arena;
}

// Of all worlds, as an address tells whether memory is shared.
std::vector<std::byte*>& World::free_shared() {
  static std::vector<std::byte*> list;
  return list;
}

std::byte* World::take_shared() {
  static size_t num_taken = 0;
  if (free_shared().empty()) {
    if ((num_taken + 1) * kSharedSpacing > kArenaBytes) throw std::bad_alloc();
    return shared_arena() + kSharedSpacing * num_taken++;
  }
  std::byte* const shared = free_shared().back();
  free_shared().pop_back();
  return shared;
}

World::World(const Options& options) : options_(options), bulk_(*this), network_(*this) {
  check(options);
  configure();
}

World::~World() {
  Hold hold;
  stop_all();
}

World& World::process() {
  static World* const world = new World;  // outlives what other static objects still hold
  return *world;
}

void World::reset(const Options& options) {
  Hold hold;
  check(options);
  stop_all();
  options_ = options;
  configure();
}

Stream* World::new_stream(int rank) {
  Hold hold;
  if (rank < 0 || rank >= options_.num_ranks) {
    throw Error("a stream of rank " + std::to_string(rank) + " of " +
                std::to_string(options_.num_ranks));
  }
  streams_.push_back(std::make_unique<Stream>());
  Stream* const stream = streams_.back().get();
  stream->world = this;
  stream->rank = rank;
  return stream;
}

void World::free_stream(Stream* stream) {
  if (!has_failed() && !is_idle(stream)) synchronize(stream);
  Hold hold;
  streams_.erase(std::find_if(
      streams_.begin(), streams_.end(), [&](const auto& s) { return s.get() == stream; }));
}

void World::launch(Stream* stream, std::shared_ptr<const LaunchRecipe> recipe) {
  Hold hold;
  const Shape& shape = recipe->shape;
  if (shape.num_blocks < 1 || shape.num_threads < 1 || shape.num_threads > kMaxWarps * kWarpSize ||
      shape.num_threads % kWarpSize != 0 || shape.shared_bytes > options_.max_shared_bytes) {
    throw Error("launch of " + recipe->name + ": " + std::to_string(shape.num_blocks) +
                " blocks of " + std::to_string(shape.num_threads) + " threads with " +
                std::to_string(shape.shared_bytes) + " bytes of shared memory");
  }
  if (stream->is_capturing) {
    stream->captured.push_back(std::move(recipe));
    return;
  }
  ++num_calls_;
  ++counters_.num_launches;
  auto launch = std::make_shared<Launch>();
  launch->world = this;
  launch->stream = stream;
  launch->rank = stream->rank;
  launch->start = host_;
  const bool is_seeded = options_.seed != 0;
  if (!stream->launches.empty()) {
    launch->previous = stream->launches.back();
    launch->is_early_allowed = options_.is_programmatic && is_seeded && !random_.one_in(4);
  }
  for (int b = shape.num_blocks; b-- > 0;) launch->to_start.push_back(b);
  launch->most_resident = shape.num_blocks;
  if (options_.most_resident > 0) {
    launch->most_resident = std::min(options_.most_resident, shape.num_blocks);
  } else if (is_seeded && options_.most_resident == 0 && random_.one_in(4)) {
    launch->most_resident =
        1 + static_cast<int>(random_.below(static_cast<uint32_t>(shape.num_blocks)));
  }
  if (is_seeded) {
    for (size_t i = launch->to_start.size(); i > 1; --i) {
      std::swap(launch->to_start[i - 1], launch->to_start[random_.below(static_cast<uint32_t>(i))]);
    }
  }
  launch->recipe = std::move(recipe);
  stream->launches.push_back(launch);
  running_.push_back(std::move(launch));
}

bool World::may_start(const Stream& stream, size_t i) {
  const Launch& launch = *stream.launches[i];
  if (launch.is_started) return false;
  return i == 0 || (launch.is_early_allowed && stream.launches[i - 1]->can_next_start());
}

void World::start_launches() {
  for (const auto& stream : streams_) {
    for (size_t i = 0; i < stream->launches.size(); ++i) {
      if (stream->launches[i]->is_started) continue;
      if (!may_start(*stream, i)) break;
      Launch& launch = *stream->launches[i];
      // Whoever starts before the one ahead has ended knows no more than that one did; and as it
      // could have, it is told no more if that one has just ended.
      const Launch* const previous = launch.previous.get();
      launch.is_early = previous != nullptr && !previous->is_over;
      if (launch.is_early ||
          (previous != nullptr && launch.is_early_allowed && previous->has_let_next_start)) {
        launch.start.merge(previous->start, memory_.num_ranks(), 0);
      } else {
        launch.start.merge(stream->end, memory_.num_ranks(), 0);
      }
      launch.end = launch.start;
      launch.is_started = true;
      starting_.push_back(&launch);
    }
  }
}

bool World::start_something() {
  start_launches();
  const size_t n = starting_.size();
  if (n == 0) return false;
  const size_t first = options_.seed != 0 ? random_.below(static_cast<uint32_t>(n)) : 0;
  for (size_t i = 0; i < n; ++i) {
    const size_t at = (first + i) % n;
    Launch& launch = *starting_[at];
    if (static_cast<int>(launch.resident.size()) >= launch.most_resident) continue;
    start_block(launch);
    if (launch.to_start.empty()) starting_.erase(starting_.begin() + static_cast<long>(at));
    return true;
  }
  return false;
}

void World::end_if_over(Launch& launch) {
  if (launch.is_over || launch.num_ended != launch.shape().num_blocks ||
      launch.num_unwritten != 0) {
    return;
  }
  if (launch.is_early && !launch.has_waited && !launch.previous->is_over) {
    record_failure(launch.recipe->name +
                   ": the kernel has ended before the one ahead of it, and never called "
                   "wait_for_previous_kernel: what follows waits for nothing");
    return;
  }
  is_quiet_ = false;
  launch.is_over = true;
  const uint32_t stamp = memory_.stamp();
  for (const RecordRef ref : launch.unpublished) {
    Record* const r = memory_.find(ref);
    if (r == nullptr || r->rank_stamp != 0) continue;
    r->rank_stamp = stamp;
    known_to_rank_[launch.rank].push_back(ref);
  }
  launch.end.rank = stamp;
  Stream& stream = *launch.stream;
  stream.end.merge(launch.end, memory_.num_ranks(), 0);
  launch.previous = nullptr;
  for (const auto& next : stream.launches) {
    if (next->previous.get() != &launch) continue;
    for (Thread* t : next->waiting) wake(*t);
    next->waiting.clear();
  }
  const auto is_it = [&](const std::shared_ptr<Launch>& l) { return l.get() == &launch; };
  const auto keep = launch.shared_from_this();
  running_.erase(std::find_if(running_.begin(), running_.end(), is_it));
  stream.launches.erase(std::find_if(stream.launches.begin(), stream.launches.end(), is_it));
}

void World::begin_capture(Stream* stream) {
  Hold hold;
  if (stream->is_capturing) throw Error("begin_capture: the stream is capturing");
  stream->is_capturing = true;
  ++stream->num_captures;
  stream->captured.clear();
}

Graph World::end_capture(Stream* stream) {
  Hold hold;
  if (!stream->is_capturing) throw Error("end_capture: the stream is not capturing");
  stream->is_capturing = false;
  return std::move(stream->captured);
}

void World::replay(const Graph& graph, Stream* stream) {
  for (const auto& recipe : graph) launch(stream, recipe);
}

bool World::is_idle(const Stream* stream) {
  Hold hold;
  return stream != nullptr ? stream->launches.empty() : running_.empty();
}

void World::synchronize(const Stream* stream) {
  Hold hold;
  for (;;) {
    if (has_failed()) throw Error(failure_);
    if (stream != nullptr ? stream->launches.empty() : running_.empty()) break;
    Outcome outcome = Outcome::kWorked;
    for (int i = 0; i < kSlice && outcome == Outcome::kWorked && !has_failed(); ++i) {
      outcome = step();
      if (hold.is_awaited()) break;
    }
    if (outcome == Outcome::kWaiting) {
      hold.sleep_us(100);
    } else {
      hold.give_others_a_turn();
    }
  }
  if (running_.empty()) {
    for (auto& known : known_to_rank_) known.clear();
    memory_.clear();
  } else if (stream != nullptr) {
    // The host has seen what the stream did: whoever is launched from now on may rely on it.
    const uint32_t stamp = memory_.stamp();
    std::vector<RecordRef>& known = known_to_rank_[stream->rank];
    size_t kept = 0;
    for (const RecordRef ref : known) {
      Record* const r = memory_.find(ref);
      if (r == nullptr) continue;
      if (r->rank_stamp <= stream->end.rank) {
        r->sys_stamp = stamp;
      } else {
        known[kept++] = ref;
      }
    }
    known.resize(kept);
    host_.merge_ranks(stream->end, memory_.num_ranks());
    host_.ranks[stream->rank] = stamp;
  }
}

void World::register_memory(int rank, void* base, size_t num_bytes) {
  Hold hold;
  regions_[reinterpret_cast<uintptr_t>(base)] = {num_bytes, rank};
}

void World::unregister_memory(void* base) {
  Hold hold;
  regions_.erase(reinterpret_cast<uintptr_t>(base));
}

void World::host_wrote(const void* p, size_t num_bytes) {
  Hold hold;
  if (num_bytes != 0) memory_.settle(p, num_bytes);
}

void World::check_global(const Thread& by, const void* p, size_t n, bool is_gpu_atomic) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address < 4096) fail("access of " + std::to_string(n) + " bytes at a null pointer");
  if (!is_gpu_atomic && !options_.is_bounds_checked) return;
  auto above = regions_.upper_bound(address);
  const bool is_inside =
      above != regions_.begin() &&
      address + n <= std::prev(above)->first + std::prev(above)->second.num_bytes;
  if (!is_inside) {
    if (options_.is_bounds_checked) fail("access of memory that is not registered");
    return;
  }
  const int rank = std::prev(above)->second.rank;
  if (is_gpu_atomic && rank >= 0 && rank != by.block->launch->rank) {
    fail("an atomic of device scope on memory of rank " + std::to_string(rank));
  }
}

}  // namespace moebius::simt
