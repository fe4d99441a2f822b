// Weak memory in small: what may be seen, what must not, over many seeds.
#include <vector>

#include "check.h"
#include "cuda/device.cuh"

using namespace moebius;
using namespace moebius::cuda;
using namespace moebius::simt_test;

namespace {

constexpr int kSeeds = 200;
constexpr int kWords = 24;

struct Memory {
  alignas(16) uint32_t data[kWords][4];
  alignas(16) uint64_t flag;
  alignas(16) uint32_t count;
  alignas(16) uint64_t second_flag;
  alignas(16) uint32_t seen[kWords];
  alignas(16) uint32_t other[kWords];
};

enum class By {
  kReleaseAcquire,
  kFences,
  kRelaxedStore,
  kRelaxedLoad,
  kFenceAfterStore,
  kNoBarrier,
  kGpuThenSys,
  kGpuOnly,
  kProxyFence,
  kNoProxyFence,
};

struct LitmusParams {
  Memory* m;
  By by;
};

void poll(const uint64_t* p, bool is_acquire) {
  while ((is_acquire ? load_acquire_sys(p) : load_relaxed_sys(p)) == 0) relax();
}

// Rank 0: 24 threads of a warp write, thread 32 of the other warp tells.
MOEBIUS_KERNEL(64) write_kernel(MOEBIUS_PARAMS LitmusParams p) {
  if (thread_index() < kWords) store(&p.m->data[thread_index()][0], 7u);
  if (p.by == By::kGpuThenSys || p.by == By::kGpuOnly) {
    // Block 1 tells what block 0 wrote.
    sync_block();
    if (thread_index() == 0) add_acq_rel_gpu(&p.m->count, 1);
    if (block_index() == 0 || thread_index() != 0) return;
    while (add_acq_rel_gpu(&p.m->count, 0) != 2) relax();
    if (p.by == By::kGpuOnly) {
      store_relaxed_sys(&p.m->flag, 1);
    } else {
      store_release_sys(&p.m->flag, 1);
    }
    return;
  }
  if (p.by != By::kNoBarrier) sync_block();
  if (thread_index() != kWarp) return;
  switch (p.by) {
    case By::kFences:
      fence_acq_rel_sys();
      store_relaxed_sys(&p.m->flag, 1);
      break;
    case By::kRelaxedStore:
      store_relaxed_sys(&p.m->flag, 1);
      break;
    case By::kFenceAfterStore:
      store_relaxed_sys(&p.m->flag, 1);
      fence_acq_rel_sys();
      break;
    default:
      store_release_sys(&p.m->flag, 1);
  }
}

// Rank 1: thread 0 is told, all read.
MOEBIUS_KERNEL(64) read_kernel(MOEBIUS_PARAMS LitmusParams p) {
  if (thread_index() == 0) {
    poll(&p.m->flag, p.by != By::kFences && p.by != By::kRelaxedLoad);
    if (p.by == By::kFences) fence_acq_rel_sys();
  }
  sync_block();
  if (thread_index() < kWords) {
    store(&p.m->seen[thread_index()], load(&p.m->data[thread_index()][0]));
  }
}

// Rank 1, through a bulk load.
MOEBIUS_KERNEL(32) bulk_read_kernel(MOEBIUS_PARAMS LitmusParams p) {
  auto* const barrier = reinterpret_cast<Barrier*>(shared_memory());
  auto* const rows = reinterpret_cast<uint32_t*>(shared_memory() + 16);
  if (lane() == 0) {
    barrier_init(barrier);
    fence_barrier_init();
    poll(&p.m->flag, true);
    if (p.by == By::kProxyFence) fence_proxy_async();
  }
  sync_warp();
  warp_bulk_load(rows, p.m->data, sizeof p.m->data, barrier);
  barrier_wait(barrier, 0);
  if (lane() < kWords) store(&p.m->seen[lane()], load(rows + lane() * 4));
}

// Rank 1 passes on to rank 2 what rank 0 said.
MOEBIUS_KERNEL(32) pass_on_kernel(MOEBIUS_PARAMS LitmusParams p) {
  if (thread_index() != 0) return;
  poll(&p.m->flag, true);
  store_release_sys(&p.m->second_flag, 1);
}
MOEBIUS_KERNEL(32) read_passed_on_kernel(MOEBIUS_PARAMS LitmusParams p) {
  if (thread_index() == 0) poll(&p.m->second_flag, true);
  sync_warp();
  if (thread_index() < kWords) {
    store(&p.m->seen[thread_index()], load(&p.m->data[thread_index()][0]));
  }
}

// Values only grow; whoever reads twice must not see them shrink.
MOEBIUS_KERNEL(32) count_up_kernel(MOEBIUS_PARAMS LitmusParams p) {
  for (uint32_t i = 1; i <= 20; ++i) {
    if (lane() < kWords) store(&p.m->data[lane()][lane() % 4], i);
    if (i % 5 == 0) fence_acq_rel_sys();
  }
}
MOEBIUS_KERNEL(32) watch_kernel(MOEBIUS_PARAMS LitmusParams p) {
  uint32_t last = 0, num_back = 0;
  for (int i = 0; i < 30 && lane() < kWords; ++i) {
    const uint32_t v = load(&p.m->data[lane()][lane() % 4]);
    num_back += v < last;
    last = v;
    if (i % 3 == 0) relax();
  }
  if (lane() < kWords) store(&p.m->other[lane()], num_back);
}

// Words missing over all seeds.
int missing(void (*writer)(LitmusParams),
            int num_blocks,
            void (*reader)(LitmusParams),
            By by,
            void (*between)(LitmusParams) = nullptr) {
  int num_missing = 0;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    simt::Options options = seeded(seed);
    options.most_resident = -1;  // a block waits for the other
    simt::World world(options);
    Memory m{};
    const LitmusParams params{&m, by};
    launch(reader,
           LaunchShape{1, reader == read_kernel ? 64 : 32, 512},
           params,
           world.new_stream(between != nullptr ? 2 : 1));
    if (between != nullptr) launch(between, LaunchShape{1, 32, 0}, params, world.new_stream(1));
    launch(writer, LaunchShape{num_blocks, 64, 0}, params, world.new_stream(0));
    const std::string failure = failure_of(world);
    REQUIRE(failure.empty(), "%s", failure.c_str());
    for (const uint32_t seen : m.seen) num_missing += seen != 7;
  }
  return num_missing;
}

void message_passing() {
  REQUIRE(missing(write_kernel, 1, read_kernel, By::kReleaseAcquire) == 0, "release, acquire");
  REQUIRE(missing(write_kernel, 1, read_kernel, By::kFences) == 0, "fences");
  REQUIRE(missing(write_kernel, 1, read_kernel, By::kRelaxedStore) > 0, "relaxed store");
  REQUIRE(missing(write_kernel, 1, read_kernel, By::kFenceAfterStore) > 0, "late fence");
  REQUIRE(missing(write_kernel, 1, read_kernel, By::kRelaxedLoad) > 0, "relaxed load");
  REQUIRE(missing(write_kernel, 1, read_kernel, By::kNoBarrier) > 0, "no barrier");
}

void scopes() {
  REQUIRE(missing(write_kernel, 2, read_kernel, By::kGpuThenSys) == 0, "device, then system");
  REQUIRE(missing(write_kernel, 2, read_kernel, By::kGpuOnly) > 0, "device only");
}

void cumulativity() {
  REQUIRE(missing(write_kernel, 1, read_passed_on_kernel, By::kReleaseAcquire, pass_on_kernel) == 0,
          "passed on");
}

void proxies() {
  REQUIRE(missing(write_kernel, 1, bulk_read_kernel, By::kProxyFence) == 0, "proxy fence");
  REQUIRE(missing(write_kernel, 1, bulk_read_kernel, By::kNoProxyFence) > 0, "no proxy fence");
}

void coherence() {
  int num_stale = 0;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    simt::World world(seeded(seed));
    Memory m{};
    launch(count_up_kernel, LaunchShape{1, 32, 0}, LitmusParams{&m, {}}, world.new_stream(0));
    launch(watch_kernel, LaunchShape{1, 32, 0}, LitmusParams{&m, {}}, world.new_stream(1));
    REQUIRE(failure_of(world).empty(), "coherence");
    for (const uint32_t num_back : m.other) num_stale += static_cast<int>(num_back);
    for (int i = 0; i < kWords; ++i) REQUIRE(m.data[i][i & 3] == 20, "the last value stays");
  }
  REQUIRE(num_stale == 0, "values went back %d times", num_stale);
}

void seeds_repeat() {
  std::vector<std::vector<uint32_t>> seen[2];
  for (auto& runs : seen) {
    for (uint64_t seed = 1; seed <= 40; ++seed) {
      simt::World world(seeded(seed));
      Memory m{};
      const LitmusParams params{&m, By::kRelaxedStore};
      launch(read_kernel, LaunchShape{1, 64, 0}, params, world.new_stream(1));
      launch(write_kernel, LaunchShape{1, 64, 0}, params, world.new_stream(0));
      REQUIRE(failure_of(world).empty(), "seed");
      runs.emplace_back(m.seen, m.seen + kWords);
    }
  }
  REQUIRE(seen[0] == seen[1], "a seed gives one run");
}

constexpr Check kChecks[] = {
    {"message_passing", message_passing},
    {"scopes", scopes},
    {"cumulativity", cumulativity},
    {"proxies", proxies},
    {"coherence", coherence},
    {"seeds_repeat", seeds_repeat},
};

}  // namespace

int main(int argc, char** argv) { return run_checks(kChecks, argc, argv); }
