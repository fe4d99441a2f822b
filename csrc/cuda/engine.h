// The CUDA engine: one rank's four halves as kernel launches over heaps that its device can
// address.
//
// Nothing here waits for the device, and a half neither allocates nor synchronises: what goes wrong
// in a kernel is recorded in pinned memory and told by the next call. The same source serves the
// host executor (MOEBIUS_SIMT). Order of calls: backend/cuda/engine.py.
#pragma once

#include <stdint.h>

#include <cstddef>
#include <optional>
#include <vector>

#include "cuda/params.h"
#include "cuda/runtime.h"
#include "fault.h"
#include "layout.h"

namespace moebius::cuda {

struct EngineConfig {
  Shape shape;
  bool is_token_major;
  ScaleFormat scale_format;
  Dtype output_dtype;
  int64_t hidden;
  int64_t timeout_ns;
  int num_sms;  // most blocks of a kernel; 0: as many as the device has SMs
  int device;
};

// Makes a device the current one of this thread while it lives.
class DeviceScope {
 public:
  explicit DeviceScope(int device) : device_(device), before_(exchange_device(device)) {}
  ~DeviceScope() {
    if (before_ != device_) leave();
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  void leave() noexcept;
  const int device_;
  const int before_;
};

// Memory of one device (or pinned memory of the host), zeroed; freed with this.
class Memory {
 public:
  enum class Kind { kDevice, kPinned };
  Memory(int device, size_t num_bytes, Kind kind = Kind::kDevice);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::byte* data() const { return data_; }
  size_t num_bytes() const { return num_bytes_; }

 private:
  const int device_;
  const size_t num_bytes_;
  const Kind kind_;
  std::byte* data_ = nullptr;
};

// What became of a half.
enum class Outcome : int32_t {
  kLaunched = 0,
  kFault = 1,         // nothing was launched: an earlier half failed, see take_fault()
  kOtherCapture = 2,  // nothing was launched: the stream is not part of the round's capture
};

class Engine {
 public:
  // `heaps[r]`: address of rank r's heap on this device; null where only the network reaches it.
  // Throws DeviceError.
  Engine(const EngineConfig& config, int rank, const std::vector<std::byte*>& heaps);

  // Each enqueues one kernel on `stream`; `params.self` is filled in here. `capture`: the capture
  // that the round belongs to, 0 for none; it is the one that `stream` was part of when the round
  // was sent.
  Outcome dispatch_send(Stream stream, uint64_t capture, DispatchSendParams& params);
  Outcome dispatch_recv(Stream stream, uint64_t capture, DispatchRecvParams& params);
  Outcome combine_send(Stream stream, uint64_t capture, CombineSendParams& params);
  Outcome combine_recv(Stream stream, uint64_t capture, CombineRecvParams& params);
  // Both halves at once: by one kernel, or by two where there are many tokens, or a dispatch
  // receives into what it sends.
  Outcome dispatch(Stream stream,
                   uint64_t capture,
                   DispatchSendParams& send,
                   DispatchRecvParams& recv);
  Outcome combine(Stream stream,
                  uint64_t capture,
                  CombineSendParams& send,
                  CombineRecvParams& recv);

  bool has_fault() const;
  // The first fault since the last time that it was asked for.
  std::optional<FaultRecord> take_fault();

  // What follows reads or writes device memory, and waits for its own copy only.
  uint64_t num_rounds() const;     // begun on the device, replayed ones included
  int64_t remote_bytes() const;    // sent to other ranks so far, headers included
  std::vector<bool> dead() const;  // [R] whether this rank has given that one up
  void mask(int rank, bool is_dead);
  uint64_t round_of(const uint64_t* handle) const;

  void synchronize(Stream stream) const;  // waits for all that was enqueued there
  const Rank& self() const { return self_; }

 private:
  // `launch(target)`, if the stream is in that capture and nothing has failed.
  template <class Launch>
  Outcome run(Stream stream, uint64_t capture, Launch&& launch);
  void load_kernels() const;

  const int device_;
  const int rank_;
  const int num_ranks_;
  const std::vector<std::byte*> heaps_;
  int num_sms_ = 0;
  bool can_overlap_ = false;
  Memory private_;  // LocalState, the addresses of the heaps, expert_counts
  Memory pinned_;   // FaultRecord
  Rank self_{};
};

}  // namespace moebius::cuda
