// Dispatch, send half.
//
// Postcondition: cell (slot, me, i) at rank d holds the i-th of my tokens that has an expert on d,
// for
//   all i < n, and then the dispatch signal of d says n.
// Grid: at most num_sms blocks. A warp takes a slice of a token; each block works out all
// positions. Memory: reads x, topk_ids, topk_weights; writes the cells and signals of all ranks,
// and what the
//   later halves need into the workspace.
// Synchronisation: [arrived] release, by the last block; [all-done]; the closing wait of round e -
// D. Requirements: rows of x 16-byte aligned. Cost: each row of x is read once, and written once to
// each rank that has one of its experts.
#include "cuda/launch.cuh"
#include "cuda/launchers.h"
#include "cuda/payload.cuh"
#include "cuda/positions.cuh"
#include "cuda/rank.cuh"

namespace moebius::cuda {
namespace {

struct SendLaunch {
  DispatchSendParams args;
  int num_words;    // of the positions
  int num_slices;   // of a token
  int slice_units;  // of a slice; see out_unit
};

constexpr int kStageScales = kStageBytes / kScaleGroup;

struct Shared {
  Positions positions;
  std::byte** heaps;    // [R]
  int32_t* is_alive;    // [R]
  int32_t* num_sent;    // [R]
  int32_t* reply_base;  // [R] where the rank's replies begin
  uint32_t* scratch;    // is any wait of this block over without success; is this the last block
  std::byte* stages;    // of this warp: two
  float* scales;        // of this warp: of one slice
};

MOEBIUS_DEVICE Shared carve(int num_ranks, int num_words) {
  Shared s;
  std::byte* at = shared_memory();
  s.stages = at + warp_index() * 2 * kStageBytes;
  at += kWarpsPerBlock * 2 * kStageBytes;
  s.scales = reinterpret_cast<float*>(at) + warp_index() * kStageScales;
  at += kWarpsPerBlock * kStageScales * sizeof(float);
  s.positions = Positions::in(at, num_ranks, num_words);
  at += positions_bytes(num_ranks, num_words);
  s.heaps = reinterpret_cast<std::byte**>(at);
  s.is_alive = reinterpret_cast<int32_t*>(s.heaps + num_ranks);
  s.num_sent = s.is_alive + num_ranks;
  s.reply_base = s.num_sent + num_ranks;
  s.scratch = reinterpret_cast<uint32_t*>(s.reply_base + num_ranks);
  return s;
}
size_t shared_bytes(int num_ranks, int num_words) {
  return kWarpsPerBlock * (2 * kStageBytes + kStageScales * sizeof(float)) +
         positions_bytes(num_ranks, num_words) + 20 * static_cast<size_t>(num_ranks) + 8;
}

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

MOEBIUS_DEVICE int64_t count_valid(const DispatchSendParams& p) {
  if (p.num_valid_tokens == nullptr) return p.num_tokens;
  const int64_t n = p.has_int64_valid
                        ? load(static_cast<const int64_t*>(p.num_valid_tokens))
                        : int64_t{load(static_cast<const int32_t*>(p.num_valid_tokens))};
  return n < 0 ? 0 : min_of(n, p.num_tokens);
}

// Reads what does not change while the kernel runs.
MOEBIUS_DEVICE void read_ranks(const Rank& self, const Shared& shared) {
  for (int r = thread_index(); r < self.layout.shape.num_ranks; r += num_threads()) {
    store(shared.heaps + r, r == self.rank ? self.heap : load(self.heaps + r));
    store(shared.is_alive + r, is_masked(self, r) ? 0 : 1);
  }
}

// Makes sure that round `epoch - D`, which had the slot, is closed; else notes the failure. By the
// first warp of the block.
MOEBIUS_DEVICE void take_slot(const Rank& self, uint64_t epoch, int slot, const Shared& shared) {
  const int num_ranks = self.layout.shape.num_ranks;
  const uint64_t depth = static_cast<uint64_t>(self.layout.shape.depth);
  const uint64_t closed = epoch - depth;
  const bool has_last = epoch >= depth;
  if (has_last && load(&control_of(self, self.rank)->combined[slot]) != closed + 1) {
    // Never combined: the empty combine, by the block that comes first. The others wait for the
    // peers' at once, and need not be resident together with any.
    uint64_t before = 0;
    if (lane() == 0) before = exchange_max_gpu(&self.state->closed[slot], closed + 1);
    const bool is_first = shfl(before, 0) != closed + 1;
    for (int dst = thread_index(); is_first && dst < num_ranks; dst += kWarp) {
      if (load(shared.is_alive + dst) == 0) continue;
      send_signal(self, dst, slot, SignalKind::kCombine, signal_word(closed, 0));
    }
  }
  for (int src = thread_index(); src < num_ranks; src += kWarp) {
    if (load(shared.is_alive + src) == 0) continue;
    if (src == self.rank) continue;
    bool is_closed = true;
    if (is_refused_by(self, src)) {
      // Its memory may serve other rounds by now.
      is_closed =
          fail(self, epoch, FaultKind::kTimeout, Reason::kReported, self.rank, src, epoch, 0, 0);
    } else if (has_last) {
      // Pairs with [arrived] of combine send: it has read what we sent it in that round.
      uint64_t word;
      is_closed = poll(self, src, SignalKind::kCombine, closed, epoch, &word);
      if (is_closed && signal_epoch(word) != closed && !signal_is_abort(word)) {
        is_closed =
            fail(self, epoch, FaultKind::kProtocol, Reason::kDeadline, src, -1, closed, word, 0);
      }
    }
    if (!is_closed) store(shared.scratch, 1u);
  }
}

// Puts the tokens of [begin, end) into the lists of their ranks. Threads from `first_thread` on;
// the lists are empty.
MOEBIUS_DEVICE void mark_tokens(const DispatchSendParams& p,
                                uint64_t epoch,
                                int begin,
                                int end,
                                int first_thread,
                                const Shared& shared) {
  const Shape& s = p.self.layout.shape;
  const int num_local = s.num_local_experts();
  const int step = num_threads() - first_thread;
  for (int i = thread_index() - first_thread; i < (end - begin) * s.num_topk; i += step) {
    if (i < 0) break;  // a thread that polls
    const int token = i / s.num_topk;
    const int64_t at = int64_t{begin} * s.num_topk + i;
    const int32_t id = id_at(p, at);
    if (id < -1 || id >= s.num_experts) {
      // The first of them is recorded, by the last block.
      const uint64_t place = kMostChoices - static_cast<uint64_t>(min_of(at, kMostChoices));
      exchange_max_gpu(&p.self.state->bad_choice, (epoch + 1) << kCountBits | place);
    } else if (id >= 0 && load(shared.is_alive + id / num_local) != 0) {
      shared.positions.mark(id / num_local, token);
    }
  }
}

MOEBIUS_DEVICE void list_tokens(
    const DispatchSendParams& p, uint64_t epoch, int begin, int end, const Shared& shared) {
  shared.positions.clear();
  sync_block();
  mark_tokens(p, epoch, begin, end, 0, shared);
  sync_block();
  shared.positions.count();
  sync_block();
}

// Where a warp's token goes; one lane for each choice.
struct Destinations {
  int32_t id;         // -1: nowhere
  int32_t dst;        // -1: nowhere
  float weight;       // of the choice
  int32_t reply_row;  // for that of the first choice of `dst`, at the source
  std::byte* cell;    // likewise
  uint32_t firsts;    // lanes with the first choice of their rank
};

MOEBIUS_DEVICE Destinations find_destinations(
    const DispatchSendParams& p, int slot, int token, int chunk_begin, const Shared& shared) {
  const Shape& s = p.self.layout.shape;
  const int64_t at = int64_t{token} * s.num_topk + lane();
  Destinations d{-1, -1, 0.0f, 0, nullptr, 0};
  if (lane() < s.num_topk) {
    d.id = id_at(p, at);
    if (s.has_weights) d.weight = load(p.topk_weights + at);
    if (d.id < 0 || d.id >= s.num_experts) d.id = -1;
    if (d.id >= 0) {
      d.dst = d.id / s.num_local_experts();
      if (load(shared.is_alive + d.dst) == 0) d.dst = d.id = -1;
    }
  }
  bool is_first = d.dst >= 0;
  for (int k = 0; k < s.num_topk; ++k) {
    const int other = shfl(d.dst, k);
    if (k < lane() && other == d.dst) is_first = false;
  }
  d.firsts = ballot(is_first);
  if (is_first) {
    const int position = shared.positions.find(d.dst, token - chunk_begin);
    d.reply_row = s.has_weights ? load(shared.reply_base + d.dst) + position : token * s.num_topk;
    std::byte* heap = load(shared.heaps + d.dst);
    d.cell =
        kHasNetwork && heap == nullptr
            ? p.self.heap + p.self.layout.outbox_cell(load(shared.reply_base + d.dst) + position)
            : heap + p.self.layout.cell(slot, p.self.rank, position);
  }
  return d;
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
  auto* ids = reinterpret_cast<int32_t*>(cell + layout.head_in_cell + sizeof(CellHead));
  if (lane() == 0) {
    store(&head->token, token);
    store(&head->reply_row, reply_row);
  }
  if (lane() < s.num_topk) {
    store(ids + lane(), d.dst == dst ? d.id - dst * s.num_local_experts() : -1);
    if (s.has_weights) store(reinterpret_cast<float*>(ids + s.num_topk) + lane(), d.weight);
  }
  if (p.scales == nullptr) return;
  auto* to = reinterpret_cast<uint32_t*>(cell + layout.scales_in_cell);
  auto* scales = reinterpret_cast<const uint32_t*>(p.scales + token * p.scales_stride);
  for (int w = lane(); w < s.scale_bytes / 4; w += kWarp) store(to + w, load(scales + w));
}

// The scales that were made of units [begin, end).
MOEBIUS_DEVICE void send_scales(
    const Rank& self, int begin, int end, const float* scales, std::byte* cell) {
  std::byte* to = cell + self.layout.scales_in_cell;
  const int first = begin / kGroupUnits;
  for (int g = lane(); g < (end - begin) / kGroupUnits; g += kWarp) {
    const float scale = load(scales + g);
    if (self.scale_format == ScaleFormat::kUe8m0) {
      store(reinterpret_cast<uint8_t*>(to) + first + g, static_cast<uint8_t>(bits_of(scale)));
    } else {
      store(reinterpret_cast<float*>(to) + first + g, scale);
    }
  }
}

template <Encoding kEncoding, Dtype kX>
MOEBIUS_DEVICE void send_tokens(
    const SendLaunch& l, int slot, int begin, int end, const Shared& shared, int* stage_index) {
  constexpr int kStep = kUnroll * kWarp;
  const DispatchSendParams& p = l.args;
  const int num_units = static_cast<int>(p.self.layout.shape.payload_bytes / out_unit(kEncoding));
  const int num_items = (end - begin) * l.num_slices;
  // Neighbouring items go to different blocks: few tokens are spread over all.
  for (int item = warp_index() * num_blocks() + block_index(); item < num_items;
       item += kWarpsPerBlock * num_blocks()) {
    const int token = begin + item / l.num_slices;
    const int slice = item % l.num_slices;
    const int unit = slice * l.slice_units;
    const int unit_end = static_cast<int>(min_of(unit + l.slice_units, num_units));
    const std::byte* row = p.x + token * p.x_stride;
    Fetched<kEncoding, kX> fetched;
    fetched.fetch(row, unit, unit_end);  // on its way while the destinations are found
    const Destinations d = find_destinations(p, slot, token, begin, shared);
    if (slice == 0) note_replies(p.self, slot, token, d);
    if (d.firsts == 0) continue;
    std::byte* stage = shared.stages + *stage_index * kStageBytes;
    *stage_index ^= 1;
    bulk_wait_read<1>();
    for (int base = unit; base < unit_end; base += kStep) {
      const Fetched<kEncoding, kX> now = fetched;
      if (base + kStep < unit_end) fetched.fetch(row, base + kStep, unit_end);
      fill_stage(p.self, now, base, unit, unit_end, stage, shared.scales);
    }
    fence_proxy_async();
    sync_warp();
    const auto num_bytes = static_cast<uint32_t>((unit_end - unit) * out_unit(kEncoding));
    for (uint32_t rest = d.firsts; rest != 0; rest &= rest - 1) {
      const int from = lowest(rest);
      std::byte* cell = shfl(d.cell, from);
      warp_bulk_store(cell + unit * out_unit(kEncoding), stage, num_bytes);
      if constexpr (kEncoding == Encoding::kQuantise) {
        send_scales(p.self, unit, unit_end, shared.scales, cell);
      }
      if (slice == 0) send_head(p, token, from, d, cell);
    }
    bulk_commit();
    sync_warp();
  }
}

// Last block, one thread: the first choice that names no expert, if there is one.
MOEBIUS_DEVICE void record_bad_choice(const DispatchSendParams& p, uint64_t epoch) {
  const uint64_t word = load(&p.self.state->bad_choice);
  if (word >> kCountBits != epoch + 1) return;
  const auto at = static_cast<int64_t>(kMostChoices - (word & kLowMask));
  Fault fault;
  fault.kind = FaultKind::kRouting;
  fault.epoch = epoch;
  fault.observed = raw_id_at(p, at);
  fault.token = at / p.self.layout.shape.num_topk;
  fault.choice = at % p.self.layout.shape.num_topk;
  record(p.self, Half::kDispatchSend, fault);
}

// Last block: the round is begun, and everybody is told.
MOEBIUS_DEVICE void announce(const DispatchSendParams& p,
                             uint64_t epoch,
                             int slot,
                             const Shared& shared) {
  const Rank& self = p.self;
  const int num_ranks = self.layout.shape.num_ranks;
  clear_awaiting(self);
  if (thread_index() == 0) record_bad_choice(p, epoch);
  if (has_failed(self, epoch)) {
    lose(self, Half::kDispatchSend, epoch);
  } else {
    const auto word_for = [&](int dst) {
      return signal_word(epoch, static_cast<uint64_t>(load(shared.num_sent + dst)));
    };
    for (int dst = thread_index(); dst < num_ranks; dst += num_threads()) {
      if (load(shared.is_alive + dst) == 0) continue;
      if (kHasNetwork && load(shared.heaps + dst) == nullptr) continue;
      // Release: the cells that all blocks have written. [arrived]
      store_release_sys(signal_at(self, dst, slot, self.rank, SignalKind::kDispatch),
                        word_for(dst));
    }
    // One message for each remote rank: its cells stand together, here and there.
    for (int dst = warp_index(); kHasNetwork && dst < num_ranks; dst += kWarpsPerBlock) {
      if (load(shared.is_alive + dst) == 0 || load(shared.heaps + dst) != nullptr) continue;
      warp_put_signal(dst,
                      self.heap + self.layout.cell(slot, self.rank, 0),
                      self.heap + self.layout.outbox_cell(load(shared.reply_base + dst)),
                      load(shared.num_sent + dst) * self.layout.cell_bytes,
                      signal_at(self, self.rank, slot, self.rank, SignalKind::kDispatch),
                      word_for(dst));
    }
  }
  if (thread_index() != 0) return;
  int64_t remote = 0;
  for (int dst = 0; dst < num_ranks; ++dst) {
    if (dst != self.rank) remote += load(shared.num_sent + dst) * self.layout.cell_bytes;
  }
  add_relaxed_gpu(&self.state->remote_bytes, remote);
  store(p.handle, epoch);
  store(&control_of(self, self.rank)->epoch, epoch + 1);
}

template <Encoding kEncoding, Dtype kX>
MOEBIUS_KERNEL(kThreadsPerBlock)
dispatch_send_kernel(MOEBIUS_PARAMS SendLaunch l) {
  const DispatchSendParams& p = l.args;
  const Rank& self = p.self;
  const Shape& s = self.layout.shape;
  const Shared shared = carve(s.num_ranks, l.num_words);
  if (thread_index() == 0) store(shared.scratch, 0u);
  shared.positions.clear_totals();
  shared.positions.clear();
  wait_for_previous_kernel();
  const uint64_t epoch = load(&control_of(self, self.rank)->epoch);
  const int slot = self.layout.slot_of(epoch);
  read_ranks(self, shared);
  sync_block();
  // While the first warps see to the slot, the others begin to list the tokens.
  const int num_valid = static_cast<int>(count_valid(p));
  const int chunk = l.num_words * 32;
  const int first_end = static_cast<int>(min_of(chunk, num_valid));
  if (warp_index() == 0) {
    take_slot(self, epoch, slot, shared);
  } else {
    mark_tokens(p, epoch, 0, first_end, kWarp, shared);
  }
  sync_block();
  const bool is_ours = load(shared.scratch) == 0;
  shared.positions.count();
  sync_block();
  for (int begin = chunk; begin < num_valid; begin += chunk) {
    list_tokens(p, epoch, begin, static_cast<int>(min_of(begin + chunk, num_valid)), shared);
  }
  for (int dst = thread_index(); dst < s.num_ranks; dst += num_threads()) {
    int base = 0;
    for (int below = 0; below < dst; ++below) base += load(shared.positions.totals + below);
    store(shared.reply_base + dst, base);
    store(shared.num_sent + dst, load(shared.positions.totals + dst));
  }
  if (block_index() == 0) {
    int32_t* num_sent = in_workspace<int32_t>(self, slot, self.layout.num_sent);
    for (int dst = thread_index(); dst < s.num_ranks; dst += num_threads()) {
      store(num_sent + dst, load(shared.positions.totals + dst));
    }
    if (thread_index() == 0) store(num_sent + s.num_ranks, num_valid);
  }
  // What the last rounds left in the outbox has long left it.
  if (kHasNetwork && self.layout.shape.has_outbox && thread_index() == 0) network_quiet();
  sync_block();
  int stage_index = 0;  // carries on from chunk to chunk: the last stage is still being read
  if (is_ours && num_valid <= chunk) {
    send_tokens<kEncoding, kX>(l, slot, 0, num_valid, shared, &stage_index);
  } else if (is_ours) {
    // More than the positions hold at once: a second walk over them.
    shared.positions.clear_totals();
    sync_block();
    for (int begin = 0; begin < num_valid; begin += chunk) {
      const int end = static_cast<int>(min_of(begin + chunk, num_valid));
      list_tokens(p, epoch, begin, end, shared);
      send_tokens<kEncoding, kX>(l, slot, begin, end, shared, &stage_index);
      sync_block();
    }
  }
  bulk_wait_all();
  let_next_kernel_start();
  if (is_last_block(self, Half::kDispatchSend, shared.scratch + 1)) {
    announce(p, epoch, slot, shared);
  }
}

template <Encoding kEncoding, Dtype kX>
void enqueue(const DispatchSendParams& params, int num_sms, Stream stream) {
  const Shape& s = params.self.layout.shape;
  const int64_t unit = out_unit(kEncoding);
  const int64_t num_units = s.payload_bytes / unit;
  // The size of slice that is done soonest: an item costs its steps, and about one step for itself.
  const int64_t num_steps = (num_units + kUnroll * kWarp - 1) / (kUnroll * kWarp);
  const int64_t most_steps = kStageBytes / (kUnroll * kWarp * unit);
  const int64_t num_warps = int64_t{num_sms} * kWarpsPerBlock;
  int64_t steps = 1, least = INT64_MAX;
  for (int64_t candidate = 1; candidate <= most_steps; ++candidate) {
    const int64_t slices = (num_steps + candidate - 1) / candidate;
    const int64_t turns = (params.num_tokens * slices + num_warps - 1) / num_warps;
    if (turns * (candidate + 1) < least) {
      least = turns * (candidate + 1);
      steps = candidate;
    }
  }
  SendLaunch l;
  l.args = params;
  l.num_words = positions_words(params.num_tokens, s.num_ranks);
  l.slice_units = static_cast<int>(steps * kUnroll * kWarp);
  l.num_slices = static_cast<int>((num_units + l.slice_units - 1) / l.slice_units);
  const int64_t num_items = params.num_tokens * l.num_slices;
  const int num_blocks = static_cast<int>(num_items < 1 ? 1 : min_of(num_items, num_sms));
  launch(dispatch_send_kernel<kEncoding, kX>,
         LaunchShape{num_blocks, kThreadsPerBlock, shared_bytes(s.num_ranks, l.num_words)},
         l,
         stream);
}

}  // namespace

void launch_dispatch_send(const DispatchSendParams& params, int num_sms, Stream stream) {
  if (params.encoding == Encoding::kCopy) {
    return enqueue<Encoding::kCopy, Dtype::kBf16>(params, num_sms, stream);
  }
  switch (params.x_dtype) {
    case Dtype::kBf16:
      return enqueue<Encoding::kQuantise, Dtype::kBf16>(params, num_sms, stream);
    case Dtype::kFp16:
      return enqueue<Encoding::kQuantise, Dtype::kFp16>(params, num_sms, stream);
    case Dtype::kFp32:
      return enqueue<Encoding::kQuantise, Dtype::kFp32>(params, num_sms, stream);
  }
}

}  // namespace moebius::cuda
