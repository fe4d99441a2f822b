// What a round has to come to, bit for bit: the CPU engine, all ranks in one thread.
#pragma once

#include <memory>
#include <vector>

#include "buffers.h"
#include "cpu/engine.h"
#include "cpu/segment.h"

namespace moebius::kernels_test {

class Reference {
 public:
  Reference(const Case& c, const std::vector<Flavour>& flavours);

  void give_up(int rank);  // by all others; it takes no part any more
  // A whole round: `inputs` of each rank, results into `buffers` of each rank.
  void run(const std::vector<RoundInput>& inputs, const std::vector<std::byte*>& buffers);
  // Sent to other ranks in all rounds.
  int64_t remote_bytes(int rank) const {
    return engines_[static_cast<size_t>(rank)]->remote_bytes();
  }

 private:
  void send(int rank, const RoundInput& in, std::byte* buffers);
  void receive(int rank, uint64_t epoch, std::byte* buffers);
  void copy_inbox(int rank, uint64_t epoch, std::byte* buffers);
  void reply(int rank, uint64_t epoch, std::byte* buffers);
  void finish(int rank, uint64_t epoch, const RoundInput& in, std::byte* buffers);

  const Case& case_;
  const std::vector<Flavour>& flavours_;
  std::vector<BufferLayout> layouts_;
  std::vector<cpu::Segment> heaps_;
  std::vector<std::unique_ptr<cpu::Engine>> engines_;
  int given_up_ = -1;
};

// For the experts of a rank, over the buffers of a round.
struct ExpertsParams;
ExpertsParams experts_of(const Case& c, const BufferLayout& layout, int rank, std::byte* buffers);

}  // namespace moebius::kernels_test
