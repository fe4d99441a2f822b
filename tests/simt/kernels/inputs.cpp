#include "inputs.h"

#include <algorithm>
#include <cstring>

#include "experts.h"

namespace moebius::kernels_test {
namespace {

enum class Routing { kUniform, kHotExpert, kOneRank, kLocal, kDuplicates, kHoles, kNowhere };

uint64_t key(uint64_t seed, int a, int b) {
  return seed * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(a) * 1000003 +
         static_cast<uint64_t>(b) * 7919 + 1;
}

int64_t choose(const Case& c, Routing routing, int rank, int hot, int first, Random& random) {
  const int num_local = c.num_local_experts();
  switch (routing) {
    case Routing::kUniform:
      return random.below(c.num_experts);
    case Routing::kHotExpert:
      return random.one_in(4) ? random.below(c.num_experts) : hot;
    case Routing::kOneRank:
      return hot / num_local * num_local + random.below(num_local);
    case Routing::kLocal:
      return rank * num_local + random.below(num_local);
    case Routing::kDuplicates:
      return (first + random.below(2)) % c.num_experts;
    case Routing::kHoles:
      return random.one_in(2) ? -1 : random.below(c.num_experts);
    default:
      return -1;
  }
}

int64_t bad_id(const Case& c, bool is_int64, Random& random) {
  switch (random.below(is_int64 ? 5 : 3)) {
    case 0:
      return c.num_experts;
    case 1:
      return -2 - random.below(5);
    case 2:
      return 1000000 + random.below(100);
    case 3:
      return (int64_t{1} << 32) + random.below(c.num_experts);  // in range, were it cut off
    default:
      return -(int64_t{1} << 40);
  }
}

void fill_rows(const Case& c, const Flavour& f, Random& random, RoundInput* in) {
  const auto rows = static_cast<size_t>(c.max_num_tokens);
  in->x.resize(rows * static_cast<size_t>(f.x_stride));
  for (size_t i = 0; i + 4 <= in->x.size(); i += 4) {
    uint32_t word = mix(static_cast<uint32_t>(random.next()));
    // What is quantised has to be numbers; and some groups of nothing but zeros.
    if (c.payload == Payload::kQuantised) {
      word = i / 1024 % 5 == 3 ? 0 : as_numbers(word, c.dtype);
    }
    memcpy(&in->x[i], &word, sizeof word);
  }
  if (c.payload != Payload::kOpaque && c.payload != Payload::kScaled) return;
  in->scales.resize(rows * static_cast<size_t>(c.scale_bytes()));
  for (std::byte& b : in->scales) b = static_cast<std::byte>(random.next());
}

}  // namespace

Flavour make_flavour(const Case& c, uint64_t seed, int rank) {
  Random random(key(seed, rank, -1));
  Flavour f;
  f.has_int64_ids = random.one_in(2);
  f.has_int64_valid = random.one_in(2);
  f.has_int64_stats = random.one_in(2);
  f.has_valid = c.order == Order::kCaptured || random.one_in(3);
  f.has_stats = random.one_in(2);
  f.has_wait_stats = random.one_in(2);
  f.has_columns_of_scales = !c.is_token_major && random.one_in(2);
  f.x_stride = align_up(c.x_bytes(), 16) + 16 * random.below(3);
  return f;
}

RoundInput make_input(
    const Case& c, const Flavour& flavour, uint64_t seed, int rank, int round, bool is_full) {
  Random random(key(seed, rank, round));
  RoundInput in;
  const int m = c.max_num_tokens;
  in.num_tokens = is_full || random.one_in(3) ? m : random.one_in(6) ? 0 : random.below(m + 1);
  in.num_valid = in.num_tokens;
  if (flavour.has_valid) in.num_valid = random.below(in.num_tokens + 4) - 1;
  in.num_sent =
      static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(in.num_valid, in.num_tokens)));
  const auto routing = static_cast<Routing>(random.below(8) % 7);
  const int hot = random.below(c.num_experts);
  for (int t = 0; t < in.num_tokens; ++t) {
    const int first = random.below(c.num_experts);
    for (int k = 0; k < c.num_topk; ++k) {
      int64_t id = choose(c, routing, rank, hot, first, random);
      if (c.order == Order::kBadIds && random.one_in(4)) {
        id = bad_id(c, flavour.has_int64_ids, random);
        if (t < in.num_sent) in.bad.push_back({t, k, id});
      }
      in.topk_ids.push_back(id);
      const float size = 0.25f + static_cast<float>(random.below(1 << 20)) / (1 << 19);
      in.topk_weights.push_back(random.one_in(5) ? -size : size);
    }
  }
  fill_rows(c, flavour, random, &in);
  return in;
}

}  // namespace moebius::kernels_test
