// What has to be true after a run.
#include <algorithm>
#include <cstring>

#include "run.h"

namespace moebius::kernels_test {
namespace {

bool is_all(const std::byte* p, int64_t num_bytes, int value) {
  return std::all_of(p, p + num_bytes, [&](std::byte b) { return b == std::byte(value); });
}

}  // namespace

void Run::check_round(int round, int rank) {
  const auto i = static_cast<size_t>(round);
  if (rank == plan_.stopped_rank && !plan_.is_before[i]) return;  // it took no part, or not in all
  if (rank == spoilt_rank_ && round == case_.num_rounds - 1) return;
  const BufferLayout& layout = seat(rank).layout();
  std::byte* const got = buffers(round, rank);
  int end = plan_.is_combined[i] ? kNumFields : kExpertOut;
  if (!plan_.is_before[i] && !plan_.is_after[i]) {
    // What the rank had sent may count, or not: its receivers may have given it up meanwhile.
    if (!plan_.is_without[i]) return;
    // What is lost in a half is so in those after it.
    const bool is_lost = is_all(
        layout.at<std::byte>(got, kOut), input(round, rank).num_tokens * case_.reply_bytes(), 0);
    const bool is_empty =
        is_all(layout.at<std::byte>(got, kSrcCounts), layout.num_bytes[kSrcCounts], 0);
    if (is_lost) end = is_empty ? kNumInputs : kExpertOut;
  }
  for (int f = 0; f < end && wrong_.empty(); ++f) check_field(static_cast<Field>(f), round, rank);
}

void Run::check_field(Field field, int round, int rank) {
  const BufferLayout& layout = seat(rank).layout();
  const std::byte* expected =
      expected_[static_cast<size_t>(round)][static_cast<size_t>(rank)].data();
  const std::byte* got = buffers(round, rank);
  const int64_t begin = layout.offset[field], num_bytes = layout.num_bytes[field];
  for (int64_t at = begin; at < begin + num_bytes; at += 4) {
    if (memcmp(expected + at, got + at, 4) == 0) continue;
    uint32_t words[2];
    memcpy(words, expected + at, 4);
    memcpy(words + 1, got + at, 4);
    return require(false,
                   "rank %d, round %d: %s, byte %ld of %ld: expected %08x, got %08x",
                   rank,
                   round,
                   name_of(field),
                   static_cast<long>(at - begin),
                   static_cast<long>(num_bytes),
                   words[0],
                   words[1]);
  }
}

void Run::check_faults(int rank) {
  const std::vector<cuda::FaultRecord> faults = seat(rank).take_faults();
  for (const cuda::FaultRecord& fault : faults) check_fault(fault, rank);
  if (case_.order == Order::kLate && rank == plan_.stopped_rank && !faults.empty()) {
    check_late(faults[0]);
  }
  bool should_have = false;
  for (const auto& round : inputs_) {
    should_have = should_have || !round[static_cast<size_t>(rank)].bad.empty();
  }
  should_have =
      should_have || case_.order == Order::kStale ||
      (case_.is_left_by_one() && (case_.order == Order::kLate || rank != plan_.stopped_rank));
  should_have = should_have || rank == spoilt_rank_;
  require(faults.empty() != should_have, "rank %d: a fault should have been recorded", rank);
  const std::vector<bool> dead = seat(rank).engine().dead();
  for (int r = 0; r < case_.num_ranks; ++r) {
    const bool should_be = r == plan_.stopped_rank && r != rank;
    require(dead[static_cast<size_t>(r)] == should_be,
            "rank %d: rank %d is %sgiven up",
            rank,
            r,
            should_be ? "not " : "");
  }
}

void Run::check_fault(const cuda::FaultRecord& fault, int rank) {
  const Fault& f = fault.fault;
  bool is_right = false;
  if (f.kind == FaultKind::kRouting && f.epoch < inputs_.size()) {
    const std::vector<BadId>& bad = input(static_cast<int>(f.epoch), rank).bad;
    is_right = fault.half == Half::kDispatchSend && !bad.empty() && bad[0].token == f.token &&
               bad[0].choice == f.choice && bad[0].id == f.observed;
  } else if (f.kind == FaultKind::kTimeout) {
    // The rank that came late is told by those who gave it up.
    is_right = f.rank == plan_.stopped_rank && f.via != rank &&
               (rank != f.rank || (case_.order == Order::kLate && f.reason == Reason::kReported));
    if (is_right) check_lost_round(fault, rank);
  } else if (f.kind == FaultKind::kProtocol && rank == spoilt_rank_) {
    is_right = fault.half == Half::kDispatchRecv && f.rank == spoilt_src_ && f.via == -1 &&
               f.epoch + 1 == static_cast<uint64_t>(case_.num_rounds) && f.expected == f.epoch;
    if (is_right) check_lost_dispatch(static_cast<int>(f.epoch), rank);
  } else if (f.kind == FaultKind::kStale && case_.order == Order::kStale) {
    const auto bit = 1 << (static_cast<int>(fault.half) - 1);
    is_right = (num_stale_halves_ & bit) != 0 && f.epoch == *handle(case_.num_rounds, rank);
  }
  require(is_right,
          "rank %d: a fault that is none: half %d, kind %d, rank %d, via %d, reason %d, epoch %lu, "
          "expected %lu, observed %ld, waited %ld ns, token %ld, choice %ld",
          rank,
          static_cast<int>(fault.half),
          static_cast<int>(f.kind),
          f.rank,
          f.via,
          static_cast<int>(f.reason),
          static_cast<unsigned long>(f.epoch),
          static_cast<unsigned long>(f.expected),
          static_cast<long>(f.observed),
          static_cast<long>(f.waited_ns),
          static_cast<long>(f.token),
          static_cast<long>(f.choice));
}

// A rank that was given up sends nothing any more: it knows in the first half that would, if not
// before.
void Run::check_late(const cuda::FaultRecord& fault) {
  bool is_right = false;
  for (size_t i = plan_.stop; i < plan_.actions.size(); ++i) {
    const Action& a = plan_.actions[i];
    if (a.step == Step::kExperts) continue;
    const Half half = a.step == Step::kDispatchSend   ? Half::kDispatchSend
                      : a.step == Step::kDispatchRecv ? Half::kDispatchRecv
                      : a.step == Step::kCombineSend  ? Half::kCombineSend
                                                      : Half::kCombineRecv;
    is_right =
        is_right || (fault.half == half && fault.fault.epoch == static_cast<uint64_t>(a.round));
    if (a.step == Step::kDispatchSend || a.step == Step::kCombineSend) break;
  }
  require(is_right,
          "rank %d came late and goes on: it is told in half %d of round %lu only",
          plan_.stopped_rank,
          static_cast<int>(fault.half),
          static_cast<unsigned long>(fault.fault.epoch));
}

// What is lost reads as nothing.
void Run::check_lost_round(const cuda::FaultRecord& fault, int rank) {
  const auto round = static_cast<int>(fault.fault.epoch);
  require(round < case_.num_rounds, "rank %d: lost round %d", rank, round);
  if (round >= case_.num_rounds) return;
  require(!plan_.is_before[static_cast<size_t>(round)], "rank %d: lost round %d", rank, round);
  const BufferLayout& layout = seat(rank).layout();
  std::byte* const b = buffers(round, rank);
  require(
      is_all(layout.at<std::byte>(b, kOut), input(round, rank).num_tokens * case_.reply_bytes(), 0),
      "rank %d: round %d is lost, but combine gave something",
      rank,
      round);
  if (fault.half == Half::kDispatchSend || fault.half == Half::kDispatchRecv) {
    check_lost_dispatch(round, rank);
  }
}

void Run::check_lost_dispatch(int round, int rank) {
  const BufferLayout& layout = seat(rank).layout();
  std::byte* const b = buffers(round, rank);
  require(is_all(layout.at<std::byte>(b, kExpertCounts), layout.num_bytes[kExpertCounts], 0) &&
              is_all(layout.at<std::byte>(b, kSrcCounts), layout.num_bytes[kSrcCounts], 0) &&
              is_all(layout.at<std::byte>(b, kReceivedIds), layout.num_bytes[kReceivedIds], 0xff),
          "rank %d: round %d is lost, but dispatch gave something",
          rank,
          round);
}

void Run::check_stale(int rank) {
  const BufferLayout& layout = seat(rank).layout();
  const std::byte* const b = buffers(case_.num_rounds, rank);
  for (int f = 0; f < kNumFields; ++f) {
    const bool is_count = f == kExpertCounts || f == kSrcCounts;
    const int value = is_count && (num_stale_halves_ & 1) != 0 ? 0 : kPoison;
    require(is_all(b + layout.offset[f], layout.num_bytes[f], value),
            "rank %d: a stale half touched %s",
            rank,
            name_of(static_cast<Field>(f)));
  }
}

void Run::check_totals(int rank) {
  const auto r = static_cast<size_t>(rank);
  if (rank == plan_.stopped_rank) return;
  require(seat(rank).engine().num_rounds() == static_cast<uint64_t>(case_.num_rounds),
          "rank %d: %lu rounds begun",
          rank,
          static_cast<unsigned long>(seat(rank).engine().num_rounds()));
  require(seat(rank).awaiting() == 0, "rank %d: still says that it waits", rank);
  for (int src = 0; src < case_.num_ranks; ++src) {
    const int64_t waited = seat(rank).wait_stat(src);
    const bool is_sane =
        waited >= 0 && waited <= static_cast<int64_t>(simt::World::process().now_ns());
    require(is_sane, "rank %d: waited %ld ns for rank %d", rank, static_cast<long>(waited), src);
  }
  if (plan_.stopped_rank >= 0) return;
  require(seat(rank).engine().remote_bytes() == remote_bytes_[r],
          "rank %d: %ld bytes to others, expected %ld",
          rank,
          static_cast<long>(seat(rank).engine().remote_bytes()),
          static_cast<long>(remote_bytes_[r]));
  if (rank == spoilt_rank_) return;
  for (int l = 0; l < case_.num_local_experts() && flavours_[r].has_stats; ++l) {
    require(seat(rank).expert_stat(l) == expert_stats_[r][static_cast<size_t>(l)],
            "rank %d: expert_stats[%d] is %ld, expected %ld",
            rank,
            l,
            static_cast<long>(seat(rank).expert_stat(l)),
            static_cast<long>(expert_stats_[r][static_cast<size_t>(l)]));
  }
}

}  // namespace moebius::kernels_test
