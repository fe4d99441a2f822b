// The project's kernels, four ranks, a seed per schedule: rounds with rows that name their origin.
// `rounds_test [first seed] [seeds] [rounds]`; prints what a round takes.
#include <chrono>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/engine.h"

using namespace moebius;
using namespace moebius::cuda;
using namespace moebius::simt_test;

namespace {

constexpr int kRanks = 4, kExperts = 8, kTopk = 3, kTokens = 6, kHidden = 64, kLocal = 2;
constexpr int kRows = kRanks * kTokens;

struct Buffers {
  alignas(16) float x[kTokens][kHidden];
  alignas(16) int32_t ids[kTokens][kTopk];
  alignas(16) float weights[kTokens][kTopk];
  alignas(16) float rows[kLocal][kRows][kHidden];
  alignas(16) int32_t src_info[kLocal][kRows];
  alignas(16) int64_t layout_range[kLocal][kRanks];
  alignas(16) int32_t counts[kLocal];
  alignas(16) int32_t sources[kRanks];
  alignas(16) float out[kTokens][kHidden];
  alignas(16) uint64_t handle;
  int num_tokens;
};

float value(int rank, int token, int round, int channel) {
  return static_cast<float>(rank * 4096 + token * 256 + round % 16 * 8 + channel % 8);
}

class Rig {
 public:
  explicit Rig(uint64_t seed, int num_rounds) : num_rounds_(num_rounds), rng_(seed * 977 + 5) {
    simt::World& world = simt::World::process();
    simt::Options options = seeded(seed);
    options.is_bounds_checked = false;
    world.reset(options);
    const moebius::Shape shape{
        kRanks, kExperts, kTopk, kTokens, 2, kHidden * 4, 0, kHidden * 4, true, true};
    std::vector<std::byte*> heaps;
    for (int r = 0; r < kRanks; ++r) {
      const auto num_bytes = static_cast<size_t>(HeapLayout::of(shape).total);
      memory_.push_back(std::make_unique<cuda::Memory>(0, num_bytes));
      heaps.push_back(memory_.back()->data());
      world.register_memory(r, heaps.back(), num_bytes);
      streams_.push_back(world.new_stream(r));
    }
    for (int r = 0; r < kRanks; ++r) {
      const EngineConfig config{
          shape, false, ScaleFormat::kFp32, Dtype::kFp32, kHidden, 1000000000, 2, 0};
      engines_.push_back(std::make_unique<Engine>(config, r, heaps));
    }
    buffers_.resize(static_cast<size_t>(num_rounds) * kRanks);
  }
  ~Rig() {
    for (simt::Stream* s : streams_) {
      try {
        simt::World::process().free_stream(s);
      } catch (const simt::Error&) {
      }
    }
  }

  // Rounds before the host looks again.
  void run() {
    for (int round = 0; round < num_rounds_; ++round) {
      for (int r = 0; r < kRanks; ++r) fill(at(round, r), r, round);
      for (int r = 0; r < kRanks; ++r) send(at(round, r), r);
    }
    simt::World::process().run_until_idle();
    for (int r = 0; r < kRanks; ++r) REQUIRE(!engines_[r]->has_fault(), "rank %d", r);
    for (int round = 0; round < num_rounds_; ++round) {
      for (int r = 0; r < kRanks; ++r) check(round, r);
    }
  }

 private:
  Buffers& at(int round, int rank) {
    auto& b = buffers_[static_cast<size_t>(round) * kRanks + static_cast<size_t>(rank)];
    if (b == nullptr) b = std::make_unique<Buffers>();
    return *b;
  }

  void fill(Buffers& b, int rank, int round) {
    b.num_tokens = static_cast<int>(rng_() % (kTokens + 1));
    for (int t = 0; t < kTokens; ++t) {
      for (int c = 0; c < kHidden; ++c) b.x[t][c] = value(rank, t, round, c);
      for (int k = 0; k < kTopk; ++k) {
        b.ids[t][k] = static_cast<int32_t>(rng_() % (kExperts + 1)) - 1;
        b.weights[t][k] = 1.0f / static_cast<float>(1 << rng_() % 3);
      }
    }
  }

  // All four halves; the experts return what they got, so combine's inputs are dispatch's outputs.
  void send(Buffers& b, int rank) {
    Engine& engine = *engines_[static_cast<size_t>(rank)];
    simt::Stream* const stream = streams_[static_cast<size_t>(rank)];
    DispatchSendParams ds{};
    ds.handle = &b.handle;
    ds.x = reinterpret_cast<const std::byte*>(b.x);
    ds.x_stride = kHidden * 4;
    ds.encoding = Encoding::kCopy;
    ds.topk_ids = b.ids;
    ds.topk_weights = b.weights[0];
    ds.num_tokens = b.num_tokens;
    engine.dispatch_send(stream, 0, ds);
    DispatchRecvParams dr{};
    dr.handle = &b.handle;
    dr.x = reinterpret_cast<std::byte*>(b.rows);
    dr.src_info = b.src_info[0];
    dr.layout_range = b.layout_range[0];
    dr.expert_num_tokens = b.counts;
    dr.src_num_tokens = b.sources;
    engine.dispatch_recv(stream, 0, dr);
    CombineSendParams cs{};
    cs.handle = &b.handle;
    cs.expert_out = reinterpret_cast<const std::byte*>(b.rows);
    cs.expert_stride = int64_t{kRows} * kHidden * 4;
    cs.row_stride = kHidden * 4;
    engine.combine_send(stream, 0, cs);
    CombineRecvParams cr{};
    cr.handle = &b.handle;
    cr.out = reinterpret_cast<std::byte*>(b.out);
    cr.out_stride = kHidden * 4;
    cr.num_tokens = b.num_tokens;
    engine.combine_recv(stream, 0, cr);
  }

  void check(int round, int rank) {
    for (int l = 0; l < kLocal; ++l) {
      int row = 0;
      for (int src = 0; src < kRanks; ++src) {
        const Buffers& from = at(round, src);
        for (int t = 0; t < from.num_tokens; ++t) {
          bool is_here = false;
          for (int k = 0; k < kTopk; ++k) is_here |= from.ids[t][k] == rank * kLocal + l;
          if (!is_here) continue;
          const Buffers& b = at(round, rank);
          REQUIRE(b.src_info[l][row] == t, "round %d rank %d expert %d", round, rank, l);
          for (int c = 0; c < kHidden; ++c) {
            REQUIRE(b.rows[l][row][c] == value(src, t, round, c), "a row, round %d", round);
          }
          ++row;
        }
      }
      REQUIRE(at(round, rank).counts[l] == row, "round %d rank %d expert %d", round, rank, l);
    }
    const Buffers& b = at(round, rank);
    for (int t = 0; t < b.num_tokens; ++t) {
      float sum_of_weights = 0;  // of powers of two: every sum is exact
      for (int k = 0; k < kTopk; ++k) {
        if (b.ids[t][k] >= 0) sum_of_weights += b.weights[t][k];
      }
      for (int c = 0; c < kHidden; ++c) {
        REQUIRE(b.out[t][c] == sum_of_weights * b.x[t][c], "combined, round %d", round);
      }
    }
  }

  const int num_rounds_;
  std::mt19937_64 rng_;
  std::vector<std::unique_ptr<cuda::Memory>> memory_;
  std::vector<simt::Stream*> streams_;
  std::vector<std::unique_ptr<Engine>> engines_;
  std::vector<std::unique_ptr<Buffers>> buffers_;
};

}  // namespace

int main(int argc, char** argv) {
  const uint64_t first = argc > 1 ? strtoull(argv[1], nullptr, 0) : 0;
  const int num_seeds = argc > 2 ? atoi(argv[2]) : 20;
  const int num_rounds = argc > 3 ? atoi(argv[3]) : 4;
  simt::World& world = simt::World::process();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < num_seeds; ++i) {
    const uint64_t seed = first + static_cast<uint64_t>(i);
    try {
      Rig(seed, num_rounds).run();
    } catch (const simt::Error& e) {
      fprintf(stderr, "seed %d: %s\n", static_cast<int>(seed), e.what());
      return 1;
    }
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  printf("%d seeds of %d rounds ok, %.1f ms a round, %.0f switches a round\n",
         num_seeds,
         num_rounds,
         1e3 * seconds / num_seeds / num_rounds,
         static_cast<double>(world.counters().num_switches) / num_seeds / num_rounds);
  return 0;
}
