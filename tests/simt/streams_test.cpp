// Streams, captures, time, and several threads of the host.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/device.cuh"
#include "cuda/runtime.h"

using namespace moebius;
using namespace moebius::cuda;
using namespace moebius::simt_test;

namespace {

struct Log {
  alignas(16) uint32_t num;
  uint32_t entries[512];
};

struct NoteParams {
  Log* log;
  uint32_t note;
  bool is_early;  // lets the next one start, and waits for the one ahead late
};

MOEBIUS_KERNEL(64) note_kernel(MOEBIUS_PARAMS NoteParams p) {
  if (p.is_early) let_next_kernel_start();
  wait_for_previous_kernel();
  if (block_index() != 0 || thread_index() != 0) return;
  const uint32_t at = load(&p.log->num);
  store(&p.log->entries[at], p.note);
  store(&p.log->num, at + 1);
}

void launches_of_a_stream_are_in_order() {
  bool did_interleave = false;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    simt::World world(seeded(seed));
    Log logs[2] = {};
    simt::Stream* const streams[2] = {world.new_stream(0), world.new_stream(1)};
    for (uint32_t i = 0; i < 20; ++i) {
      for (int s = 0; s < 2; ++s) {
        launch(note_kernel, LaunchShape{2, 64, 0}, NoteParams{&logs[s], i, i % 2 == 0}, streams[s]);
      }
    }
    world.synchronize(streams[0]);
    did_interleave = did_interleave || (logs[1].num > 0 && logs[1].num < 20);
    REQUIRE(world.is_idle(streams[0]), "idle");
    world.run_until_idle();
    for (const Log& log : logs) {
      REQUIRE(log.num == 20, "%u of 20, seed %d", log.num, static_cast<int>(seed));
      for (uint32_t i = 0; i < 20; ++i)
        REQUIRE(log.entries[i] == i, "seed %d", static_cast<int>(seed));
    }
  }
  REQUIRE(did_interleave, "streams run side by side");
}

struct OverlapParams {
  Log* log;
  bool is_first;
};

// The second runs while the first does, and only then can the first end.
MOEBIUS_KERNEL(32) overlap_kernel(MOEBIUS_PARAMS OverlapParams p) {
  if (p.is_first) {
    let_next_kernel_start();
    if (thread_index() != 0) return;
    const uint64_t deadline = now_ns() + 1000000;
    while (load_relaxed_sys(&p.log->num) == 0 && now_ns() < deadline) relax();
    store(&p.log->entries[0], load_relaxed_sys(&p.log->num));
    return;
  }
  if (thread_index() == 0) store_relaxed_sys(&p.log->num, 1);
  wait_for_previous_kernel();
  if (thread_index() == 0) store(&p.log->entries[1], load(&p.log->entries[0]) + 1);
}

void kernels_overlap_when_they_let_each_other() {
  int num_overlapped = 0;
  for (const bool is_programmatic : {false, true}) {
    for (uint64_t seed = 0; seed < 50; ++seed) {
      simt::Options options = seeded(seed);
      options.is_programmatic = is_programmatic;
      simt::World world(options);
      Log log{};
      simt::Stream* const stream = world.new_stream(0);
      launch(overlap_kernel, LaunchShape{1, 32, 0}, OverlapParams{&log, true}, stream);
      launch(overlap_kernel, LaunchShape{1, 32, 0}, OverlapParams{&log, false}, stream);
      REQUIRE(failure_of(world).empty(), "overlap");
      REQUIRE(log.entries[1] == log.entries[0] + 1, "the wait gives what the first wrote");
      REQUIRE(is_programmatic || log.entries[0] == 0, "no overlap unless programmatic");
      num_overlapped += static_cast<int>(log.entries[0]);
    }
  }
  REQUIRE(num_overlapped > 5 && num_overlapped < 50, "%d", num_overlapped);
}

void a_capture_is_replayed() {
  simt::World world(seeded(5));
  Log log{};
  simt::Stream* const stream = world.new_stream(0);
  world.begin_capture(stream);
  for (uint32_t i = 0; i < 3; ++i) {
    launch(note_kernel, LaunchShape{1, 32, 0}, NoteParams{&log, i, true}, stream);
  }
  const simt::Graph graph = world.end_capture(stream);
  world.run_until_idle();
  REQUIRE(graph.size() == 3 && log.num == 0, "captured, not run");
  for (int i = 0; i < 10; ++i) {
    world.replay(graph, stream);
    launch(note_kernel, LaunchShape{1, 32, 0}, NoteParams{&log, 9, false}, stream);
  }
  world.run_until_idle();
  REQUIRE(log.num == 40, "%u", log.num);
  for (uint32_t i = 0; i < 40; ++i) {
    REQUIRE(log.entries[i] == (i % 4 == 3 ? 9 : i % 4), "entry %u", i);
  }
}

struct MeetParams {
  uint64_t* mine;
  uint64_t* others;
  uint64_t round;
  int64_t timeout_ns;
  uint32_t* num_late;
  uint64_t* waited_ns;
};

MOEBIUS_KERNEL(32) meet_kernel(MOEBIUS_PARAMS MeetParams p) {
  wait_for_previous_kernel();
  if (thread_index() != 0) return;
  store_release_sys(p.mine, p.round);
  const uint64_t start = now_ns();
  while (load_acquire_sys(p.others) < p.round) {
    if (now_ns() - start > static_cast<uint64_t>(p.timeout_ns)) {
      store(p.num_late, load(p.num_late) + 1);
      break;
    }
    relax();
  }
  store(p.waited_ns, now_ns() - start);
}

void deadlines_pass_without_waiting() {
  simt::World world(seeded(2));
  alignas(16) uint64_t words[4] = {};
  alignas(16) uint32_t num_late = 0;
  constexpr int64_t kTimeoutNs = 30ll * 1000000000;
  const auto start = std::chrono::steady_clock::now();
  launch(meet_kernel,
         LaunchShape{1, 32, 0},
         MeetParams{&words[0], &words[2], 1, kTimeoutNs, &num_late, &words[1]},
         world.new_stream(0));
  world.run_until_idle();
  REQUIRE(num_late == 1 && words[1] >= kTimeoutNs && words[1] < 3 * kTimeoutNs, "30 s went by");
  REQUIRE(std::chrono::steady_clock::now() - start < std::chrono::seconds(2), "none of it real");
}

// Each rank has a thread of the host that launches and synchronises by itself.
void threads_of_the_host_share_a_world() {
  simt::Options options = seeded(11);
  options.patience_us = 500000;
  simt::World world(options);
  constexpr int kRounds = 40;
  alignas(16) static uint64_t words[2][2];
  alignas(16) static uint64_t waited[2][2];
  alignas(16) static uint32_t num_late[2][4];
  std::vector<std::thread> threads;
  for (int r = 0; r < 2; ++r) {
    threads.emplace_back([&world, r] {
      simt::Stream* const stream = world.new_stream(r);
      for (uint64_t round = 1; round <= kRounds; ++round) {
        if ((round + static_cast<uint64_t>(r)) % 8 == 0) {
          std::this_thread::sleep_for(std::chrono::milliseconds(5));
        }
        launch(meet_kernel,
               LaunchShape{1, 32, 0},
               MeetParams{words[r], words[1 - r], round, 1000000, num_late[r], waited[r]},
               stream);
        if (round % 3 == 0) world.synchronize(stream);
      }
      world.synchronize(stream);
    });
  }
  for (std::thread& t : threads) t.join();
  REQUIRE(num_late[0][0] == 0 && num_late[1][0] == 0, "deadlines wait for other threads");
  REQUIRE(words[0][0] == kRounds && words[1][0] == kRounds, "all rounds");
}

void the_runtime_allocates_and_copies() {
  auto* const p = static_cast<uint32_t*>(allocate(1000));
  REQUIRE(p[0] == 0 && p[249] == 0 && reinterpret_cast<uintptr_t>(p) % 256 == 0, "zeroed");
  uint32_t values[2] = {3, 4};
  copy(p, values, sizeof values);
  simt::World& world = simt::World::process();
  simt::Stream* const stream = world.new_stream(0);
  Log* const log = static_cast<Log*>(allocate_pinned(sizeof(Log)));
  launch(note_kernel, LaunchShape{1, 32, 0}, NoteParams{log, p[1], false}, stream);
  world.synchronize(stream);
  REQUIRE(log->entries[0] == 4 && log->num == 1, "the kernel wrote");
  world.free_stream(stream);
  release_pinned(log);
  release(p);
  release(nullptr);
  REQUIRE(num_multiprocessors() > 0 && max_shared_bytes() >= 227 << 10, "device");
}

constexpr Check kChecks[] = {
    {"launches_of_a_stream_are_in_order", launches_of_a_stream_are_in_order},
    {"kernels_overlap_when_they_let_each_other", kernels_overlap_when_they_let_each_other},
    {"a_capture_is_replayed", a_capture_is_replayed},
    {"deadlines_pass_without_waiting", deadlines_pass_without_waiting},
    {"threads_of_the_host_share_a_world", threads_of_the_host_share_a_world},
    {"the_runtime_allocates_and_copies", the_runtime_allocates_and_copies},
};

}  // namespace

int main(int argc, char** argv) { return run_checks(kChecks, argc, argv); }
