#include "seat.h"

#include <cstring>

#include "cuda/launch.cuh"
#include "experts.h"
#include "reference.h"

namespace moebius::kernels_test {
namespace {

using namespace moebius::cuda;

struct OnDevice {
  template <class T>
  T load(const T* p) const {
    return cuda::load(p);
  }
  template <class T>
  void store(T* p, T v) const {
    cuda::store(p, v);
  }
};

void experts_kernel(ExpertsParams p) {
  wait_for_previous_kernel();
  // On some ranks it lets combine send start before it has written anything.
  if (p.first_expert / p.num_local_experts % 2 == 0) let_next_kernel_start();
  const int first = block_index() * num_threads() + thread_index();
  run_experts(p, first, num_blocks() * num_threads(), OnDevice());
}

struct DelayParams {
  int64_t ns;
};

void delay_kernel(DelayParams p) {
  wait_for_previous_kernel();
  const uint64_t end = now_ns() + static_cast<uint64_t>(p.ns);
  while (now_ns() < end) relax();
}

// What surrounds a captured round: it works on memory of its own, and each replay on other tokens.
struct ReplayParams {
  std::byte* const* rounds;  // buffers of the replays, in order
  uint64_t* num_replays;     // so far
  std::byte* buffers;
  int64_t num_input_bytes, num_bytes;
};

void feed_kernel(ReplayParams p) {
  wait_for_previous_kernel();
  const std::byte* from = load(p.rounds + load(p.num_replays));
  Vec16 poison;
  memset(&poison, kPoison, sizeof poison);
  for (int64_t at = 16 * thread_index(); at < p.num_bytes; at += 16 * num_threads()) {
    auto* to = reinterpret_cast<Vec16*>(p.buffers + at);
    const bool is_input = at < p.num_input_bytes;
    store(to, is_input ? load(reinterpret_cast<const Vec16*>(from + at)) : poison);
  }
}

void collect_kernel(ReplayParams p) {
  wait_for_previous_kernel();
  std::byte* to = load(p.rounds + load(p.num_replays));
  for (int64_t at = p.num_input_bytes + 16 * thread_index(); at < p.num_bytes;
       at += 16 * num_threads()) {
    store(reinterpret_cast<Vec16*>(to + at), load(reinterpret_cast<const Vec16*>(p.buffers + at)));
  }
  sync_block();
  if (thread_index() == 0) store(p.num_replays, load(p.num_replays) + 1);
}

EngineConfig config_of(const Case& c, int num_sms, int64_t timeout_ns) {
  return {c.shape(),
          c.is_token_major,
          c.scale_format,
          c.output_dtype,
          c.hidden,
          timeout_ns,
          num_sms,
          0};
}

constexpr LaunchShape kOneBlock{1, 64, 0}, kTwoBlocks{2, 64, 0};
constexpr int64_t kStaticHead = 64;

}  // namespace

Seat::Seat(const Case& c,
           const Flavour& flavour,
           int rank,
           const std::vector<std::byte*>& heaps,
           int num_sms,
           int64_t timeout_ns)
    : case_(c),
      flavour_(flavour),
      rank_(rank),
      heap_(heaps[static_cast<size_t>(rank)]),
      layout_(BufferLayout::of(c, flavour)),
      stream_(simt::World::process().new_stream(rank)),
      engine_(config_of(c, num_sms, timeout_ns), rank, heaps),
      stats_(0, static_cast<size_t>(8 * (c.num_ranks + c.num_local_experts()))),
      static_(0, static_cast<size_t>(kStaticHead + layout_.total())) {}

Seat::~Seat() { simt::World::process().free_stream(stream_); }

template <class Call>
void Seat::call(const Call& call) {
  if (call() != Outcome::kFault) return;
  faults_.push_back(*engine_.take_fault());
  call();
}

void Seat::launch(Step step, const RoundMemory& memory) {
  DispatchSendParams send = sent(memory);
  DispatchRecvParams receive = received(memory);
  CombineSendParams reply = replied(memory);
  CombineRecvParams add = combined(memory);
  const uint64_t capture = capture_id(stream_);
  switch (step) {
    case Step::kDispatchSend:
      return call([&] { return engine_.dispatch_send(stream_, capture, send); });
    case Step::kDispatchRecv:
      return call([&] { return engine_.dispatch_recv(stream_, capture, receive); });
    case Step::kDispatch:
      return call([&] { return engine_.dispatch(stream_, capture, send, receive); });
    case Step::kExperts:
      return cuda::launch(
          experts_kernel, kTwoBlocks, experts_of(case_, layout_, rank_, memory.buffers), stream_);
    case Step::kCombineSend:
      return call([&] { return engine_.combine_send(stream_, capture, reply); });
    case Step::kCombine:
      return call([&] { return engine_.combine(stream_, capture, reply, add); });
    default:
      return call([&] { return engine_.combine_recv(stream_, capture, add); });
  }
}

DispatchSendParams Seat::sent(const RoundMemory& memory) const {
  std::byte* const b = memory.buffers;
  DispatchSendParams p{};
  p.handle = memory.handle;
  p.x = layout_.at<std::byte>(b, kX);
  p.x_stride = flavour_.x_stride;
  p.encoding = case_.payload == Payload::kQuantised ? Encoding::kQuantise : Encoding::kCopy;
  p.x_dtype = case_.dtype;
  p.scales = layout_.at<std::byte>(b, kScales);
  p.scales_stride = case_.scale_bytes();
  p.topk_ids = layout_.at<std::byte>(b, kIds);
  p.has_int64_ids = flavour_.has_int64_ids;
  p.topk_weights = case_.has_weights ? layout_.at<float>(b, kWeights) : nullptr;
  p.num_tokens = memory.num_tokens;
  p.num_valid_tokens = layout_.at<std::byte>(b, kValid);
  p.has_int64_valid = flavour_.has_int64_valid;
  return p;
}

DispatchRecvParams Seat::received(const RoundMemory& memory) const {
  std::byte* const b = memory.buffers;
  DispatchRecvParams p{};
  p.handle = memory.handle;
  p.x = layout_.at<std::byte>(b, kReceivedX);
  p.scales = layout_.at<std::byte>(b, kReceivedScales);
  scale_strides(case_, flavour_, p.scale_strides);
  p.scale_element = 4;
  p.src_info = layout_.at<int32_t>(b, kSrcInfo);
  p.layout_range = layout_.at<int64_t>(b, kLayoutRange);
  p.topk_ids = layout_.at<int32_t>(b, kReceivedIds);
  p.topk_weights = layout_.at<float>(b, kReceivedWeights);
  p.expert_num_tokens = layout_.at<int32_t>(b, kExpertCounts);
  p.src_num_tokens = layout_.at<int32_t>(b, kSrcCounts);
  p.expert_stats = flavour_.has_stats ? expert_stats() : nullptr;
  p.has_int64_stats = flavour_.has_int64_stats;
  p.wait_stats = flavour_.has_wait_stats ? wait_stats() : nullptr;
  return p;
}

CombineSendParams Seat::replied(const RoundMemory& memory) const {
  CombineSendParams p{};
  p.handle = memory.handle;
  p.expert_out = layout_.at<std::byte>(memory.buffers, kExpertOut);
  p.expert_stride = case_.num_cells() * case_.reply_bytes();
  p.row_stride = case_.reply_bytes();
  return p;
}

CombineRecvParams Seat::combined(const RoundMemory& memory) const {
  CombineRecvParams p{};
  p.handle = memory.handle;
  p.out = layout_.at<std::byte>(memory.buffers, kOut);
  p.out_stride = case_.reply_bytes();
  p.num_tokens = memory.num_tokens;
  p.topk_weights = case_.has_weights ? nullptr : layout_.at<float>(memory.buffers, kWeights);
  p.wait_stats = flavour_.has_wait_stats ? wait_stats() : nullptr;
  return p;
}

void Seat::delay(int64_t ns) { cuda::launch(delay_kernel, kOneBlock, DelayParams{ns}, stream_); }

void Seat::capture(const std::vector<std::byte*>& rounds) {
  table_ = std::make_unique<Memory>(0, 8 * (rounds.size() + 1));
  copy(table_->data(), rounds.data(), 8 * rounds.size());
  auto* const words = reinterpret_cast<uint64_t*>(static_.data());
  const RoundMemory memory{static_.data() + kStaticHead, words + 1, case_.max_num_tokens};
  const ReplayParams replay{reinterpret_cast<std::byte* const*>(table_->data()),
                            words,
                            memory.buffers,
                            layout_.num_input_bytes(),
                            layout_.total()};
  simt::World::process().begin_capture(stream_);
  cuda::launch(feed_kernel, kOneBlock, replay, stream_);
  const std::vector<Step> halves = {Step::kDispatchSend,
                                    Step::kDispatchRecv,
                                    Step::kExperts,
                                    Step::kCombineSend,
                                    Step::kCombineRecv};
  const std::vector<Step> joined = {Step::kDispatch, Step::kExperts, Step::kCombine};
  for (const Step step : case_.is_joined ? joined : halves) launch(step, memory);
  cuda::launch(collect_kernel, kOneBlock, replay, stream_);
  graph_ = simt::World::process().end_capture(stream_);
}

void Seat::replay() { simt::World::process().replay(graph_, stream_); }

std::vector<FaultRecord> Seat::take_faults() {
  while (const auto fault = engine_.take_fault()) faults_.push_back(*fault);
  return faults_;
}

int64_t Seat::expert_stat(int expert) const {
  return flavour_.has_int64_stats ? reinterpret_cast<const int64_t*>(expert_stats())[expert]
                                  : reinterpret_cast<const int32_t*>(expert_stats())[expert];
}

uint64_t Seat::awaiting() const {
  return reinterpret_cast<const Control*>(heap_ + engine_.self().layout.control)->awaiting;
}

}  // namespace moebius::kernels_test
