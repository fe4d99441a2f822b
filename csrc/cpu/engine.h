// The CPU engine: one rank's four halves over heaps that it can address directly.
//
// Protocol, order of halves and what happens when a rank fails: DESIGN.md, "The life of a round".
// Callers (backend/all_to_all.py) see to it that the halves of a round come in order; here only
// memory is trusted.
#pragma once

#include <stdint.h>

#include <cstddef>
#include <vector>

#include "cpu/network.h"
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
  int num_cores;            // that the ranks of this host may run on, all together
  int64_t chunk_bytes = 0;  // of dispatch messages over the network; 0: one message a rank
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
  // `heaps[r]` is rank r's heap, mapped here, or null: rank r is remote, and `network` leads there.
  // `pids[r]` is its process, 0 for one of this process or of another host.
  Engine(const EngineConfig& config,
         int rank,
         std::vector<std::byte*> heaps,
         const std::vector<int>& pids,
         const Kernels& kernels,
         Network* network = nullptr);

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
  // A word without data.
  void send_signal(int dst, int slot, SignalKind kind, uint64_t word);
  bool has_given_up(int who, int rank) const;
  // Whether `rank` has given this one up.
  bool is_refused_by(int rank) const;
  // False, with the fault, when `dst` has given this rank up: its memory may serve other rounds by
  // now.
  bool may_write_to(int dst, uint64_t epoch);

  bool route(const DispatchSend& args);
  template <class Id>
  bool route_ids(const Id* ids, int64_t num_tokens);
  void quantise_routed(const DispatchSend& args);
  void fill_cell(std::byte* cell, int dst, int32_t i, const DispatchSend& args);
  void send_cells(int dst, int slot, const DispatchSend& args);
  // What a peer wrote is an index here only once it is known to be in bounds.
  bool is_sane(int slot, int src, int32_t num_tokens) const;
  void unpack_cell(int slot, int src, int32_t i, const DispatchRecv& args);
  void clean_cells(int slot, int src, int32_t num_tokens);
  void count_experts(int slot, int src, int32_t num_tokens, int32_t* expert_num_tokens);
  // The one row that answers a cell, into `reply`.
  void reduce(int slot, int src, int32_t i, const CombineSend& args, std::byte* reply);
  // Calls `place_row(row at home, expert's row)` for each choice that is answered here, while true.
  template <class PlaceRow>
  bool place_each(int slot, int src, const CombineSend& args, PlaceRow place_row);
  int64_t reply_direct(int slot, int src, const CombineSend& args);  // returns the rows it sent

  // Over the network (cpu/remote.cpp).
  bool is_remote(int rank) const { return heaps_[rank] == nullptr; }
  void refuse(int rank, bool is_given_up);
  // Tells the remote ranks, but `awaited`, that this one lives and waits for `awaited`.
  void beat(int awaited);
  // Whom a remote rank waits for, by its last beat; -1 if it beats no more. `seen` is kept between
  // the looks of one wait.
  struct SeenBeat {
    uint64_t word = 0;
    int64_t time_ns = 0;
  };
  int heard_from(int src, int64_t now, SeenBeat* seen) const;
  // Makes sure that the outbox may be filled again; false, with the fault, if a rank keeps it.
  bool clear_outbox(uint64_t epoch);
  // Makes sure that its combine part takes `num_rows` more; false as above.
  bool make_room(int64_t num_rows, uint64_t epoch);
  void send_cells_remote(int dst, int slot, uint64_t epoch, const DispatchSend& args);
  // Sends the rows and the signal. Counts the rows; false, with the fault, if the outbox was full
  // and a rank kept it.
  bool reply_remote(int slot, int src, uint64_t epoch, const CombineSend& args, int64_t* num_rows);

  std::byte* heap(int rank, int64_t offset) const { return heaps_[rank] + offset; }
  const CellHead& head_of(int slot, int src, int64_t i) const {
    return *reinterpret_cast<const CellHead*>(
        heap(rank_, layout_.cell(slot, src, i) + layout_.head_in_cell));
  }
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
  Network* const network_;  // null without remote ranks
  const WaitPolicy policy_;
  std::vector<Liveness> liveness_;
  Fault fault_;
  int64_t remote_bytes_ = 0;
  uint64_t num_beats_ = 0;
  int64_t outbox_used_ = 0;  // rows of its combine part, by the combine send that runs

  // Scratch of dispatch send, kept to spare the allocations.
  std::vector<int32_t> rank_of_expert_;           // [E]
  std::vector<int32_t> topk_ids_;                 // [M, K] of this call
  std::vector<int32_t> last_token_;               // [R] last token listed for the rank
  std::vector<int32_t> reply_base_;               // [R] where the rank's replies begin
  std::vector<std::vector<int32_t>> tokens_for_;  // [R] tokens that go there, ascending
  std::vector<std::byte> quantised_;              // [M] payload, then scales
};

}  // namespace moebius::cpu
