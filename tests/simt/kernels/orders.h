// The order in which the halves of a run are launched: the same on all ranks, as with any
// collective, and any that keeps at most D rounds open.
#pragma once

#include <vector>

#include "cases.h"

namespace moebius::kernels_test {

enum class Step {
  kDispatchSend,
  kDispatchRecv,
  kExperts,
  kCombineSend,
  kCombineRecv,
  kReplay,    // of a whole round
  kStale,     // halves of round `round`, whose slot was taken
  kDispatch,  // both halves, in the place of the first; no plan has these two
  kCombine,
};

struct Action {
  Step step;
  int round;
};

struct Plan {
  std::vector<Action> actions;
  std::vector<bool> is_combined;  // [rounds]
  std::vector<bool> is_replayed;  // [rounds]
  // Of the rank that stops or comes late, and where; -1: none.
  int stopped_rank = -1;
  size_t stop = 0;
  // [rounds] whether the stop cannot touch it; whether it begins after the stop, and whether even
  // after the survivors have all given the rank up. Between, it is lost or right, as it happens.
  std::vector<bool> is_before, is_without, is_after;
};

Plan make_plan(const Case& c, uint64_t seed);

}  // namespace moebius::kernels_test
