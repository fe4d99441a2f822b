// What the kernels are run over: shapes, formats, and the order of the halves.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "formats.h"
#include "layout.h"

namespace moebius::kernels_test {

enum class Payload {
  kRows,
  kOpaque,
  kQuantised,
  kScaled
};  // kScaled: FP8 with the caller's scales

enum class Order {
  kPlain,         // one round after the other
  kInterleaved,   // up to D rounds open, their halves in any order that is allowed
  kDispatchOnly,  // the same, and half of the rounds are never combined
  kCaptured,      // some rounds are replays of a graph
  kStopped,       // one rank launches nothing from some half on
  kLate,          // one rank launches nothing for so long that it is given up
  kBadIds,        // choices that name no expert
  kBadCell,       // a peer has written what is no cell, in the last round
  kStale,         // halves of a round whose slot was taken
};

struct Case {
  std::string name;
  Order order;
  int num_ranks, num_experts, num_topk, max_num_tokens, depth;
  Payload payload;
  Dtype dtype;         // of x, where it has one
  Dtype output_dtype;  // of what combine sends
  ScaleFormat scale_format;
  int64_t hidden;
  bool has_weights;  // at dispatch
  bool is_token_major;
  int num_rounds;
  bool is_joined = false;  // halves that follow one another are one kernel, on some of the ranks

  int num_local_experts() const { return num_experts / num_ranks; }
  bool is_left_by_one() const { return order == Order::kStopped || order == Order::kLate; }
  int num_cells() const { return num_ranks * max_num_tokens; }
  int64_t x_bytes() const;        // of a row of x
  int64_t payload_bytes() const;  // of a row as it travels
  int64_t scale_bytes() const;
  int64_t reply_bytes() const;
  Shape shape() const;
};

const std::vector<Case>& all_cases();

// Deterministic, the same everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int below(int n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }
  bool one_in(int n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

}  // namespace moebius::kernels_test
