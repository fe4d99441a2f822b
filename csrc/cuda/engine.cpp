#include "cuda/engine.h"

#include <algorithm>

#include "cuda/launchers.h"
#if !defined(MOEBIUS_SIMT)
#include "cuda/launch.cuh"
#endif

namespace moebius::cuda {
namespace {

constexpr int64_t kStateBytes = align_up(sizeof(LocalState), kLineBytes);

int64_t heaps_bytes(int num_ranks) {
  return align_up(num_ranks * int64_t{sizeof(std::byte*)}, kLineBytes);
}

int64_t private_bytes(const Shape& s) {
  return kStateBytes + heaps_bytes(s.num_ranks) + s.num_local_experts() * int64_t{sizeof(int32_t)};
}

// Whether both halves can be one kernel. Not over NVSHMEM: with calls of its library, such a kernel
// spills, and what it saves is nothing beside the way through a NIC. That build leaves them out.
#if defined(MOEBIUS_NVSHMEM)
constexpr bool kCanJoin = false;
#else
constexpr bool kCanJoin = true;
#endif

// Most tokens of a rank for which both halves are one kernel. It saves a launch, which is nothing
// beside the rows of more; and it moves rows a little slower (H200, T = 128: up to 2 % of a round).
constexpr int64_t kMostJoined = 512;

// Whether a dispatch receives into what it sends, the result of D rounds ago, say. It reads x as
// what nobody writes while the kernel runs, so that has to be two kernels.
bool receives_into_x(const DispatchSendParams& send, const DispatchRecvParams& recv) {
  const Shape& s = send.self.layout.shape;
  const bool is_quantised = send.encoding == Encoding::kQuantise;
  const int64_t element_bytes = send.x_dtype == Dtype::kFp32 ? 4 : 2;
  const int64_t x_bytes = is_quantised ? send.self.hidden * element_bytes : s.payload_bytes;
  const std::byte* const end = send.x + (send.num_tokens - 1) * send.x_stride + x_bytes;
  const int64_t num_lists = send.self.is_token_major ? 1 : s.num_local_experts();
  const int64_t num_rows = num_lists * s.num_ranks * s.max_num_tokens;
  const auto is_in_x = [&](const std::byte* first, int64_t num_bytes) {
    return first != nullptr && first < end && send.x < first + num_bytes;
  };
  return send.num_tokens > 0 && (is_in_x(recv.x, num_rows * s.payload_bytes) ||
                                 is_in_x(recv.scales, num_rows * s.scale_bytes));
}

template <class T>
T read(const void* at) {
  T value;
  copy(&value, at, sizeof value);
  return value;
}

}  // namespace

void DeviceScope::leave() noexcept {
  try {
    exchange_device(before_);
  } catch (const DeviceError&) {
    // It was current a moment ago; whatever is wrong, the next call finds it.
  }
}

Memory::Memory(int device, size_t num_bytes, Kind kind)
    : device_(device), num_bytes_(num_bytes), kind_(kind) {
  const DeviceScope scope(device);
  void* p = kind == Kind::kPinned ? allocate_pinned(num_bytes) : allocate(num_bytes);
  data_ = static_cast<std::byte*>(p);
}

Memory::~Memory() {
  try {
    const DeviceScope scope(device_);
    if (kind_ == Kind::kPinned) {
      release_pinned(data_);
    } else {
      release(data_);
    }
  } catch (const DeviceError&) {
    // The device is gone, and its memory with it.
  }
}

Engine::Engine(const EngineConfig& config, int rank, const std::vector<std::byte*>& heaps)
    : device_(config.device),
      rank_(rank),
      num_ranks_(config.shape.num_ranks),
      heaps_(heaps),
      private_(config.device, static_cast<size_t>(private_bytes(config.shape))),
      pinned_(config.device, sizeof(FaultRecord), Memory::Kind::kPinned) {
  const DeviceScope scope(device_);
  num_sms_ = num_multiprocessors();
  can_overlap_ = can_overlap();
  if (config.num_sms > 0) num_sms_ = std::min(num_sms_, config.num_sms);

  std::byte* at = private_.data() + kStateBytes;
  copy(at, heaps.data(), heaps.size() * sizeof(std::byte*));
  self_.layout = HeapLayout::of(config.shape);
  self_.heaps = reinterpret_cast<std::byte* const*>(at);
  self_.heap = heaps.at(static_cast<size_t>(rank));
  self_.state = reinterpret_cast<LocalState*>(private_.data());
  self_.expert_counts = reinterpret_cast<int32_t*>(at + heaps_bytes(num_ranks_));
  self_.record = reinterpret_cast<FaultRecord*>(pinned_.data());
  self_.timeout_ns = config.timeout_ns;
  self_.hidden = config.hidden;
  self_.rank = rank;
  self_.output_dtype = config.output_dtype;
  self_.scale_format = config.scale_format;
  self_.is_token_major = config.is_token_major;
  load_kernels();
}

void Engine::load_kernels() const {
#if !defined(MOEBIUS_SIMT)  // the host executor has nothing to load
  const LoadOnly load_only;
  DispatchSendParams send{};
  send.self = self_;
  send.num_tokens = self_.layout.shape.max_num_tokens;
  DispatchRecvParams receive{};
  receive.self = self_;
  launch_dispatch_recv(receive, num_sms_, nullptr);
  const auto load_dispatch = [&](Encoding encoding, Dtype dtype) {
    send.encoding = encoding;
    send.x_dtype = dtype;
    launch_dispatch_send(send, num_sms_, nullptr);
    if constexpr (kCanJoin) launch_dispatch(send, receive, num_sms_, nullptr);
  };
  load_dispatch(Encoding::kCopy, Dtype::kBf16);
  for (Dtype dtype : {Dtype::kBf16, Dtype::kFp16, Dtype::kFp32}) {
    if (self_.layout.shape.scale_bytes == 0) break;  // this payload is never quantised
    load_dispatch(Encoding::kQuantise, dtype);
  }
  CombineSendParams reply{};
  reply.self = self_;
  launch_combine_send(reply, num_sms_, nullptr);
  CombineRecvParams sum{};
  sum.self = self_;
  sum.num_tokens = self_.layout.shape.max_num_tokens;
  const float any_weight = 0;  // only whether there is one matters here
  sum.topk_weights = self_.layout.shape.has_weights ? nullptr : &any_weight;
  launch_combine_recv(sum, num_sms_, nullptr);
  if constexpr (kCanJoin) launch_combine(reply, sum, num_sms_, nullptr);
#endif
}

template <class Launch>
Outcome Engine::run(Stream stream, uint64_t capture, Launch&& launch) {
  if (has_fault()) return Outcome::kFault;
  const DeviceScope scope(device_);
  if (capture_id(stream) != capture) return Outcome::kOtherCapture;
  launch(Target(stream, can_overlap_));
  return Outcome::kLaunched;
}

Outcome Engine::dispatch_send(Stream stream, uint64_t capture, DispatchSendParams& params) {
  params.self = self_;
  return run(stream, capture, [&](Target t) { launch_dispatch_send(params, num_sms_, t); });
}

Outcome Engine::dispatch_recv(Stream stream, uint64_t capture, DispatchRecvParams& params) {
  params.self = self_;
  return run(stream, capture, [&](Target t) { launch_dispatch_recv(params, num_sms_, t); });
}

Outcome Engine::combine_send(Stream stream, uint64_t capture, CombineSendParams& params) {
  params.self = self_;
  return run(stream, capture, [&](Target t) { launch_combine_send(params, num_sms_, t); });
}

Outcome Engine::combine_recv(Stream stream, uint64_t capture, CombineRecvParams& params) {
  params.self = self_;
  return run(stream, capture, [&](Target t) { launch_combine_recv(params, num_sms_, t); });
}

Outcome Engine::dispatch(Stream stream,
                         uint64_t capture,
                         DispatchSendParams& send,
                         DispatchRecvParams& recv) {
  send.self = recv.self = self_;
  return run(stream, capture, [&](Target t) {
    if constexpr (kCanJoin) {
      const bool is_one = send.num_tokens <= kMostJoined && !receives_into_x(send, recv);
      if (is_one) return launch_dispatch(send, recv, num_sms_, t);
    }
    launch_dispatch_send(send, num_sms_, t);
    launch_dispatch_recv(recv, num_sms_, t);
  });
}

Outcome Engine::combine(Stream stream,
                        uint64_t capture,
                        CombineSendParams& send,
                        CombineRecvParams& recv) {
  send.self = recv.self = self_;
  return run(stream, capture, [&](Target t) {
    if constexpr (kCanJoin) {
      if (recv.num_tokens <= kMostJoined) return launch_combine(send, recv, num_sms_, t);
    }
    launch_combine_send(send, num_sms_, t);
    launch_combine_recv(recv, num_sms_, t);
  });
}

bool Engine::has_fault() const {
  // Pairs with the kernel's release: the rest of the record is there.
  return __atomic_load_n(&self_.record->is_set, __ATOMIC_ACQUIRE) != 0;
}

std::optional<FaultRecord> Engine::take_fault() {
  if (!has_fault()) return std::nullopt;
  const FaultRecord taken = *self_.record;
  // From here on a kernel may fill it again.
  __atomic_store_n(&self_.record->is_set, 0u, __ATOMIC_RELEASE);
  return taken;
}

uint64_t Engine::num_rounds() const {
  const DeviceScope scope(device_);
  return read<Control>(self_.heap + self_.layout.control).epoch;
}

int64_t Engine::remote_bytes() const {
  const DeviceScope scope(device_);
  return read<LocalState>(self_.state).remote_bytes;
}

std::vector<bool> Engine::dead() const {
  const DeviceScope scope(device_);
  std::vector<uint32_t> words(static_cast<size_t>(num_ranks_));
  copy(words.data(), self_.heap + self_.layout.masks, words.size() * sizeof(uint32_t));
  std::vector<bool> dead;
  for (uint32_t word : words) dead.push_back(word != 0);
  return dead;
}

void Engine::mask(int rank, bool is_dead) {
  const DeviceScope scope(device_);
  const uint32_t word = is_dead ? 1 : 0;
  copy(self_.heap + self_.layout.masks + rank * int64_t{sizeof word}, &word, sizeof word);
  // It looks at its own memory for who has given it up; a remote one is told by its own masks,
  // which are set on every rank alike.
  if (heaps_.at(static_cast<size_t>(rank)) == nullptr) return;
  copy(heaps_.at(static_cast<size_t>(rank)) + self_.layout.refusals + rank_ * int64_t{sizeof word},
       &word,
       sizeof word);
}

uint64_t Engine::round_of(const uint64_t* handle) const {
  const DeviceScope scope(device_);
  return read<uint64_t>(handle);
}

void Engine::synchronize(Stream stream) const {
  const DeviceScope scope(device_);
  cuda::synchronize(stream);
}

}  // namespace moebius::cuda
