// What the executor refuses, and what it says of threads that wait for ever.
#include <functional>
#include <vector>

#include "check.h"
#include "cuda/device.cuh"

using namespace moebius;
using namespace moebius::cuda;
using namespace moebius::simt_test;

namespace {

struct Words {
  alignas(16) uint32_t w[64];
  alignas(16) uint64_t flag;
};

struct CallParams {
  Words* m;
  void (*body)(Words*);
};

MOEBIUS_KERNEL(1024) call_kernel(MOEBIUS_PARAMS CallParams p) { p.body(p.m); }

// What comes of one launch of `body`, by the seeds in turn until one fails.
std::string failure_of_body(void (*body)(Words*), uint64_t first_seed = 0) {
  for (uint64_t seed = first_seed; seed < first_seed + 20; ++seed) {
    simt::World world(seeded(seed));
    Words words{};
    Words others{};
    world.register_memory(0, &words, sizeof words);
    world.register_memory(1, &others, sizeof others);
    words.w[63] = 0;
    launch(call_kernel, LaunchShape{1, 64, 1024}, CallParams{&words, body}, world.new_stream(0));
    const std::string failure = failure_of(world);
    if (!failure.empty()) return failure;
  }
  return "";
}

void deadlocks_name_the_site() {
  int line = 0;
  static int expected_line;
  std::string text = failure_of_body([](Words*) {
    if (thread_index() == 5) return;
    expected_line = __LINE__ + 1;
    sync_block();
  });
  line = expected_line;
  require_text(text, "deadlock");
  require_text(text, "kernel(CallParams) of rank 0, block 0 of 1");
  require_text(text, "threads 0-4, 6-63 in sync_block at");
  require_text(text, ("machine_test.cpp:" + std::to_string(line)).c_str());
  require_text(text, "missing: 5\n");
  require_text(text, "threads 5 have ended");
  text = failure_of_body([](Words*) {
    if (warp_index() == 0) sync_group(3, 64);
  });
  require_text(text, "threads 0-31 in sync_group");
  require_text(text, "32 of 64 threads have come to barrier 3");
  text = failure_of_body([](Words*) {
    if (lane() != 7) {
      sync_warp();
    } else {
      sync_block();
    }
  });
  require_text(text, "missing: 7");
  require_text(text, "threads 7, 39 in sync_block");
  text = failure_of_body([](Words* m) {
    if (thread_index() == 0) {
      while (load_acquire_sys(&m->flag) == 0) relax();
    }
    sync_block();
  });
  require_text(text, "polling without end");
  require_text(text, "threads 0 in relax at");
  for (uint64_t first_seed = 0; first_seed < 8; ++first_seed) {
    text = failure_of_body(
        [](Words* m) {
          while (load_acquire_sys(&m->flag) == 0) {
          }
        },
        first_seed);
    require_text(text, "polling without end");
    require_text(text, "it does not call relax");
  }
  text = failure_of_body([](Words*) {
    auto* const b = reinterpret_cast<Barrier*>(shared_memory()) + warp_index();
    if (lane() == 0) barrier_init(b);
    sync_warp();
    barrier_wait(b, 0);
  });
  require_text(text, "in barrier_wait at");
  require_text(text, "nothing was loaded in this phase");
}

void divergence_is_refused() {
  std::string text = failure_of_body([](Words*) {
    if (lane() == 3) {
      ballot(true);
    } else {
      shfl(1, 0);
    }
  });
  require_text(text, "divergent warp");
  require_text(text, "ballot");
  require_text(text, "shfl");
  text = failure_of_body([](Words*) {
    if (lane() == 31) return;
    shfl_xor(1, 1);
  });
  require_text(text, "shfl");
  require_text(text, "end");
  text = failure_of_body([](Words*) { sync_group(1, warp_index() == 0 ? 64 : 32); });
  REQUIRE(!text.empty(), "different counts");
}

void bad_accesses_are_refused() {
  require_text(failure_of_body([](Words*) { load(static_cast<const uint32_t*>(nullptr)); }),
               "null");
  require_text(failure_of_body([](Words* m) {
                 load(reinterpret_cast<const uint32_t*>(reinterpret_cast<std::byte*>(m) + 2));
               }),
               "misaligned access of 4 bytes");
  require_text(failure_of_body(
                   [](Words*) { store(reinterpret_cast<uint32_t*>(shared_memory() + 1024), 1u); }),
               "access of 4 bytes at 1024 of its block's 1024 bytes of shared memory");
  require_text(failure_of_body([](Words* m) {
                 const Vec16* const p = reinterpret_cast<const Vec16*>(m->w);
                 if (thread_index() == 0) store(&m->w[0], 3u);
                 sync_warp();
                 if (thread_index() == 1) store(&m->w[0], 4u);
                 load_stream(p);
               }),
               "load_stream");
  require_text(failure_of_body([](Words* m) {
                 fence_barrier_init();
                 if (lane() == 0) warp_bulk_store(m->w, shared_memory(), 24);
               }),
               "multiples of 16");
  require_text(failure_of_body([](Words* m) { warp_bulk_store(m->w, shared_memory() + 1008, 32); }),
               "outside of the block's shared memory");
  require_text(failure_of_body([](Words* m) {
                 if (warp_index() == 0) {
                   warp_bulk_store(m->w, shared_memory(), 64);
                   bulk_commit();
                 }
               }),
               "before its bulk stores have read their source");
  require_text(failure_of_body([](Words* m) {
                 auto* const b = reinterpret_cast<Barrier*>(shared_memory()) + warp_index();
                 if (lane() == 0) {
                   barrier_init(b);
                   fence_barrier_init();
                 }
                 sync_warp();
                 warp_bulk_load(shared_memory() + 64 + warp_index() * 64, m->w, 64, b);
               }),
               "bulk loads into its shared memory are under way");
}

void scopes_and_bounds_are_checked() {
  Words mine{}, theirs{}, nobodys{};
  for (const bool is_bounds : {false, true}) {
    simt::Options options = seeded(3);
    options.is_bounds_checked = is_bounds;
    simt::World world(options);
    world.register_memory(0, &mine, sizeof mine);
    world.register_memory(1, &theirs, sizeof theirs);
    const auto body = is_bounds ? +[](Words* m) { load(&m->w[0]); }
                                : +[](Words* m) { add_acq_rel_gpu(&m->w[0], 1); };
    launch(call_kernel,
           LaunchShape{1, 32, 0},
           CallParams{is_bounds ? &nobodys : &theirs, body},
           world.new_stream(0));
    require_text(failure_of(world),
                 is_bounds ? "not registered" : "device scope on memory of rank 1");
  }
}

// Atomics, shuffles and named barriers compute what they should.
void functions_compute() {
  const auto body = [](Words* m) {
    int* const count = reinterpret_cast<int*>(shared_memory());
    uint32_t* const bits = reinterpret_cast<uint32_t*>(shared_memory() + 4);
    if (thread_index() == 0) {
      store(count, 0);
      store(bits, 0u);
    }
    sync_block();
    add_shared(count, thread_index());
    or_shared(bits, 1u << lane());
    const int sum = shfl_up(lane(), 1) + shfl_xor(lane(), 3) + shfl(lane(), 35);
    const bool ok = sum == (lane() == 0 ? 0 : lane() - 1) + (lane() ^ 3) + 3 &&
                    ballot(lane() % 3 == 0) == 0x49249249u && shfl(uint64_t{1} << 40, 2) >> 40 == 1;
    if (warp_index() < 2) sync_group(1 + warp_index() / 2, 64);
    add_relaxed_gpu(reinterpret_cast<int32_t*>(&m->w[0]), ok ? 1 : 0);
    exchange_max_gpu(&m->flag, static_cast<uint64_t>(block_index() * 1000 + thread_index()));
    sync_block();
    if (thread_index() == 0) {
      store(&m->w[4 + block_index()], static_cast<uint32_t>(load(count)));
      store(&m->w[8 + block_index()], load(bits));
    }
  };
  for (uint64_t seed = 0; seed < 200; ++seed) {
    simt::World world(seeded(seed));
    Words m{};
    launch(call_kernel, LaunchShape{3, 96, 16}, CallParams{&m, body}, world.new_stream(0));
    const std::string failure = failure_of(world);
    REQUIRE(failure.empty(), "%s", failure.c_str());
    REQUIRE(m.w[0] == 3 * 96 && m.flag == 2095, "seed %d", static_cast<int>(seed));
    for (int b = 0; b < 3; ++b) {
      REQUIRE(m.w[4 + b] == 95 * 96 / 2 && m.w[8 + b] == ~0u, "block %d", b);
    }
  }
}

// A kernel whose blocks wait for each other needs them resident together, which nothing promises.
void residency_is_limited() {
  const auto body = [](Words* m) {
    if (thread_index() != 0) return;
    add_acq_rel_gpu(&m->w[0], 1);
    const uint64_t deadline = now_ns() + 1000000;
    while (load_relaxed_sys(&m->w[0]) < static_cast<uint32_t>(num_blocks())) {
      if (now_ns() > deadline) {
        store(&m->w[1], 1u);
        return;
      }
      relax();
    }
  };
  int num_late = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    simt::World world(seeded(seed));
    Words m{};
    launch(call_kernel, LaunchShape{4, 32, 0}, CallParams{&m, body}, world.new_stream(0));
    REQUIRE(failure_of(world).empty(), "residency");
    num_late += static_cast<int>(m.w[1]);
  }
  REQUIRE(num_late > 0 && num_late < 60, "%d", num_late);
}

void a_world_goes_on_after_reset() {
  simt::World world(seeded(7));
  simt::Stream* const stream = world.new_stream(0);
  Words m{};
  for (int i = 0; i < 3; ++i) {
    launch(call_kernel,
           LaunchShape{2, 64, 0},
           CallParams{&m,
                      [](Words*) {
                        if (thread_index() != 9) sync_block();
                      }},
           stream);
    REQUIRE(!failure_of(world).empty(), "deadlock");
    REQUIRE(!failure_of(world).empty(), "a failure stays until reset");
    world.reset(seeded(8));
    launch(call_kernel,
           LaunchShape{2, 64, 0},
           CallParams{&m, [](Words* w) { store(&w->w[block_index()], 5u); }},
           stream);
    REQUIRE(failure_of(world).empty() && m.w[0] == 5 && m.w[1] == 5, "after reset");
  }
}

void numbers() {
  REQUIRE(e4m3x2(448.0f, -1e9f) == 0xfe7eu && e4m3x2(0.0f, -0.0f) == 0x8000u, "e4m3");
  REQUIRE(e4m3x2(__builtin_nanf(""), 1.0f) == 0x387fu, "e4m3 NaN");
  // Every code, and between neighbours the even one.
  const auto e4m3 = [](uint32_t code) {
    const auto exponent = static_cast<int>(code >> 3 & 15), mantissa = static_cast<int>(code & 7);
    return exponent == 0 ? __builtin_ldexpf(static_cast<float>(mantissa), -9)
                         : __builtin_ldexpf(static_cast<float>(8 + mantissa), exponent - 10);
  };
  for (uint32_t code = 0; code < 0x7e; ++code) {
    const float f = e4m3(code), next = e4m3(code + 1), half = (f + next) / 2;
    REQUIRE(e4m3x2(f, -f) == (code | (code | 0x80) << 8), "code %u", code);
    REQUIRE(e4m3x2(half, 0) == code + (code & 1), "above %u", code);
    REQUIRE(e4m3x2(__builtin_nextafterf(half, 0), 0) == code, "below half of %u", code);
    REQUIRE(e4m3x2(__builtin_nextafterf(half, 1e9f), 0) == code + 1, "above half of %u", code);
  }
  for (uint32_t half = 0; half < 0x10000; ++half) {
    const float f = float_of_fp16(half);
    if (f != f) continue;
    REQUIRE(fp16x2(f, 0.0f) == half, "fp16 %x", half);
    if ((half & 0x7fff) >= 0x7bff) continue;
    const float next = float_of_fp16(half + 1), middle = (f + next) / 2;
    REQUIRE(fp16x2(middle, 0.0f) == half + (half & 1), "fp16 above %x", half);
    REQUIRE(bf16x2(0.0f, float_of(half << 16)) == half << 16 || (half & 0x7f80) == 0x7f80,
            "bf16 %x",
            half);
  }
  REQUIRE(fp16x2(65519.0f, 65520.0f) == 0x7c007bff, "fp16 overflow");
  REQUIRE(fp16x2(__builtin_nanf(""), 0.0f) == 0x7fff && bf16x2(__builtin_nanf(""), 0.0f) == 0x7fff,
          "NaN");
  REQUIRE(bf16x2(float_of(0x3f808000), float_of(0x3f818000)) == 0x3f823f80, "bf16");
  REQUIRE(popcount(0xf0f) == 8 && bits_of(1.0f) == 0x3f800000, "bits");
}

constexpr Check kChecks[] = {
    {"deadlocks_name_the_site", deadlocks_name_the_site},
    {"divergence_is_refused", divergence_is_refused},
    {"bad_accesses_are_refused", bad_accesses_are_refused},
    {"scopes_and_bounds_are_checked", scopes_and_bounds_are_checked},
    {"functions_compute", functions_compute},
    {"residency_is_limited", residency_is_limited},
    {"a_world_goes_on_after_reset", a_world_goes_on_after_reset},
    {"numbers", numbers},
};

}  // namespace

int main(int argc, char** argv) { return run_checks(kChecks, argc, argv); }
