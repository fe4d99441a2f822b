// The CPU engine: one rank's four halves over heaps that it can address directly.
//
// Protocol, order of halves and what happens when a rank fails: DESIGN.md, "The life of a round".
// Callers (backend/all_to_all.py) see to it that the halves of a round come in order; here only
// memory is trusted.
#pragma once

#include <stdint.h>

#include <cstddef>
#include <vector>

#include "cpu/segment.h"
#include "cpu/simd/kernels.h"
#include "cpu/wait.h"
#include "fault.h"
#include "formats.h"
#include "layout.h"

namespace moebius::cpu {

struct EngineConfig {
  Shape shape;
  bool is_token_major;
  ScaleFormat scale_format;
  Dtype output_dtype;
  int64_t hidden;
  int64_t timeout_ns;
  int num_cores;  // that the ranks of this host may run on, all together
};

struct DispatchSend {
  const std::byte* x;  // [T] rows of payload, or of `x_dtype` to be quantised
  int64_t x_stride;    // bytes
  Encoding encoding;
  Dtype x_dtype;            // kQuantise only
  const std::byte* scales;  // [T] rows of scale_bytes; null: none, or made by kQuantise
  int64_t scales_stride;    // bytes
  const void* topk_ids;     // [T, K] int32 or int64, contiguous
  bool has_int64_ids;
  const float* topk_weights;  // [T, K] contiguous; null without weights at dispatch
  int64_t num_tokens;         // T that are sent
};

struct DispatchRecv {
  // expert_major; token_major leaves these null.
  std::byte* x;              // [L, R*M] rows of payload
  std::byte* scales;         // element (l, row, group) at the strides below; null: none
  int64_t scale_strides[3];  // bytes
  int64_t scale_element;     // bytes
  int32_t* src_info;         // [L, R*M]
  int64_t* layout_range;     // [L, R], begin << 32 | count

  int32_t* expert_num_tokens;  // [L]
  int32_t* src_num_tokens;     // [R]
  void* expert_stats;          // [L] added to; may be null
  bool has_int64_stats;
  int64_t* wait_stats;  // [R] ns, added to; may be null
};

struct CombineSend {
  const std::byte* expert_out;  // expert_major: [L, R*M] rows; token_major: [R*M] rows
  int64_t expert_stride;        // bytes, expert_major only
  int64_t row_stride;           // bytes
};

struct CombineRecv {
  std::byte* out;             // [T] rows of the output dtype
  int64_t out_stride;         // bytes
  int64_t num_tokens;         // rows of `out`; those past what was sent become zero
  const float* topk_weights;  // [T, K]; null with weights at dispatch
  int64_t* wait_stats;        // [R] ns, added to; may be null
};

class Engine {
 public:
  // `heaps[r]` is rank r's heap, mapped here; `pids[r]` its process, 0 for one of this process.
  Engine(const EngineConfig& config,
         int rank,
         std::vector<std::byte*> heaps,
         const std::vector<int>& pids,
         const Kernels& kernels);

  // Each returns false on a fault. kRouting changed nothing; after kTimeout the round is lost and
  // closed, and the rank to blame is masked.
  bool dispatch_send(const DispatchSend& args);
  bool dispatch_recv(uint64_t epoch, const DispatchRecv& args);
  bool combine_send(uint64_t epoch, const CombineSend& args);
  bool combine_recv(uint64_t epoch, const CombineRecv& args);

  uint64_t num_rounds() const { return control(rank_).epoch; }  // begun; the number of the next
  bool is_dead(int rank) const { return has_given_up(rank_, rank); }
  void mask(int rank, bool is_dead);
  const Fault& fault() const { return fault_; }
  const HeapLayout& layout() const { return layout_; }
  int64_t remote_bytes() const {
    return remote_bytes_;
  }  // sent to other ranks so far, headers included

 private:
  // Waits for the signal of `src`, kind and epoch; false on a fault (recorded, the culprit masked).
  bool await(int src, SignalKind kind, uint64_t epoch, int64_t* count, int64_t* wait_stats);
  // Waits until the word of `epoch` is there; false with the reason in `fault_` when it will not
  // come.
  bool poll(int src, SignalKind kind, uint64_t epoch, uint64_t* word);
  bool fail(FaultKind kind,
            Reason reason,
            int rank,
            int via,
            uint64_t epoch,
            uint64_t word,
            int64_t waited_ns = 0);
  bool fail_protocol(int src, uint64_t epoch, uint64_t word) {
    return fail(FaultKind::kProtocol, Reason::kDeadline, src, -1, epoch, word);
  }
  // Who holds `src` up: follows the ranks that wait for one another. `src` itself if it waits for
  // nobody, or for us.
  int find_culprit(int src) const;
  // Closes a round that this rank gives up: tells whoever may wait for it. Returns false.
  bool lose(uint64_t epoch);
  bool close_round(uint64_t epoch);
  void signal_all(uint64_t epoch, SignalKind kind, uint64_t word);
  bool has_given_up(int who, int rank) const;
  // False, with the fault, when `dst` has given this rank up: its memory may serve other rounds by
  // now.
  bool may_write_to(int dst, uint64_t epoch);

  bool route(const DispatchSend& args);
  template <class Id>
  bool route_ids(const Id* ids, int64_t num_tokens);
  void quantise_routed(const DispatchSend& args);
  void send_cells(int dst, int slot, int32_t reply_base, const DispatchSend& args);
  // What a peer wrote is an index here only once it is known to be in bounds.
  bool is_sane(int slot, int src, int32_t num_tokens) const;
  void unpack_cell(int slot, int src, int32_t i, const DispatchRecv& args);
  void clean_cells(int slot, int src, int32_t num_tokens);
  void count_experts(int slot, int src, int32_t num_tokens, int32_t* expert_num_tokens);
  // Both return the rows they sent.
  int64_t reply_reduced(int slot, int src, int32_t i, const CombineSend& args);
  int64_t reply_each(int slot, int src, int32_t i, const CombineSend& args);

  std::byte* heap(int rank, int64_t offset) const { return heaps_[rank] + offset; }
  Control& control(int rank) const {
    return *reinterpret_cast<Control*>(heap(rank, layout_.control));
  }
  Signal& signal(int at, int slot, int src, SignalKind kind) const {
    return *reinterpret_cast<Signal*>(heap(at, layout_.signal(slot, src, kind)));
  }
  int32_t* local(int slot, int64_t what) const {
    return reinterpret_cast<int32_t*>(heap(rank_, layout_.local(slot, what)));
  }

  const EngineConfig config_;
  const HeapLayout layout_;
  const int rank_;
  const std::vector<std::byte*> heaps_;
  const Kernels& kernels_;
  const WaitPolicy policy_;
  std::vector<Liveness> liveness_;
  Fault fault_;
  int64_t remote_bytes_ = 0;

  // Scratch of dispatch send, kept to spare the allocations.
  std::vector<int32_t> rank_of_expert_;           // [E]
  std::vector<int32_t> topk_ids_;                 // [M, K] of this call
  std::vector<int32_t> last_token_;               // [R] last token listed for the rank
  std::vector<int32_t> reply_base_;               // [R] where the rank's replies begin
  std::vector<std::vector<int32_t>> tokens_for_;  // [R] tokens that go there, ascending
  std::vector<std::byte> quantised_;              // [M] payload, then scales
};

}  // namespace moebius::cpu
