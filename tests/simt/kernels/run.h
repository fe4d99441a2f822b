// One run: a case under one seed, from fresh memory to the last comparison.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "orders.h"
#include "reference.h"
#include "seat.h"

namespace moebius::kernels_test {

class Run {
 public:
  Run(const Case& c, uint64_t seed);
  ~Run();
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  // Empty if all is as it should be; else what is not.
  std::string go();
  // Of the scheduler; a seed always takes the same.
  uint64_t num_steps() const { return num_steps_; }

 private:
  void make_heaps();
  void make_rounds();
  void expect();  // asks the reference
  void launch_all();
  void launch(size_t i, int rank);  // action `i`
  // Whether the rank launches action `i` and the one after it as one kernel.
  bool joins(size_t i, int rank) const;
  void spoil();
  void launch_stale(int round, int rank);

  void check_round(int round, int rank);
  void check_field(Field field, int round, int rank);
  void check_lost_round(const cuda::FaultRecord& fault, int rank);
  void check_faults(int rank);
  void check_lost_dispatch(int round, int rank);
  void check_late(const cuda::FaultRecord& fault);
  void check_fault(const cuda::FaultRecord& fault, int rank);
  void check_stale(int rank);
  void check_totals(int rank);
  // Notes the first thing that is wrong.
  void require(bool is_good, const char* format, ...) __attribute__((format(printf, 3, 4)));

  std::byte* buffers(int round, int rank) const;
  uint64_t* handle(int round, int rank) const;
  const RoundInput& input(int round, int rank) const {
    return inputs_[static_cast<size_t>(round)][static_cast<size_t>(rank)];
  }
  Seat& seat(int rank) { return *seats_[static_cast<size_t>(rank)]; }
  bool is_stopped(int rank, size_t action) const {
    return rank == plan_.stopped_rank && action >= plan_.stop;
  }

  const Case& case_;
  const uint64_t seed_;
  Random random_;
  const Plan plan_;
  const int64_t timeout_ns_;
  std::vector<Flavour> flavours_;
  std::vector<std::vector<RoundInput>> inputs_;  // [rounds][R]
  std::vector<std::unique_ptr<cuda::Memory>> heaps_;
  std::vector<std::unique_ptr<Seat>> seats_;
  std::vector<std::unique_ptr<cuda::Memory>> memory_;          // [R] of all rounds, and one more
  std::vector<std::vector<std::vector<std::byte>>> expected_;  // [rounds][R] buffers
  std::vector<std::vector<int64_t>> expert_stats_;             // [R][L]
  std::vector<int64_t> remote_bytes_;
  int spoilt_rank_ = -1, spoilt_src_ = -1;  // whose cell is none, and from whom it is
  int num_stale_halves_ = 0;                // bits: dispatch receive, combine send, combine receive
  std::string wrong_;
  uint64_t num_steps_ = 0;
};

}  // namespace moebius::kernels_test
