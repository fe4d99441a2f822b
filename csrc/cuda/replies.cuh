// The answers that a rank owes: to which cells, where their rows are, and where they go.
#pragma once

#include "cuda/mover.cuh"

namespace moebius::cuda {

// Cells are numbered source by source: those of direct ranks first, then those of remote ones,
// whose answers go by way of the outbox.
struct ReplyShared {
  MoverShared mover;
  int32_t* order;       // [R] the sources that are answered
  int32_t* first_cell;  // [R + 1] cells of the sources before, in this order
  int32_t* counts;
  Ending* ending;

  enum { kNumSources, kNumDirect, kNumRows, kNumCounts };  // of `counts`; rows: see count_rows

  MOEBIUS_DEVICE static ReplyShared in(std::byte* at, bool has_mover, int num_ranks) {
    ReplyShared shared;
    shared.mover = MoverShared::in(at);
    if (has_mover) at += kMoverSharedBytes;
    shared.order = reinterpret_cast<int32_t*>(at);
    shared.first_cell = shared.order + num_ranks;
    shared.counts = shared.first_cell + num_ranks + 1;
    shared.ending = reinterpret_cast<Ending*>(shared.counts + kNumCounts);
    return shared;
  }
  static size_t num_bytes(bool has_mover, int num_ranks) {
    return (has_mover ? kMoverSharedBytes : 0) +
           4 * (2 * static_cast<size_t>(num_ranks) + 1 + kNumCounts + 2);
  }

  MOEBIUS_DEVICE int num_sources() const { return load(counts + kNumSources); }
  MOEBIUS_DEVICE int num_direct() const { return load(counts + kNumDirect); }
  MOEBIUS_DEVICE int cells_before(int i) const { return load(first_cell + i); }
};

// By the first warp.
MOEBIUS_DEVICE void order_sources(const Rank& self, int slot, const ReplyShared& shared) {
  const int num_ranks = self.layout.shape.num_ranks;
  const int32_t* num_received = in_workspace<int32_t>(self, slot, self.layout.num_received);
  int n = 0, sum = 0;
  const auto append = [&](bool wants_remote) {
#pragma unroll 1
    for (int first = 0; first < num_ranks; first += kWarp) {
      const int src = first + lane();
      const int num_cells = src < num_ranks ? load(num_received + src) : 0;
      const bool is_one = src < num_ranks && !is_masked(self, src) &&
                          (!kHasNetwork || is_remote(self, src) == wants_remote);
      const uint32_t which = ballot(is_one);
      const int up_to = scan_warp(is_one ? num_cells : 0);
      if (is_one) {
        const int at = n + popcount(which & ((1u << lane()) - 1));
        store(shared.order + at, src);
        store(shared.first_cell + at + 1, sum + up_to);
      }
      n += popcount(which);
      sum += shfl(up_to, kWarp - 1);
    }
  };
  append(false);
  if (lane() == 0) store(shared.counts + ReplyShared::kNumDirect, n);
  if (kHasNetwork) append(true);
  if (lane() != 0) return;
  store(shared.first_cell, 0);
  store(shared.counts + ReplyShared::kNumSources, n);
  store(shared.counts + ReplyShared::kNumRows, 0);
}

// The answer to one cell.
struct Reply {
  int src;
  int64_t number;  // of the cell, in the inbox
  const std::byte* cell;
  int32_t row;  // in the combine inbox of `src`; -1: out of bounds, not sent
};

// Row that the source wants the answer in, or the first of them; -1 if there is no such row. Seen
// to be in bounds when the cell was received; a peer can write here all the same.
MOEBIUS_DEVICE int32_t reply_row(const Rank& self, const std::byte* cell) {
  const auto* head = reinterpret_cast<const CellHead*>(cell + self.layout.head_in_cell);
  const int32_t row = load(&head->reply_row);
  return self.layout.shape.is_reply_row(row) ? row : -1;
}

// `i`: number of its source, in their order.
MOEBIUS_DEVICE Reply
reply_of(const Rank& self, int slot, int i, int number, const ReplyShared& shared) {
  const int index = number - shared.cells_before(i);
  Reply r;
  r.src = load(shared.order + i);
  r.number = int64_t{r.src} * self.layout.shape.max_num_tokens + index;
  r.cell = self.heap + self.layout.cell(slot, r.src, index);
  r.row = reply_row(self, r.cell);
  return r;
}
MOEBIUS_DEVICE Reply find_reply(const Rank& self, int slot, int number, const ReplyShared& shared) {
  const int i = find_source(shared.first_cell, shared.num_sources(), number);
  return reply_of(self, slot, i, number, shared);
}
MOEBIUS_DEVICE Reply warp_find_reply(const Rank& self,
                                     int slot,
                                     int number,
                                     const ReplyShared& shared) {
  const int i = warp_find_source(shared.first_cell, shared.num_sources(), number);
  return reply_of(self, slot, i, number, shared);
}

// Where a choice of a cell was put: address in expert_out, or null.
MOEBIUS_DEVICE const std::byte* expert_row(const CombineSendParams& p,
                                           int slot,
                                           const Reply& reply,
                                           int choice) {
  const Shape& s = p.self.layout.shape;
  if (choice >= s.num_topk) return nullptr;
  const int32_t* rows = in_workspace<int32_t>(p.self, slot, p.self.layout.cell_rows);
  const int32_t at = load(rows + reply.number * s.num_topk + choice);
  if (at < 0) return nullptr;
  const int num_rows = s.num_ranks * s.max_num_tokens;
  return p.expert_out + at / num_rows * p.expert_stride + at % num_rows * p.row_stride;
}

// Rows that are sent together: units [begin, end), a unit being a cell or, of rows of single
// experts, a (cell, choice). Those from `outbox_begin` on are remote ones, and stand in the outbox
// from its first row on.
struct Wave {
  int begin, end;
  int outbox_begin;
  bool is_first;
  Share share;
};

MOEBIUS_DEVICE std::byte* place_of(
    const Rank& self, int slot, const Reply& reply, int choice, int unit, const Wave& wave) {
  if (kHasNetwork && unit >= wave.outbox_begin) {
    return self.heap + self.layout.outbox_reply(unit - wave.outbox_begin);
  }
  return in_heap<std::byte>(self, reply.src, self.layout.reply(slot, reply.row + choice));
}

// Posts what the wave has put into the outbox, a warp for each remote rank; with a rank's last rows
// goes its signal. `choices`: units of a cell.
MOEBIUS_DEVICE void post_replies(const CombineSendParams& p,
                                 const Begun& begun,
                                 int choices,
                                 const Wave& wave,
                                 const ReplyShared& shared) {
  const Rank& self = p.self;
  const HeapLayout& layout = self.layout;
  uint64_t* signal = signal_at(self, self.rank, begun.slot, self.rank, SignalKind::kCombine);
  const auto outbox = [&](int unit) {
    return self.heap + layout.outbox_reply(unit - wave.outbox_begin);
  };
#pragma unroll 1
  for (int i = shared.num_direct() + warp_index(); i < shared.num_sources(); i += kWarpsPerBlock) {
    const int dst = load(shared.order + i);
    const int first = shared.cells_before(i), last = shared.cells_before(i + 1);
    const uint64_t word = signal_word(begun.epoch, static_cast<uint64_t>(last - first));
    // Its units in this wave. It is done with if they are its last; with none at all, in the first.
    const int begin = first * choices > wave.begin ? first * choices : wave.begin;
    const int end = last * choices < wave.end ? last * choices : wave.end;
    const bool is_empty = first == last;
    const bool is_last = is_empty ? wave.is_first : begin < end && end == last * choices;
    if (begin < end && self.layout.shape.has_weights) {
      // One message: its rows stand together, here and there.
      const int32_t base = reply_row(self, self.heap + layout.cell(begun.slot, dst, 0));
      const int64_t row = int64_t{base} + (begin - first);
      const int64_t num_rows = layout.shape.max_num_tokens * layout.shape.replies_per_token();
      const bool fits = base >= 0 && row + (end - begin) <= num_rows;
      const int64_t num_bytes = fits ? (end - begin) * layout.reply_stride : 0;
      std::byte* to = self.heap + layout.reply(begun.slot, fits ? row : 0);
      if (is_last) {
        warp_put_signal(dst, to, outbox(begin), num_bytes, signal, word);
      } else {
        warp_put(dst, to, outbox(begin), num_bytes);
      }
      continue;
    }
#pragma unroll 1
    for (int unit = begin; unit < end; ++unit) {
      const Reply r = find_reply(self, begun.slot, unit / choices, shared);
      if (r.row < 0 || expert_row(p, begun.slot, r, unit % choices) == nullptr) continue;
      warp_put(dst,
               self.heap + layout.reply(begun.slot, r.row + unit % choices),
               outbox(unit),
               layout.reply_stride);
    }
    if (!is_last) continue;
    network_fence();
    if (lane() == 0) put_word(dst, signal, word);
  }
}

}  // namespace moebius::cuda
