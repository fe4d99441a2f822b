// What the host hands to the kernels. Plain data, fixed when it is captured: whatever changes from
// round to round is read from device memory (DESIGN.md, I1).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <cstddef>

#include "fault.h"
#include "formats.h"
#include "layout.h"

namespace moebius::cuda {

// A wait that failed, noted by the first block to see it; the last block acts on it.
struct Failure {
  uint64_t claimed;  // 1 + the round; compared, never cleared
  uint64_t noted;    // the same, once `fault` is there
  Fault fault;
};

constexpr uint64_t kMostChoices = kLowMask;

// What the kernels of one rank tell each other. Private device memory, zero at first; no peer
// touches it.
struct LocalState {
  // Parts of the running kernel that are done, per half; zero between kernels.
  uint32_t num_done[kNumHalves];
  // How often blocks have asked for a part of a half, where a kernel does two; zero between
  // kernels.
  uint32_t num_taken[kNumHalves];
  // Per slot: 1 + the last round that this rank gave up; likewise that it closed by an empty
  // combine.
  uint64_t lost[kMaxDepth];
  uint64_t closed[kMaxDepth];
  // The first bad choice: 1 + the round, then kMostChoices - its place in topk_ids; compared, never
  // cleared.
  uint64_t bad_choice;
  int64_t remote_bytes;         // sent to other ranks so far, headers included
  Failure failures[kMaxDepth];  // per slot
};

// Host-visible (pinned) memory. The first fault stays until the host has taken it.
struct FaultRecord {
  uint32_t is_set;  // written last, release; the host resets it
  Half half;
  Fault fault;
};

// One rank, as every half sees it.
struct Rank {
  HeapLayout layout;
  std::byte* const* heaps;  // [R] in device memory: the heap of every rank, mapped here
  std::byte* heap;          // heaps[rank]
  LocalState* state;
  int32_t* expert_counts;  // [L] zero between kernels; token_major only
  FaultRecord* record;
  int64_t timeout_ns;
  int64_t hidden;
  int32_t rank;
  Dtype output_dtype;
  ScaleFormat scale_format;
  bool is_token_major;
};

// `handle`: one word of device memory, the number of the round; written by dispatch send and read
// by the other halves.
struct DispatchSendParams {
  Rank self;
  uint64_t* handle;
  const std::byte* x;  // [T] rows of payload, or of `x_dtype` to be quantised; 16-byte aligned
  int64_t x_stride;    // bytes, a multiple of 16
  Encoding encoding;
  Dtype x_dtype;            // kQuantise only
  const std::byte* scales;  // [T] rows of scale_bytes, 4-byte aligned; null: none, or made here
  int64_t scales_stride;    // bytes
  const void* topk_ids;     // [T, K] int32 or int64, contiguous
  bool has_int64_ids;
  const float* topk_weights;     // [T, K] contiguous; null without weights at dispatch
  int64_t num_tokens;            // T
  const void* num_valid_tokens;  // int32 or int64 scalar; null: all T
  bool has_int64_valid;
};

struct DispatchRecvParams {
  Rank self;
  const uint64_t* handle;
  // expert_major: [L, R*M] rows of payload. token_major: [R*M] rows. 16-byte aligned.
  std::byte* x;
  std::byte* scales;           // element (l, row, group) at the strides below; null: none
  int64_t scale_strides[3];    // bytes; of token_major the first is unused
  int64_t scale_element;       // bytes
  int32_t* src_info;           // expert_major: [L, R*M], else null
  int64_t* layout_range;       // expert_major: [L, R], begin << 32 | count, else null
  int32_t* topk_ids;           // token_major: [R*M, K], else null
  float* topk_weights;         // token_major: [R*M, K], else null
  int32_t* expert_num_tokens;  // [L]
  int32_t* src_num_tokens;     // [R]
  void* expert_stats;          // [L] added to; may be null
  bool has_int64_stats;
  int64_t* wait_stats;  // [R] ns, added to; may be null
};

struct CombineSendParams {
  Rank self;
  const uint64_t* handle;
  const std::byte* expert_out;  // expert_major: [L, R*M] rows; token_major: [R*M]; 16-byte aligned
  int64_t expert_stride;        // bytes, expert_major only; a multiple of 16
  int64_t row_stride;           // bytes, a multiple of 16
};

struct CombineRecvParams {
  Rank self;
  const uint64_t* handle;
  std::byte* out;             // [T] rows of the output dtype, 16-byte aligned
  int64_t out_stride;         // bytes, a multiple of 16
  int64_t num_tokens;         // rows of `out`; those past what was sent become zero
  const float* topk_weights;  // [T, K]; null with weights at dispatch
  int64_t* wait_stats;        // [R] ns, added to; may be null
};

}  // namespace moebius::cuda
