// Why a half failed, as every engine records it.
#pragma once

#include <stdint.h>

namespace moebius {

enum class FaultKind : int32_t { kNone = 0, kRouting = 1, kTimeout = 2, kProtocol = 3, kStale = 4 };
enum class Reason : int32_t { kDeadline = 0, kDied = 1, kReported = 2 };
enum class Half : int32_t {
  kDispatchSend = 0,
  kDispatchRecv = 1,
  kCombineSend = 2,
  kCombineRecv = 3
};
constexpr int kNumHalves = 4;

struct Fault {
  FaultKind kind = FaultKind::kNone;
  int rank = -1;  // to blame
  int via = -1;   // through whom it was seen
  Reason reason = Reason::kDeadline;
  uint64_t epoch = 0;     // of the round that is lost
  uint64_t expected = 0;  // epoch that was waited for
  int64_t observed = -1;  // epoch in the word, -1 for none; the offending id for kRouting
  int64_t waited_ns = 0;
  int64_t token = -1, choice = -1;  // kRouting
};

}  // namespace moebius
