// What the ranks send in a run, from the case and the seed alone.
#pragma once

#include <cstddef>
#include <vector>

#include "cases.h"

namespace moebius::kernels_test {

// How one rank calls, the same in all rounds.
struct Flavour {
  bool has_int64_ids, has_int64_valid, has_int64_stats;
  bool has_valid, has_stats, has_wait_stats;
  bool has_columns_of_scales;  // of the received ones: [L, words, R*M]
  int64_t x_stride;            // bytes
};

struct BadId {
  int64_t token, choice, id;
};

struct RoundInput {
  int num_tokens;                 // rows of the call
  int64_t num_valid;              // as given: maybe negative, maybe too large
  int num_sent;                   // what it comes to
  std::vector<int64_t> topk_ids;  // [T, K]
  std::vector<float> topk_weights;
  std::vector<std::byte> x;       // [M] rows of x_stride
  std::vector<std::byte> scales;  // [M] rows
  std::vector<BadId> bad;         // among those sent
};

Flavour make_flavour(const Case& c, uint64_t seed, int rank);
RoundInput make_input(
    const Case& c, const Flavour& flavour, uint64_t seed, int rank, int round, bool is_full);

}  // namespace moebius::kernels_test
