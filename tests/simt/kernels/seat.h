// One virtual rank: its engine, its stream, and the launch of each step.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "buffers.h"
#include "cuda/engine.h"
#include "orders.h"
#include "simt/world.h"

namespace moebius::kernels_test {

// Where a round reads and writes.
struct RoundMemory {
  std::byte* buffers;
  uint64_t* handle;
  int num_tokens;
};

class Seat {
 public:
  Seat(const Case& c,
       const Flavour& flavour,
       int rank,
       const std::vector<std::byte*>& heaps,
       int num_sms,
       int64_t timeout_ns);
  ~Seat();
  Seat(const Seat&) = delete;
  Seat& operator=(const Seat&) = delete;

  // Any step but kReplay and kStale.
  void launch(Step step, const RoundMemory& memory);
  void delay(int64_t ns);
  // Captures a round; `rounds`: the buffers of those that will be replays of it, in order.
  void capture(const std::vector<std::byte*>& rounds);
  void replay();

  cuda::Engine& engine() { return engine_; }
  const BufferLayout& layout() const { return layout_; }
  // All faults that were recorded, those that a call found in its way included.
  std::vector<cuda::FaultRecord> take_faults();
  int64_t expert_stat(int expert) const;
  int64_t wait_stat(int rank) const { return wait_stats()[rank]; }
  // Of the control block: what it says it waits for.
  uint64_t awaiting() const;

 private:
  template <class Call>
  void call(const Call& call);
  // What the halves of a round are told.
  cuda::DispatchSendParams sent(const RoundMemory& memory) const;
  cuda::DispatchRecvParams received(const RoundMemory& memory) const;
  cuda::CombineSendParams replied(const RoundMemory& memory) const;
  cuda::CombineRecvParams combined(const RoundMemory& memory) const;
  int64_t* wait_stats() const { return reinterpret_cast<int64_t*>(stats_.data()); }
  std::byte* expert_stats() const { return stats_.data() + 8 * case_.num_ranks; }

  const Case& case_;
  const Flavour flavour_;
  const int rank_;
  std::byte* const heap_;
  const BufferLayout layout_;
  simt::Stream* const stream_;
  cuda::Engine engine_;
  cuda::Memory stats_;   // int64 [R] waits, then [L] of either width
  cuda::Memory static_;  // of the capture: counter, handle, then buffers
  std::unique_ptr<cuda::Memory> table_;
  simt::Graph graph_;
  std::vector<cuda::FaultRecord> faults_;
};

}  // namespace moebius::kernels_test
