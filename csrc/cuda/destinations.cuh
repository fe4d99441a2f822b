// Dispatch send: where a token goes, and what travels beside its payload.
#pragma once

#include "cuda/positions.cuh"

namespace moebius::cuda {

constexpr int kStageScales = kStageBytes / kScaleGroup;

// Columns of the positions: the ranks, and then the experts, if they are wanted.
MOEBIUS_HD constexpr int num_lists(const Shape& s) {
  return s.num_ranks + (s.has_positions ? s.num_experts : 0);
}

struct SendShared {
  Positions positions;  // see num_lists
  std::byte** heaps;    // [R]
  int32_t* is_alive;    // [R]
  int32_t* num_sent;    // [R]
  int32_t* reply_base;  // [R] where the rank's replies begin
  Ending* ending;
  std::byte* stages;  // of this warp: two
  float* scales;      // of this warp: of one slice

  MOEBIUS_DEVICE static SendShared in(std::byte* at, const Shape& shape, int num_words) {
    const int num_ranks = shape.num_ranks;
    SendShared s;
    s.stages = at + warp_index() * 2 * kStageBytes;
    at += kWarpsPerBlock * 2 * kStageBytes;
    s.scales = reinterpret_cast<float*>(at) + warp_index() * kStageScales;
    at += kWarpsPerBlock * kStageScales * sizeof(float);
    s.positions = Positions::in(at, num_lists(shape), num_words);
    at += positions_bytes(num_lists(shape), num_words);
    s.heaps = reinterpret_cast<std::byte**>(at);
    s.is_alive = reinterpret_cast<int32_t*>(s.heaps + num_ranks);
    s.num_sent = s.is_alive + num_ranks;
    s.reply_base = s.num_sent + num_ranks;
    s.ending = reinterpret_cast<Ending*>(s.reply_base + num_ranks);
    return s;
  }
  static size_t num_bytes(const Shape& s, int num_words) {
    return kWarpsPerBlock * (2 * kStageBytes + kStageScales * sizeof(float)) +
           positions_bytes(num_lists(s), num_words) + 20 * static_cast<size_t>(s.num_ranks) +
           sizeof(Ending);
  }
};

MOEBIUS_DEVICE int32_t id_at(const DispatchSendParams& p, int64_t at) {
  if (!p.has_int64_ids) return load(static_cast<const int32_t*>(p.topk_ids) + at);
  const int64_t id = load(static_cast<const int64_t*>(p.topk_ids) + at);
  const bool fits = id >= -1 && id < p.self.layout.shape.num_experts;
  return fits ? static_cast<int32_t>(id) : -2;
}
MOEBIUS_DEVICE int64_t raw_id_at(const DispatchSendParams& p, int64_t at) {
  return p.has_int64_ids ? load(static_cast<const int64_t*>(p.topk_ids) + at)
                         : int64_t{load(static_cast<const int32_t*>(p.topk_ids) + at)};
}

// Where a warp's token goes; one lane for each choice.
struct Destinations {
  int32_t id;         // -1: nowhere
  int32_t dst;        // -1: nowhere
  float weight;       // of the choice
  int32_t position;   // among the tokens of `id`
  int32_t reply_row;  // for that of the first choice of `dst`, at the source
  std::byte* cell;    // likewise
  uint32_t firsts;    // lanes with the first choice of their rank
};

// Asks for the token's choices.
MOEBIUS_DEVICE Destinations ask_choices(const DispatchSendParams& p, int token) {
  const Shape& s = p.self.layout.shape;
  const int64_t at = int64_t{token} * s.num_topk + lane();
  Destinations d{-1, -1, 0.0f, 0, 0, nullptr, 0};
  if (lane() < s.num_topk) {
    d.id = id_at(p, at);
    if (s.has_weights) d.weight = load(p.topk_weights + at);
  }
  return d;
}

// The part of it that the choices say. After read_ranks and a block barrier.
MOEBIUS_DEVICE void find_ranks(const DispatchSendParams& p,
                               const SendShared& shared,
                               Destinations* asked) {
  const Shape& s = p.self.layout.shape;
  Destinations& d = *asked;
  if (d.id < 0 || d.id >= s.num_experts) d.id = -1;
  if (d.id >= 0) {
    d.dst = d.id / s.num_local_experts();
    if (load(shared.is_alive + d.dst) == 0) d.dst = d.id = -1;
  }
  bool is_first = d.dst >= 0;
#pragma unroll 1
  for (int k = 0; k < s.num_topk; ++k) {
    const int other = shfl(d.dst, k);
    if (k < lane() && other == d.dst) is_first = false;
  }
  d.firsts = ballot(is_first);
}

// The part of it that the lists say.
MOEBIUS_DEVICE void find_cells(const DispatchSendParams& p,
                               int slot,
                               int token,
                               int chunk_begin,
                               const SendShared& shared,
                               Destinations* found) {
  const Shape& s = p.self.layout.shape;
  Destinations& d = *found;
  if (s.has_positions && d.id >= 0) {
    d.position = shared.positions.find(s.num_ranks + d.id, token - chunk_begin);
  }
  if ((d.firsts >> lane() & 1u) != 0) {
    const int position = shared.positions.find(d.dst, token - chunk_begin);
    d.reply_row = s.has_weights ? load(shared.reply_base + d.dst) + position : token * s.num_topk;
    std::byte* heap = load(shared.heaps + d.dst);
    const HeapLayout& layout = p.self.layout;
    d.cell =
        kHasNetwork && heap == nullptr
            ? p.self.heap + layout.outbox_cell(d.dst, load(shared.reply_base + d.dst) + position)
            : heap + layout.cell(slot, p.self.rank, position);
  }
}

// For combine receive: the rows of the token's replies, in ascending rank order.
MOEBIUS_DEVICE void note_replies(const Rank& self, int slot, int token, const Destinations& d) {
  const Shape& s = self.layout.shape;
  const int replies = static_cast<int>(s.replies_per_token());
  int32_t* rows =
      in_workspace<int32_t>(self, slot, self.layout.reply_rows) + int64_t{token} * replies;
  if (!s.has_weights) {
    if (lane() < replies) store(rows + lane(), d.id >= 0 ? token * s.num_topk + lane() : -1);
    return;
  }
  int num_below = 0, num_firsts = 0;
#pragma unroll 1
  for (int k = 0; k < s.num_topk; ++k) {
    const int other = shfl(d.dst, k);
    const bool is_first = (d.firsts >> k & 1u) != 0;
    num_firsts += is_first ? 1 : 0;
    num_below += is_first && other < d.dst ? 1 : 0;
  }
  if ((d.firsts >> lane() & 1u) != 0) store(rows + num_below, d.reply_row);
  if (lane() >= num_firsts && lane() < replies) store(rows + lane(), -1);
}

// What travels beside the payload: the head, and scales that the caller made.
MOEBIUS_DEVICE void send_head(
    const DispatchSendParams& p, int token, int from, const Destinations& d, std::byte* cell) {
  const HeapLayout& layout = p.self.layout;
  const Shape& s = layout.shape;
  const int dst = shfl(d.dst, from);
  const int reply_row = shfl(d.reply_row, from);
  auto* head = reinterpret_cast<CellHead*>(cell + layout.head_in_cell);
  auto* ids = reinterpret_cast<int32_t*>(cell + layout.ids_in_cell());
  if (lane() == 0) {
    store(&head->token, token);
    store(&head->reply_row, reply_row);
  }
  if (lane() < s.num_topk) {
    store(ids + lane(), d.dst == dst ? d.id - dst * s.num_local_experts() : -1);
    if (s.has_weights) {
      store(reinterpret_cast<float*>(cell + layout.weights_in_cell()) + lane(), d.weight);
    }
    if (s.has_positions) {
      store(reinterpret_cast<int32_t*>(cell + layout.positions_in_cell()) + lane(), d.position);
    }
  }
  if (p.scales == nullptr) return;
  auto* to = reinterpret_cast<uint32_t*>(cell + layout.scales_in_cell);
  auto* scales = reinterpret_cast<const uint32_t*>(p.scales + token * p.scales_stride);
#pragma unroll 1
  for (int w = lane(); w < s.scale_bytes / 4; w += kWarp) store(to + w, load(scales + w));
}

}  // namespace moebius::cuda
