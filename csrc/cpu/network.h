// What the CPU engine asks of a network, and what a receiver does with a message that came over it.
//
// A remote rank's heap is not mapped here. What the direct path writes there goes into the outbox
// of the own heap (layout.h) and leaves by `put_signal`. Three things are promised, no more:
//   1. the word of a `put_signal` is seen only once all its data is in place;
//   2. the puts of one pair (source, destination) take effect in the order they were asked for;
//   3. data may be changed again after `quiet`, not before. It may not have arrived even then.
#pragma once

#include <stdint.h>

#include <cstddef>

#include "layout.h"

namespace moebius::cpu {

// One rank's way out. Called from the thread that runs the rank's halves; no call waits for a peer,
// and none may throw.
class Network {
 public:
  Network() = default;
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;
  virtual ~Network() = default;

  // Writes `num_bytes` (may be 0) at `offset` of `dst`'s heap, then publishes `word` in the signal
  // at `signal` of it.
  virtual void put_signal(int dst,
                          int64_t offset,
                          const std::byte* data,
                          int64_t num_bytes,
                          int64_t signal,
                          uint64_t word) = 0;
  // The data alone: for parts of a message that do not lie together. A `put_signal` follows.
  virtual void put(int dst, int64_t offset, const std::byte* data, int64_t num_bytes) = 0;
  // Waits until all data that was given may be changed, at most `timeout_ns`. Returns -1, or a rank
  // that messages have not left for. Ranks that are given up do not count.
  virtual int quiet(int64_t timeout_ns) = 0;
  // `dst` is given up, or taken back: what has not left for it may be dropped.
  virtual void give_up(int dst, bool is_given_up) = 0;
};

constexpr int64_t kNoSignal = -1;  // of a message by `put`

// One message as it comes in. `data` holds `num_bytes`.
struct Message {
  int64_t offset;
  const std::byte* data;
  int64_t num_bytes;
  int64_t signal;  // offset of the signal, or kNoSignal
  uint64_t word;
};

// Whether `src` may send this here: its data lies in its own cells, in the combine inbox, or is its
// refusal, and its word goes to one of its own signals, or is its beat. A header is never trusted.
bool is_allowed(const HeapLayout& layout, int src, const Message& message);

// Writes a message of `src` into this rank's heap, data first. False if it is not allowed, and
// then nothing is written. A message of a rank that `heap` has given up is dropped: its memory may
// serve other rounds by now.
bool deliver(const HeapLayout& layout, std::byte* heap, int src, const Message& message);

}  // namespace moebius::cpu
