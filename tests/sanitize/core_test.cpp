// Virtual ranks in threads against the engine itself, for the sanitizers: every access to a cell is
// ordered by a signal or TSan says so. Values are small integers and weights powers of two, so
// every sum is exact.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <random>
#include <thread>
#include <vector>

#include "cpu/engine.h"
#include "cpu/segment.h"

using namespace moebius;
using namespace moebius::cpu;

namespace {

#define REQUIRE(condition, ...)                                       \
  do {                                                                \
    if (!(condition)) {                                               \
      fprintf(stderr, "%s:%d: " #condition ": ", __FILE__, __LINE__); \
      fprintf(stderr, __VA_ARGS__);                                   \
      fputc('\n', stderr);                                            \
      abort();                                                        \
    }                                                                 \
  } while (false)

struct Case {
  const char* name;
  int ranks, experts, topk, max_tokens, depth;
  int64_t hidden;
  bool has_weights, is_token_major;
  int rounds;
  int stopping_rank;  // -1: none
  int stopping_round;
};

struct Token {
  std::vector<int32_t> ids;
  std::vector<float> weights;
  float value;
};

// What rank `rank` sends in a round; any rank can compute it.
std::vector<Token> tokens_of(const Case& c, int rank, int round) {
  std::mt19937 rng(1000003u * round + rank);
  std::vector<Token> tokens(rng() % (c.max_tokens + 1));
  for (Token& token : tokens) {
    token.value = static_cast<float>(1 + rng() % 15);
    for (int k = 0; k < c.topk; ++k) {
      token.ids.push_back(static_cast<int32_t>(rng() % (c.experts + 1)) - 1);
      token.weights.push_back(1.0f / (1 << rng() % 3));
    }
  }
  return tokens;
}

float channel(float value, int64_t c) { return value + static_cast<float>(c % 5); }

struct World {
  explicit World(const Case& c)
      : shape{c.ranks,
              c.experts,
              c.topk,
              c.max_tokens,
              c.depth,
              c.hidden * 4,
              0,
              c.hidden * 4,
              c.has_weights} {
    for (int r = 0; r < c.ranks; ++r) heaps.push_back(Segment::create(HeapLayout::of(shape).total));
    for (auto& heap : heaps) addresses.push_back(heap.data());
  }
  Shape shape;
  std::vector<Segment> heaps;
  std::vector<std::byte*> addresses;
};

class Rank {
 public:
  Rank(const Case& c, World& world, int rank)
      : case_(c),
        rank_(rank),
        rng_(77 + rank),
        layout_(HeapLayout::of(world.shape)),
        heap_(world.addresses[rank]),
        engine_({world.shape,
                 c.is_token_major,
                 ScaleFormat::kFp32,
                 Dtype::kFp32,
                 c.hidden,
                 kTimeoutNs,
                 2},
                rank,
                world.addresses,
                std::vector<int>(c.ranks, 0),
                *find_kernels("")) {
    const int64_t cells = int64_t{c.ranks} * c.max_tokens;
    x_.resize(num_local() * cells * c.hidden);
    y_.resize(c.is_token_major ? cells * c.hidden : x_.size());
    info_.resize(num_local() * cells);
    range_.resize(num_local() * c.ranks);
    counts_.resize(num_local());
    from_.resize(c.ranks);
  }

  void run() {
    for (int round = 0; round < case_.rounds; ++round) {
      if (rank_ == case_.stopping_rank && round == case_.stopping_round) {
        if (rng_() % 2 == 0) send(round);  // stops with its dispatch out, or before it
        return;
      }
      const bool is_good = step(round);
      if (!is_good) {
        ++num_lost_;
        REQUIRE(case_.stopping_rank >= 0,
                "%s: rank %d lost round %d: kind %d rank %d",
                case_.name,
                rank_,
                round,
                static_cast<int>(engine_.fault().kind),
                engine_.fault().rank);
        const Fault& f = engine_.fault();
        REQUIRE(f.rank == case_.stopping_rank,
                "%s: rank %d blames %d in round %d (kind %d, epoch %lu, reason %d via %d, %ld us)",
                case_.name,
                rank_,
                f.rank,
                round,
                static_cast<int>(f.kind),
                static_cast<unsigned long>(f.epoch),
                static_cast<int>(f.reason),
                f.via,
                static_cast<long>(f.waited_ns / 1000));
      }
    }
    REQUIRE(num_lost_ <= 2, "%s: rank %d lost %d rounds to one rank", case_.name, rank_, num_lost_);
  }

 private:
  // Below the deadline by far, whatever the sanitizer costs.
  static constexpr int64_t kTimeoutNs = 3'000'000'000;

  int64_t num_local() const { return case_.experts / case_.ranks; }

  void delay() {
    if (rng_() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(rng_() % 300));
  }

  bool send(int round) {
    const auto tokens = tokens_of(case_, rank_, round);
    std::vector<float> x(tokens.size() * case_.hidden), weights;
    std::vector<int32_t> ids;
    for (size_t t = 0; t < tokens.size(); ++t) {
      for (int64_t c = 0; c < case_.hidden; ++c)
        x[t * case_.hidden + c] = channel(tokens[t].value, c);
      ids.insert(ids.end(), tokens[t].ids.begin(), tokens[t].ids.end());
      weights.insert(weights.end(), tokens[t].weights.begin(), tokens[t].weights.end());
    }
    return engine_.dispatch_send({reinterpret_cast<const std::byte*>(x.data()),
                                  case_.hidden * 4,
                                  Encoding::kCopy,
                                  Dtype::kFp32,
                                  nullptr,
                                  0,
                                  ids.data(),
                                  false,
                                  case_.has_weights ? weights.data() : nullptr,
                                  static_cast<int64_t>(tokens.size())});
  }

  // Expert e multiplies by e + 1.
  void run_experts(uint64_t epoch) {
    const int64_t rows = int64_t{case_.ranks} * case_.max_tokens;
    if (!case_.is_token_major) {
      for (int64_t l = 0; l < num_local(); ++l) {
        const float factor = static_cast<float>(rank_ * num_local() + l + 1);
        for (int64_t i = 0; i < counts_[l] * case_.hidden; ++i) {
          y_[l * rows * case_.hidden + i] = x_[l * rows * case_.hidden + i] * factor;
        }
      }
      return;
    }
    for (int64_t row = 0; row < rows; ++row) {
      if (row % case_.max_tokens >= from_[row / case_.max_tokens]) continue;
      const int src = static_cast<int>(row / case_.max_tokens);
      const std::byte* cell =
          heap_ + layout_.cell(layout_.slot_of(epoch), src, row % case_.max_tokens);
      const auto* ids =
          reinterpret_cast<const int32_t*>(cell + layout_.head_in_cell + sizeof(CellHead));
      const auto* weights = reinterpret_cast<const float*>(ids + case_.topk);
      float factor = 0;
      for (int k = 0; k < case_.topk; ++k) {
        if (ids[k] >= 0)
          factor += weights[k] * static_cast<float>(rank_ * num_local() + ids[k] + 1);
      }
      const float* x = reinterpret_cast<const float*>(cell);
      for (int64_t c = 0; c < case_.hidden; ++c) y_[row * case_.hidden + c] = x[c] * factor;
    }
  }

  bool step(int round) {
    const uint64_t epoch = engine_.num_rounds();
    delay();
    if (!send(round)) return false;
    delay();
    DispatchRecv recv{};
    if (!case_.is_token_major) {
      recv.x = reinterpret_cast<std::byte*>(x_.data());
      recv.src_info = info_.data();
      recv.layout_range = range_.data();
    }
    recv.expert_num_tokens = counts_.data();
    recv.src_num_tokens = from_.data();
    if (!engine_.dispatch_recv(epoch, recv)) return false;
    if (round % 7 == 3) return true;  // dispatch only, on every rank
    run_experts(epoch);
    delay();
    const int64_t row_bytes = case_.hidden * 4;
    const int64_t rows = int64_t{case_.ranks} * case_.max_tokens;
    if (!engine_.combine_send(
            epoch, {reinterpret_cast<const std::byte*>(y_.data()), rows * row_bytes, row_bytes})) {
      return false;
    }
    delay();
    return receive_combined(round, epoch);
  }

  bool receive_combined(int round, uint64_t epoch) {
    const auto tokens = tokens_of(case_, rank_, round);
    std::vector<float> weights;
    for (const Token& token : tokens) {
      weights.insert(weights.end(), token.weights.begin(), token.weights.end());
    }
    std::vector<float> out(tokens.size() * case_.hidden, -1.0f);
    if (!engine_.combine_recv(epoch,
                              {reinterpret_cast<std::byte*>(out.data()),
                               case_.hidden * 4,
                               static_cast<int64_t>(tokens.size()),
                               case_.has_weights ? nullptr : weights.data(),
                               nullptr})) {
      return false;
    }
    for (size_t t = 0; t < tokens.size(); ++t) {
      float factor = 0;
      for (int k = 0; k < case_.topk; ++k) {
        const int32_t id = tokens[t].ids[k];
        if (id >= 0 && !engine_.is_dead(id / static_cast<int>(num_local()))) {
          factor += tokens[t].weights[k] * static_cast<float>(id + 1);
        }
      }
      for (int64_t c = 0; c < case_.hidden; ++c) {
        const float expected = channel(tokens[t].value, c) * factor;
        const float got = out[t * case_.hidden + c];
        REQUIRE(got == expected,
                "%s: rank %d round %d token %zu channel %ld: expected %g, got %g",
                case_.name,
                rank_,
                round,
                t,
                static_cast<long>(c),
                expected,
                got);
      }
    }
    return true;
  }

  const Case& case_;
  const int rank_;
  std::mt19937 rng_;
  const HeapLayout layout_;
  std::byte* const heap_;
  Engine engine_;
  std::vector<float> x_, y_;
  std::vector<int32_t> info_, counts_, from_;
  std::vector<int64_t> range_;
  int num_lost_ = 0;
};

void run(const Case& c) {
  World world(c);
  std::vector<std::thread> threads;
  for (int r = 0; r < c.ranks; ++r) {
    threads.emplace_back([&c, &world, r] { Rank(c, world, r).run(); });
  }
  for (auto& thread : threads) thread.join();
  printf("%s ok\n", c.name);
}

}  // namespace

int main() {
  const Case cases[] = {
      {"expert_major, reduced", 4, 8, 3, 9, 2, 24, true, false, 60, -1, 0},
      {"expert_major, each row", 3, 9, 4, 7, 2, 20, false, false, 60, -1, 0},
      {"token_major", 4, 8, 3, 9, 3, 36, true, true, 60, -1, 0},
      {"one rank", 1, 4, 2, 5, 2, 8, true, false, 20, -1, 0},
      {"a rank stops", 3, 6, 2, 6, 2, 16, true, false, 12, 1, 4},
      {"a rank stops, token_major", 4, 8, 2, 6, 2, 16, true, true, 12, 3, 5},
  };
  for (const Case& c : cases) run(c);
  return 0;
}
