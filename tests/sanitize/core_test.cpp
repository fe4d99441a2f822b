// Virtual ranks in threads against the engine itself, for the sanitizers and the mutants: every
// access to a cell is ordered by a signal or TSan says so. Values are small integers and weights
// powers of two, so every sum is exact. Arguments: the cases to run, by name; none runs all.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/emulated_network.h"
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
  int ranks_per_host = 0;     // 0: all ranks share one
  LinkConditions links = {};  // between hosts
  int64_t chunk_bytes = 0;
  bool is_hot = false;      // all tokens go to the experts of rank 0
  bool is_paired = false;   // two rounds in flight
  bool is_stalled = false;  // nothing leaves for the rank that stops, or from it

  int host_of(int rank) const { return ranks_per_host > 0 ? rank / ranks_per_host : 0; }
  bool is_over_network() const { return host_of(ranks - 1) > 0; }
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
      const int some = c.is_hot ? c.experts / c.ranks : c.experts;
      token.ids.push_back(static_cast<int32_t>(rng() % (some + 1)) - 1);
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
              c.has_weights,
              !c.is_token_major,
              c.is_over_network()} {
    const HeapLayout layout = HeapLayout::of(shape);
    for (int r = 0; r < c.ranks; ++r) heaps.push_back(Segment::create(layout.total));
    for (auto& heap : heaps) addresses.push_back(heap.data());
    if (c.is_over_network()) {
      network = std::make_unique<EmulatedNetwork>(layout, addresses, c.links);
    }
  }
  // What rank `rank` has mapped.
  std::vector<std::byte*> seen_by(const Case& c, int rank) const {
    std::vector<std::byte*> seen = addresses;
    for (int r = 0; r < c.ranks; ++r) {
      if (c.host_of(r) != c.host_of(rank)) seen[r] = nullptr;
    }
    return seen;
  }
  Network* way_out(int rank) { return network ? &network->way_out(rank) : nullptr; }

  Shape shape;
  std::vector<Segment> heaps;
  std::vector<std::byte*> addresses;
  std::unique_ptr<EmulatedNetwork> network;
};

class Rank {
 public:
  Rank(const Case& c, World& world, int rank)
      : case_(c),
        world_(world),
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
                 2,
                 c.chunk_bytes},
                rank,
                world.seen_by(c, rank),
                std::vector<int>(c.ranks, 0),
                *find_kernels(""),
                world.way_out(rank)) {
    const int64_t cells = int64_t{c.ranks} * c.max_tokens;
    for (Buffers& b : buffers_) {
      b.x.resize(num_local() * cells * c.hidden);
      b.y.resize(c.is_token_major ? cells * c.hidden : b.x.size());
      b.info.resize(num_local() * cells);
      b.range.resize(num_local() * c.ranks);
      b.counts.resize(num_local());
      b.from.resize(c.ranks);
    }
  }

  void run() {
    for (int round = 0; round < case_.rounds; ++round) {
      if (rank_ == case_.stopping_rank && round == case_.stopping_round) {
        if (rng_() % 2 == 0) send(round);  // stops with its dispatch out, or before it
        for (int r = 0; r < case_.ranks && case_.is_stalled; ++r) {
          if (r != rank_) world_.network->cut(rank_, r, 0, true);
        }
        return;
      }
      const bool is_good = case_.is_paired ? step_pair(round) : step(round);
      if (case_.is_paired) ++round;
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
    Buffers& b = buffers_[epoch % 2];
    const int64_t rows = int64_t{case_.ranks} * case_.max_tokens;
    if (!case_.is_token_major) {
      for (int64_t l = 0; l < num_local(); ++l) {
        const float factor = static_cast<float>(rank_ * num_local() + l + 1);
        for (int64_t i = 0; i < b.counts[l] * case_.hidden; ++i) {
          b.y[l * rows * case_.hidden + i] = b.x[l * rows * case_.hidden + i] * factor;
        }
      }
      return;
    }
    for (int64_t row = 0; row < rows; ++row) {
      if (row % case_.max_tokens >= b.from[row / case_.max_tokens]) continue;
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
      for (int64_t c = 0; c < case_.hidden; ++c) b.y[row * case_.hidden + c] = x[c] * factor;
    }
  }

  bool receive(uint64_t epoch) {
    Buffers& b = buffers_[epoch % 2];
    DispatchRecv recv{};
    if (!case_.is_token_major) {
      recv.x = reinterpret_cast<std::byte*>(b.x.data());
      recv.src_info = b.info.data();
      recv.layout_range = b.range.data();
    }
    recv.expert_num_tokens = b.counts.data();
    recv.src_num_tokens = b.from.data();
    return engine_.dispatch_recv(epoch, recv);
  }

  // expert_major: each expert has the rows routed to it, by source and token.
  void check_received(int round, uint64_t epoch) {
    if (case_.is_token_major) return;
    const Buffers& b = buffers_[epoch % 2];
    const int64_t rows = int64_t{case_.ranks} * case_.max_tokens;
    for (int64_t l = 0; l < num_local(); ++l) {
      const int64_t expert = rank_ * num_local() + l;
      int64_t row = 0;
      for (int src = 0; src < case_.ranks; ++src) {
        for (const Token& token : tokens_of(case_, src, round)) {
          const bool is_here =
              std::find(token.ids.begin(), token.ids.end(), expert) != token.ids.end();
          if (!is_here || engine_.is_dead(src)) continue;
          const float* x = &b.x[(l * rows + row++) * case_.hidden];
          for (int64_t c = 0; c < case_.hidden; ++c) {
            REQUIRE(x[c] == channel(token.value, c),
                    "%s: rank %d round %d: received %g from rank %d",
                    case_.name,
                    rank_,
                    round,
                    x[c],
                    src);
          }
        }
      }
      REQUIRE(row == b.counts[l], "%s: rank %d round %d: counts", case_.name, rank_, round);
    }
  }

  bool reply(uint64_t epoch) {
    const int64_t row_bytes = case_.hidden * 4;
    const int64_t rows = int64_t{case_.ranks} * case_.max_tokens;
    const auto* y = reinterpret_cast<const std::byte*>(buffers_[epoch % 2].y.data());
    return engine_.combine_send(epoch, {y, rows * row_bytes, row_bytes});
  }

  bool step(int round) {
    const uint64_t epoch = engine_.num_rounds();
    delay();
    if (!send(round)) return false;
    delay();
    if (!receive(epoch)) return false;
    check_received(round, epoch);
    if (round % 7 == 3) return true;  // dispatch only, on every rank
    run_experts(epoch);
    delay();
    if (!reply(epoch)) return false;
    delay();
    return receive_combined(round, epoch);
  }

  bool step_pair(int round) {
    const uint64_t epoch = engine_.num_rounds();
    for (int i = 0; i < 2; ++i) {
      if (!send(round + i)) return false;
      delay();
    }
    for (int i = 0; i < 2; ++i) {
      if (!receive(epoch + i)) return false;
      run_experts(epoch + i);
    }
    for (int i = 0; i < 2; ++i) {
      if (!reply(epoch + i)) return false;
    }
    delay();
    return receive_combined(round, epoch) && receive_combined(round + 1, epoch + 1);
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

  struct Buffers {
    std::vector<float> x, y;
    std::vector<int32_t> info, counts, from;
    std::vector<int64_t> range;
  };

  const Case& case_;
  World& world_;
  const int rank_;
  std::mt19937 rng_;
  const HeapLayout layout_;
  std::byte* const heap_;
  Engine engine_;
  Buffers buffers_[2];  // by the parity of the round
  int num_lost_ = 0;
};

// What the halves do not notice.
void check_network(const Case& c, World& world) {
  const HeapLayout layout = HeapLayout::of(world.shape);
  REQUIRE(world.network->wait_idle(20'000'000'000), "%s: messages are stuck", c.name);
  REQUIRE(world.network->num_refused() == 0, "%s: refused messages", c.name);
  for (int r = 0; r < c.ranks; ++r) {
    const std::byte* heap = world.addresses[r];
    const std::byte* end = heap + layout.outbox_reply(world.shape.outbox_rows());
    REQUIRE(std::all_of(end, heap + layout.total, [](std::byte b) { return b == std::byte{0}; }),
            "%s: rank %d wrote past its outbox",
            c.name,
            r);
    const bool is_told =
        c.stopping_rank >= 0 && !c.is_stalled && c.host_of(r) != c.host_of(c.stopping_rank);
    const std::byte* refusals = world.addresses[std::max(c.stopping_rank, 0)];
    const auto* refusal = reinterpret_cast<const uint32_t*>(refusals + layout.refusal(r));
    REQUIRE(*refusal == (is_told ? 1 : 0), "%s: rank %d refuses: %u", c.name, r, *refusal);
  }
}

void run(const Case& c) {
  World world(c);
  std::vector<std::thread> threads;
  for (int r = 0; r < c.ranks; ++r) {
    threads.emplace_back([&c, &world, r] { Rank(c, world, r).run(); });
  }
  for (auto& thread : threads) thread.join();
  if (world.network) check_network(c, world);
  printf("%s ok\n", c.name);
}

}  // namespace

int main(int argc, char** argv) {
  // Late, in pieces, out of order across pairs.
  const LinkConditions bad{1, 0, 300'000, 200, 0};
  const LinkConditions narrow{2, 20'000, 0, 0, 0.001};
  const LinkConditions fine{3, 0, 0, 0, 0};
  const Case cases[] = {
      {"expert_major, reduced", 4, 8, 3, 9, 2, 24, true, false, 60, -1, 0},
      {"expert_major, each row", 3, 9, 4, 7, 2, 20, false, false, 60, -1, 0},
      {"token_major", 4, 8, 3, 9, 3, 36, true, true, 60, -1, 0},
      {"one rank", 1, 4, 2, 5, 2, 8, true, false, 20, -1, 0},
      {"a rank stops", 3, 6, 2, 6, 2, 16, true, false, 12, 1, 4},
      {"a rank stops, token_major", 4, 8, 2, 6, 2, 16, true, true, 12, 3, 5},
      {"2 x 2, reduced", 4, 8, 3, 9, 2, 24, true, false, 60, -1, 0, 2, bad},
      {"4 x 1, each row", 4, 8, 4, 7, 2, 20, false, false, 40, -1, 0, 1, bad},
      {"4 x 1, token_major, chunks", 4, 8, 3, 9, 3, 36, true, true, 60, -1, 0, 1, bad, 600},
      {"2 + 1, narrow", 3, 9, 4, 7, 2, 20, true, false, 40, -1, 0, 2, narrow},
      {"4 x 1, hot, reduced", 4, 8, 1, 9, 2, 24, true, false, 40, -1, 0, 1, bad, 0, true},
      {"4 x 1, hot, each row", 4, 8, 4, 9, 2, 24, false, false, 40, -1, 0, 1, bad, 0, true},
      {"4 x 1, two in flight", 4, 8, 3, 9, 2, 24, true, false, 60, -1, 0, 1, bad, 0, false, true},
      {"3 x 1, a rank stops", 3, 6, 2, 6, 2, 16, true, false, 12, 1, 4, 1, fine},
      {"2 x 2, a rank stalls",
       4,
       8,
       2,
       6,
       2,
       16,
       true,
       true,
       12,
       3,
       5,
       2,
       bad,
       0,
       false,
       false,
       true},
  };
  for (const Case& c : cases) {
    const bool is_meant = std::any_of(
        argv + 1, argv + argc, [&](const char* name) { return strcmp(name, c.name) == 0; });
    if (argc == 1 || is_meant) run(c);
  }
  return 0;
}
