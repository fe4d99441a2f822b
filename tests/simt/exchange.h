// A small exchange in the manner of the project's kernels, with a place for every mistake: each
// rank sends rows to the next one, by bulk copies and plain stores, signals, and receives.
#pragma once

#include <vector>

#include "cuda/device.cuh"
#include "simt/launch.h"

namespace moebius::simt_test {

using namespace moebius::cuda;

enum class Bug {
  kNone,
  kNoBlockBarrier,      // the last block is asked for before all warps are done
  kNoBulkWait,          // signal before the rows have been written
  kNoBulkWaitRead,      // staging is used again before it was read
  kNoCommit,            // the wait waits for nothing
  kNoWriterProxyFence,  // staging is sent before the bulk copy can see it
  kNoWarpSync,          // lanes' part of the staging is not waited for
  kSignalFirst,         // by the first block to be done, not by the last
  kRelaxedSignal,       // no release
  kNoSysFence,          // device scope where the system's is needed
  kRelaxedPoll,         // no acquire
  kNoReaderBarrier,     // only the polling thread has acquired
  kNoReaderProxyFence,  // bulk loads of what a peer wrote by ordinary stores
  kWrongParity,         // row is used before it is there
  kNoLoadWait,
  kRelaxedCount,       // blocks' counter without order
  kNoWaitForPrevious,  // the next kernel reads what the one ahead writes
  kOverwriteEarly,     // a slot is written before its reader has said that it is done
  kMisaligned,
  kTwoArrivals,
  kNoInitFence,
  kNoInitSync,
};

constexpr int kRowWords = 64;  // uint32
constexpr int kRowBytes = kRowWords * 4;
constexpr int kNumRows = 12;
constexpr int kDepth = 2;

// One rank's memory.
struct Box {
  alignas(16) uint32_t rows[kDepth][kNumRows][kRowWords];  // from the rank before
  alignas(16) uint32_t heads[kDepth][kNumRows][4];
  alignas(16) uint64_t signal;  // 1 + round
  alignas(16) uint64_t taken;   // by the next rank: rounds that it has read
  alignas(16) uint32_t num_done[2];
  alignas(16) uint32_t out[kNumRows][kRowWords];
  alignas(16) uint32_t sum[kNumRows];
  alignas(16) uint32_t total;  // of all rounds
  alignas(16) uint32_t num_late;
};

struct SendParams {
  Box* self;
  Box* next;
  const uint32_t* x;  // [kNumRows, kRowWords]
  uint64_t round;
  Bug bug;
  int64_t timeout_ns;
};
struct RecvParams {
  Box* self;
  Box* previous;
  uint64_t round;
  Bug bug;
  int64_t timeout_ns;
};
struct SumParams {
  Box* self;
  Bug bug;
};

// False once the deadline is over.
inline bool await(const uint64_t* p, uint64_t value, int64_t timeout_ns, bool is_acquire) {
  const uint64_t deadline = now_ns() + static_cast<uint64_t>(timeout_ns);
  while ((is_acquire ? load_acquire_sys(p) : load_relaxed_sys(p)) < value) {
    if (now_ns() > deadline) return false;
    relax();
  }
  return true;
}

constexpr size_t kExchangeSharedBytes = 128 + 32 * kRowBytes;

void send_kernel(const SendParams p);
void recv_kernel(const RecvParams p);
void sum_kernel(const SumParams p);

}  // namespace moebius::simt_test
