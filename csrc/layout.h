// The one definition of what lies where in a rank's heap. Every engine and Python ask it; nothing
// repeats its arithmetic (DESIGN.md, I8). Clean for host and device: no library, no exceptions, no
// allocation.
//
// A heap has the same layout on every rank:
//   control         the round counter and what a rank says of itself
//   masks           the ranks that this one has given up
//   refusals        the ranks that have given this one up; each written by that rank (CUDA engine,
//                   and remote ranks)
//   beats           with remote ranks only: R signals, one per 128 bytes, by which each rank says,
//   while
//                   it waits long, that it lives and for whom it waits
//   signals         D x R x {dispatch, combine}, one per 128 bytes
//   dispatch inbox  D x R x M cells: every source may send all its tokens here; before those of a
//                   source, with positions, how many of its rows each local expert gets
//   combine inbox   D x rows: the source assigns the rows, so the count is exact
//   workspace       D x what the halves of a round tell each other; never touched by a peer
//   outbox          with remote ranks only: what leaves over the network, until it has left; one,
//                   not one per slot; never touched by a peer
//
// Signals. Slot of round e: e % D. A word is `epoch << 24 | low`; low is count + 1, or kAborted |
// culprit + 1.
//   signal    | writer          | reader                        | order, scope    | at rest        | reset by
//   dispatch  | source, DS(e)   | destination, DR(e)            | release/acquire | word of e - D  | never: the
//   combine   | destination,    | source, CR(e) and the closing | release/acquire | word of e - D  |   epoch is
//             | CS(e)           | wait of DS(e + D)             |                 |                |   compared
// Zero, the word of fresh memory, has no count and so is "nothing yet" for every epoch. A word
// older than expected means not here yet; a newer one is a protocol error, unless it is an abort: a
// rank that loses a round says so at once, over a word of the slot's last round that may not have
// been read. It then reads as an abort of that one (docs/protocol-model.md).
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define MOEBIUS_HD __host__ __device__
#else
#define MOEBIUS_HD
#endif

namespace moebius {

constexpr int64_t kLineBytes = 128;   // two cache lines: neighbours are prefetched in pairs on x86
constexpr int64_t kVectorBytes = 16;  // the unit of a bulk copy (PTX ISA, cp.async.bulk)
constexpr int64_t kPageBytes = 4096;
constexpr int kScaleGroup = 128;  // channels that share one FP8 scale
constexpr int kMaxTopk = 32;
constexpr int kMaxDepth = 8;

constexpr int kCountBits = 24;
constexpr uint64_t kAborted =
    1u << 23;  // the sender gave the round up; the low bits name the culprit
constexpr uint64_t kLowMask = (1u << kCountBits) - 1;

MOEBIUS_HD constexpr int64_t align_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
MOEBIUS_HD constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

MOEBIUS_HD constexpr uint64_t signal_word(uint64_t epoch, uint64_t count) {
  return epoch << kCountBits | (count + 1);
}
MOEBIUS_HD constexpr uint64_t abort_word(uint64_t epoch, uint64_t culprit) {
  return epoch << kCountBits | kAborted | (culprit + 1);
}
MOEBIUS_HD constexpr uint64_t signal_epoch(uint64_t word) { return word >> kCountBits; }
MOEBIUS_HD constexpr bool signal_is_abort(uint64_t word) { return (word & kAborted) != 0; }
// Count of a signal, or culprit of an abort.
MOEBIUS_HD constexpr int64_t signal_value(uint64_t word) {
  return static_cast<int64_t>(word & (kAborted - 1)) - 1;
}
// True once the word of `epoch`, or a newer one, is there.
MOEBIUS_HD constexpr bool signal_arrived(uint64_t word, uint64_t epoch) {
  return (word & kLowMask) != 0 && signal_epoch(word) >= epoch;
}

enum class SignalKind : int32_t { kDispatch = 0, kCombine = 1 };

// One signal word and, for waiters that sleep, a note that they do; alone on its line.
struct Signal {
  uint64_t word;
  uint32_t num_sleepers;
};

// What a rank says of itself; written by its owner only.
struct Control {
  uint64_t epoch;  // rounds begun: the number of the next one
  // While waiting long: signal_word(epoch, 2 * rank + kind) of what is awaited; else 0. Peers read
  // it to find who is to blame.
  uint64_t awaiting;
  uint64_t combined[kMaxDepth];  // per slot: 1 + the last round whose combine signals are out
};

// Everything the layout depends on; equal on all ranks.
struct Shape {
  int32_t num_ranks;
  int32_t num_experts;
  int32_t num_topk;
  int32_t max_num_tokens;
  int32_t depth;
  int64_t payload_bytes;  // of one token
  int64_t scale_bytes;    // of one token, as they travel
  int64_t reply_bytes;    // of one row that combine sends
  bool has_weights;    // weights travel with dispatch, so combine is reduced on the expert's rank
  bool has_positions;  // room for what a source says of the rows of single experts: expert_major
  bool has_outbox = false;  // some rank of the group is remote to another

  MOEBIUS_HD constexpr int32_t num_local_experts() const { return num_experts / num_ranks; }
  // Rows a token can get back: one per rank where they are reduced there, else one per choice.
  MOEBIUS_HD constexpr int64_t replies_per_token() const {
    return has_weights ? min_of(num_topk, num_ranks) : num_topk;
  }
  // Whether there is a row, or as many from it on as a cell may ask for, in the combine inbox.
  MOEBIUS_HD constexpr bool is_reply_row(int32_t row) const {
    const int64_t last = int64_t{row} + (has_weights ? 0 : num_topk - 1);
    return row >= 0 && last < max_num_tokens * replies_per_token();
  }
  // Cells, and rows, that the outbox holds: a token goes to each rank once, so the cells always
  // fit.
  MOEBIUS_HD constexpr int64_t outbox_rows() const {
    return has_outbox ? max_num_tokens * min_of(num_topk, num_ranks) : 0;
  }
};

// Head of a cell's header; `num_topk` local experts (int32, -1: not here), with `has_weights` as
// many weights (float), and with `has_positions` as many positions (int32) follow: how many tokens
// before this one its source sends to that expert. Counts and positions are the CUDA engine's.
struct CellHead {
  int32_t token;      // index at the source
  int32_t reply_row;  // row of the source's combine inbox that takes the reply; plus the choice,
                      // without weights
};

struct HeapLayout {
  Shape shape;
  int64_t scales_in_cell, head_in_cell, cell_bytes, counts_bytes, reply_stride;
  int64_t control, masks, refusals, beats, signals, dispatch_inbox, combine_inbox, workspace,
      outbox_cells, outbox_replies, total;
  // In the workspace of a slot:
  int64_t num_sent, num_received, num_clean, reply_rows, cell_rows, workspace_bytes;

  MOEBIUS_HD static constexpr HeapLayout of(const Shape& s) {
    HeapLayout h{};
    h.shape = s;
    const int64_t num_cells = int64_t{s.num_ranks} * s.max_num_tokens;
    h.scales_in_cell = align_up(s.payload_bytes, kVectorBytes);
    h.head_in_cell = align_up(h.scales_in_cell + s.scale_bytes, kVectorBytes);
    const int64_t head_bytes =
        int64_t{sizeof(CellHead)} +
        4 * int64_t{s.num_topk} * (1 + (s.has_weights ? 1 : 0) + (s.has_positions ? 1 : 0));
    h.cell_bytes = align_up(h.head_in_cell + head_bytes, kLineBytes);
    h.counts_bytes = s.has_positions ? align_up(4 * s.num_local_experts(), kLineBytes) : 0;
    h.reply_stride = align_up(s.reply_bytes, kLineBytes);

    h.control = 0;
    h.masks = align_up(sizeof(Control), kLineBytes);
    h.refusals =
        h.masks + align_up(4 * int64_t{s.num_ranks}, kLineBytes);  // uint32 [R], 1: given up
    h.beats = h.refusals + align_up(4 * int64_t{s.num_ranks}, kLineBytes);  // the same
    h.signals = h.beats + (s.has_outbox ? s.num_ranks * kLineBytes : 0);
    h.dispatch_inbox = h.signals + int64_t{s.depth} * s.num_ranks * 2 * kLineBytes;
    h.combine_inbox = h.dispatch_inbox + int64_t{s.depth} * s.num_ranks * h.source_bytes();
    h.workspace =
        h.combine_inbox + s.depth * s.max_num_tokens * s.replies_per_token() * h.reply_stride;

    h.num_sent = 0;  // int32 [R], then the valid tokens
    h.num_received = align_up(4 * (s.num_ranks + int64_t{1}), kLineBytes);          // int32 [R]
    h.num_clean = h.num_received + align_up(4 * int64_t{s.num_ranks}, kLineBytes);  // int32 [R]
    h.reply_rows =
        h.num_clean + align_up(4 * int64_t{s.num_ranks}, kLineBytes);  // int32 [M, replies]
    h.cell_rows = h.reply_rows + align_up(4 * s.max_num_tokens * s.replies_per_token(), kLineBytes);
    h.workspace_bytes =
        h.cell_rows + align_up(4 * num_cells * s.num_topk, kLineBytes);  // int32 [R, M, K]
    h.outbox_cells = h.workspace + s.depth * h.workspace_bytes;
    h.outbox_replies = h.outbox_cells + s.outbox_rows() * h.cell_bytes +
                       (s.has_outbox ? s.num_ranks * h.counts_bytes : 0);
    h.total = align_up(h.outbox_replies + s.outbox_rows() * h.reply_stride, kPageBytes);
    return h;
  }

  MOEBIUS_HD constexpr int slot_of(uint64_t epoch) const {
    const uint64_t depth = static_cast<uint64_t>(shape.depth);
    // A GPU divides 64 bits in a hundred instructions.
    return static_cast<int>((depth & (depth - 1)) == 0 ? epoch & (depth - 1) : epoch % depth);
  }
  MOEBIUS_HD constexpr int64_t signal(int slot, int src_rank, SignalKind kind) const {
    return signals +
           ((int64_t{slot} * shape.num_ranks + src_rank) * 2 + static_cast<int>(kind)) * kLineBytes;
  }
  // Of what one source may send in a round.
  MOEBIUS_HD constexpr int64_t source_bytes() const {
    return counts_bytes + shape.max_num_tokens * cell_bytes;
  }
  // int32 [L] rows of the source at each local expert; with positions.
  MOEBIUS_HD constexpr int64_t counts(int slot, int src_rank) const {
    return dispatch_inbox + (int64_t{slot} * shape.num_ranks + src_rank) * source_bytes();
  }
  MOEBIUS_HD constexpr int64_t cell(int slot, int src_rank, int64_t i) const {
    return counts(slot, src_rank) + counts_bytes + i * cell_bytes;
  }
  // In a cell: its experts; its weights; its positions.
  MOEBIUS_HD constexpr int64_t ids_in_cell() const {
    return head_in_cell + int64_t{sizeof(CellHead)};
  }
  MOEBIUS_HD constexpr int64_t weights_in_cell() const {
    return ids_in_cell() + 4 * int64_t{shape.num_topk};
  }
  MOEBIUS_HD constexpr int64_t positions_in_cell() const {
    return weights_in_cell() + (shape.has_weights ? 4 * int64_t{shape.num_topk} : 0);
  }
  MOEBIUS_HD constexpr int64_t reply(int slot, int64_t row) const {
    return combine_inbox +
           (int64_t{slot} * shape.max_num_tokens * shape.replies_per_token() + row) * reply_stride;
  }
  MOEBIUS_HD constexpr int64_t beat(int src) const { return beats + src * kLineBytes; }
  // Where `src` says that it has given this rank up.
  MOEBIUS_HD constexpr int64_t refusal(int src) const { return refusals + 4 * int64_t{src}; }
  // What leaves for rank `dst`, as it will lie there: counts, then cells. `i` counts the cells of
  // the ranks before it, too.
  MOEBIUS_HD constexpr int64_t outbox_counts(int dst, int64_t i) const {
    return outbox_cells + dst * counts_bytes + i * cell_bytes;
  }
  MOEBIUS_HD constexpr int64_t outbox_cell(int dst, int64_t i) const {
    return outbox_counts(dst, i) + counts_bytes;
  }
  MOEBIUS_HD constexpr int64_t outbox_reply(int64_t row) const {
    return outbox_replies + row * reply_stride;
  }
  MOEBIUS_HD constexpr int64_t local(int slot, int64_t what) const {
    return workspace + slot * workspace_bytes + what;
  }
};

}  // namespace moebius
