#include "orders.h"

#include <algorithm>

namespace moebius::kernels_test {
namespace {

class Planner {
 public:
  Planner(const Case& c, uint64_t seed)
      : case_(c),
        random_(seed * 0x2545f4914f6cdd1du + 12345),
        at_(static_cast<size_t>(c.num_rounds)) {
    const auto n = static_cast<size_t>(c.num_rounds);
    plan_.is_combined.assign(n, true);
    plan_.is_replayed.assign(n, false);
    plan_.is_before.assign(n, true);
    plan_.is_without.assign(n, false);
    plan_.is_after.assign(n, true);
    for (size_t r = 0; r < n; ++r) {
      if (c.order == Order::kDispatchOnly) plan_.is_combined[r] = random_.one_in(2);
      if (c.order == Order::kBadCell) plan_.is_combined[r] = r + 1 < n;
      if (c.order == Order::kCaptured) plan_.is_replayed[r] = !random_.one_in(3);
    }
  }

  Plan make() {
    const bool is_plain = case_.order == Order::kPlain || case_.order == Order::kStale ||
                          case_.order == Order::kBadCell ||
                          (case_.order != Order::kInterleaved && random_.one_in(3));
    const int most_open = is_plain ? 1 : case_.depth;
    int stale_after = case_.depth + 1 + random_.below(2);
    while (!open_.empty() || next_ < case_.num_rounds) {
      const bool may_begin =
          next_ < case_.num_rounds && static_cast<int>(open_.size()) < most_open && is_slot_free();
      if (may_begin && (open_.empty() || random_.one_in(3))) {
        begin();
      } else if (!open_.empty()) {
        advance(static_cast<size_t>(random_.below(static_cast<int>(open_.size()))));
      }
      // The last whose slot is taken for sure.
      if (case_.order == Order::kStale && open_.empty() && next_ == stale_after) {
        plan_.actions.push_back({Step::kStale, next_ - 1 - case_.depth});
        stale_after = -1;
      }
    }
    if (case_.is_left_by_one()) stop();
    return plan_;
  }

 private:
  bool is_slot_free() const {
    return std::none_of(
        open_.begin(), open_.end(), [&](int r) { return (next_ - r) % case_.depth == 0; });
  }

  void begin() {
    const int round = next_++;
    if (plan_.is_replayed[static_cast<size_t>(round)]) {
      plan_.actions.push_back({Step::kReplay, round});
      return;
    }
    plan_.actions.push_back({Step::kDispatchSend, round});
    at_[static_cast<size_t>(round)] = Step::kDispatchSend;
    open_.push_back(round);
  }

  void advance(size_t i) {
    const int round = open_[i];
    Step& at = at_[static_cast<size_t>(round)];
    at = static_cast<Step>(static_cast<int>(at) + 1);
    plan_.actions.push_back({at, round});
    const bool is_combined = plan_.is_combined[static_cast<size_t>(round)];
    if (at == (is_combined ? Step::kCombineRecv : Step::kDispatchRecv)) {
      open_.erase(open_.begin() + static_cast<long>(i));
    }
  }

  size_t find(Step step, int round) const {
    const auto found =
        std::find_if(plan_.actions.begin(), plan_.actions.end(), [&](const Action& a) {
          return a.step == step && a.round == round;
        });
    return static_cast<size_t>(found - plan_.actions.begin());
  }

  void stop() {
    const int n = static_cast<int>(plan_.actions.size());
    plan_.stopped_rank = random_.below(case_.num_ranks);
    plan_.stop = static_cast<size_t>(n / 8 + random_.below(n / 3));
    // Every survivor has given it up when it has received the first dispatch that never came.
    size_t settled = plan_.actions.size();
    for (int r = 0; r < case_.num_rounds; ++r) {
      if (find(Step::kDispatchSend, r) < plan_.stop) continue;
      settled = find(Step::kDispatchRecv, r);
      break;
    }
    for (int r = 0; r < case_.num_rounds; ++r) {
      const auto i = static_cast<size_t>(r);
      plan_.is_before[i] = find(Step::kCombineRecv, r) < plan_.stop;
      plan_.is_without[i] = find(Step::kDispatchSend, r) >= plan_.stop;
      plan_.is_after[i] = find(Step::kDispatchSend, r) > settled;
    }
  }

  const Case& case_;
  Random random_;
  Plan plan_;
  std::vector<int> open_;  // rounds, in order
  std::vector<Step> at_;
  int next_ = 0;
};

}  // namespace

Plan make_plan(const Case& c, uint64_t seed) { return Planner(c, seed).make(); }

}  // namespace moebius::kernels_test
