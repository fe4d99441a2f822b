// Dispatch. Postcondition of send: cell (slot, me, i) at rank d holds the i-th of my tokens that
// has an expert on d, for all i < n, and then the dispatch signal says n. Of receive, expert_major:
// the rows of local expert l are the tokens routed to it, in the order (source rank, token). Bytes
// moved by send: one row per (token, rank).
#include <string.h>

#include <algorithm>

#include "cpu/engine.h"

namespace moebius::cpu {

template <class Id>
bool Engine::route_ids(const Id* ids, int64_t num_tokens) {
  const Shape& s = config_.shape;
  std::fill(last_token_.begin(), last_token_.end(), -1);
  for (auto& list : tokens_for_) list.clear();
  for (int32_t t = 0; t < num_tokens; ++t) {
    for (int k = 0; k < s.num_topk; ++k) {
      const int64_t at = int64_t{t} * s.num_topk + k;
      const Id id = ids[at];
      if (id < -1 || id >= s.num_experts) {
        fault_ = {};
        fault_.kind = FaultKind::kRouting;
        fault_.observed = id;
        fault_.token = t;
        fault_.choice = k;
        return false;
      }
      topk_ids_[at] = static_cast<int32_t>(id);
      if (id < 0) continue;
      const int dst = rank_of_expert_[id];
      if (last_token_[dst] == t) continue;
      last_token_[dst] = t;
      tokens_for_[dst].push_back(t);
    }
  }
  return true;
}

bool Engine::route(const DispatchSend& args) {
  return args.has_int64_ids
             ? route_ids(static_cast<const int64_t*>(args.topk_ids), args.num_tokens)
             : route_ids(static_cast<const int32_t*>(args.topk_ids), args.num_tokens);
}

void Engine::quantise_routed(const DispatchSend& args) {
  const Shape& s = config_.shape;
  const int64_t stride = s.payload_bytes + s.scale_bytes;
  quantised_.resize(static_cast<size_t>(s.max_num_tokens * stride));
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    const int32_t* ids = &topk_ids_[t * s.num_topk];
    if (std::all_of(ids, ids + s.num_topk, [](int32_t id) { return id < 0; })) continue;
    std::byte* out = quantised_.data() + t * stride;
    kernels_.quantise(args.x + t * args.x_stride,
                      args.x_dtype,
                      config_.hidden,
                      config_.scale_format,
                      reinterpret_cast<uint8_t*>(out),
                      out + s.payload_bytes);
  }
}

void Engine::fill_cell(std::byte* cell, int dst, int32_t i, const DispatchSend& args) {
  const Shape& s = config_.shape;
  const bool is_quantised = args.encoding == Encoding::kQuantise;
  const int64_t quantised_stride = s.payload_bytes + s.scale_bytes;
  const int first_expert = dst * s.num_local_experts();
  const int32_t t = tokens_for_[dst][i];
  const std::byte* payload =
      is_quantised ? quantised_.data() + t * quantised_stride : args.x + t * args.x_stride;
  memcpy(cell, payload, s.payload_bytes);
  if (s.scale_bytes > 0) {
    const std::byte* scales =
        is_quantised ? payload + s.payload_bytes : args.scales + t * args.scales_stride;
    memcpy(cell + layout_.scales_in_cell, scales, s.scale_bytes);
  }
  auto* head = reinterpret_cast<CellHead*>(cell + layout_.head_in_cell);
  head->token = t;
  head->reply_row = s.has_weights ? reply_base_[dst] + i : t * s.num_topk;
  auto* ids = reinterpret_cast<int32_t*>(head + 1);
  for (int k = 0; k < s.num_topk; ++k) {
    const int32_t id = topk_ids_[int64_t{t} * s.num_topk + k];
    const bool is_there = id >= 0 && rank_of_expert_[id] == dst;
    ids[k] = is_there ? id - first_expert : -1;
  }
  if (s.has_weights) {
    memcpy(
        ids + s.num_topk, args.topk_weights + int64_t{t} * s.num_topk, s.num_topk * sizeof(float));
  }
}

void Engine::send_cells(int dst, int slot, const DispatchSend& args) {
  const auto num_tokens = static_cast<int32_t>(tokens_for_[dst].size());
  for (int32_t i = 0; i < num_tokens; ++i) {
    fill_cell(heap(dst, layout_.cell(slot, rank_, i)), dst, i, args);
  }
}

bool Engine::dispatch_send(const DispatchSend& args) {
  const Shape& s = config_.shape;
  if (!route(args)) return false;

  Control& self = control(rank_);
  const uint64_t epoch = self.epoch;
  const int slot = layout_.slot_of(epoch);
  if (epoch >= static_cast<uint64_t>(s.depth) && !close_round(epoch - s.depth)) {
    return lose(epoch);
  }
  // From here on the slot is ours: nobody reads what it held before.
  for (int dst = 0; dst < s.num_ranks; ++dst) {
    if (is_dead(dst)) {
      tokens_for_[dst].clear();
    } else if (!may_write_to(dst, epoch)) {
      return lose(epoch);
    }
  }
  if (!clear_outbox(epoch)) return lose(epoch);
  if (args.encoding == Encoding::kQuantise) quantise_routed(args);

  int32_t* num_sent = local(slot, layout_.num_sent);
  int32_t* reply_rows = local(slot, layout_.reply_rows);
  const int64_t replies = s.replies_per_token();
  std::fill(reply_rows, reply_rows + args.num_tokens * replies, -1);
  int32_t reply_base = 0;
  for (int dst = 0; dst < s.num_ranks; ++dst) {
    const auto& tokens = tokens_for_[dst];
    num_sent[dst] = static_cast<int32_t>(tokens.size());
    for (size_t i = 0; i < tokens.size(); ++i) {
      int32_t* rows = reply_rows + tokens[i] * replies;
      if (s.has_weights) {
        *std::find(rows, rows + replies, -1) = reply_base + static_cast<int32_t>(i);
        continue;
      }
      for (int k = 0; k < s.num_topk; ++k) {
        const int32_t id = topk_ids_[int64_t{tokens[i]} * s.num_topk + k];
        if (id >= 0 && rank_of_expert_[id] == dst) rows[k] = tokens[i] * s.num_topk + k;
      }
    }
    reply_base_[dst] = reply_base;
    reply_base += num_sent[dst];
  }
  num_sent[s.num_ranks] = static_cast<int32_t>(args.num_tokens);

  self.epoch = epoch + 1;
  // Every rank starts with its neighbour, so that they do not all write to one.
  for (int i = 0; i < s.num_ranks; ++i) {
    const int dst = (rank_ + 1 + i) % s.num_ranks;
    if (is_dead(dst)) continue;
    if (is_remote(dst)) {
      send_cells_remote(dst, slot, epoch, args);
    } else {
      send_cells(dst, slot, args);
      publish(signal(dst, slot, rank_, SignalKind::kDispatch), signal_word(epoch, num_sent[dst]));
    }
    if (dst != rank_) remote_bytes_ += num_sent[dst] * layout_.cell_bytes;
  }
  return true;
}

bool Engine::is_sane(int slot, int src, int32_t num_tokens) const {
  const Shape& s = config_.shape;
  const int64_t first_row = num_tokens > 0 ? head_of(slot, src, 0).reply_row : 0;
  for (int32_t i = 0; i < num_tokens; ++i) {
    const CellHead* head = &head_of(slot, src, i);
    if (!s.is_reply_row(head->reply_row)) return false;
    // The rows of one source are one range: over the network they leave as one message.
    if (s.has_weights && head->reply_row != first_row + i) return false;
    const auto* ids = reinterpret_cast<const int32_t*>(head + 1);
    for (int k = 0; k < s.num_topk; ++k) {
      if (ids[k] < -1 || ids[k] >= s.num_local_experts()) return false;
    }
  }
  return true;
}

void Engine::unpack_cell(int slot, int src, int32_t i, const DispatchRecv& args) {
  const Shape& s = config_.shape;
  const int64_t rows_per_expert = int64_t{s.num_ranks} * s.max_num_tokens;
  const std::byte* cell = heap(rank_, layout_.cell(slot, src, i));
  const auto* head = reinterpret_cast<const CellHead*>(cell + layout_.head_in_cell);
  const auto* ids = reinterpret_cast<const int32_t*>(head + 1);
  int32_t* rows =
      local(slot, layout_.cell_rows) + (int64_t{src} * s.max_num_tokens + i) * s.num_topk;
  for (int k = 0; k < s.num_topk; ++k) {
    rows[k] = -1;
    const int32_t expert = ids[k];
    if (expert < 0) continue;
    const int32_t* same = std::find(ids, ids + k, expert);
    if (same != ids + k) {
      rows[k] = rows[same - ids];  // an expert named twice has the row once
      continue;
    }
    const int32_t row = args.expert_num_tokens[expert]++;
    rows[k] = row;
    const int64_t at = expert * rows_per_expert + row;
    memcpy(args.x + at * s.payload_bytes, cell, s.payload_bytes);
    if (args.scales != nullptr) {
      const std::byte* from = cell + layout_.scales_in_cell;
      std::byte* to = args.scales + expert * args.scale_strides[0] + row * args.scale_strides[1];
      for (int64_t b = 0; b < s.scale_bytes; b += args.scale_element) {
        memcpy(to, from + b, args.scale_element);
        to += args.scale_strides[2];
      }
    }
    args.src_info[at] = head->token;
  }
}

void Engine::clean_cells(int slot, int src, int32_t num_tokens) {
  const Shape& s = config_.shape;
  // Rows that an earlier round used and this one does not must read as unrouted. Fresh memory
  // counts as used.
  int32_t& num_clean = local(slot, layout_.num_clean)[src];
  for (int32_t i = num_tokens; i < s.max_num_tokens - num_clean; ++i) {
    std::byte* head = heap(rank_, layout_.cell(slot, src, i)) + layout_.head_in_cell;
    auto* ids = reinterpret_cast<int32_t*>(head + sizeof(CellHead));
    std::fill(ids, ids + s.num_topk, -1);
  }
  num_clean = s.max_num_tokens - num_tokens;
}

void Engine::count_experts(int slot, int src, int32_t num_tokens, int32_t* expert_num_tokens) {
  const int num_topk = config_.shape.num_topk;
  for (int32_t i = 0; i < num_tokens; ++i) {
    const std::byte* head = heap(rank_, layout_.cell(slot, src, i)) + layout_.head_in_cell;
    const auto* ids = reinterpret_cast<const int32_t*>(head + sizeof(CellHead));
    for (int k = 0; k < num_topk; ++k) {
      if (ids[k] >= 0 && std::find(ids, ids + k, ids[k]) == ids + k) ++expert_num_tokens[ids[k]];
    }
  }
}

bool Engine::dispatch_recv(uint64_t epoch, const DispatchRecv& args) {
  const Shape& s = config_.shape;
  const int slot = layout_.slot_of(epoch);
  const int num_local = s.num_local_experts();
  int32_t* num_received = local(slot, layout_.num_received);
  std::fill(args.expert_num_tokens, args.expert_num_tokens + num_local, 0);

  // In rank order, which fixes the order of the rows; what comes later is waited for later.
  for (int src = 0; src < s.num_ranks; ++src) {
    int64_t count = 0;
    if (!is_dead(src) && !await(src, SignalKind::kDispatch, epoch, &count, args.wait_stats)) {
      return lose(epoch);
    }
    const int32_t num_tokens = static_cast<int32_t>(count);
    if (!is_sane(slot, src, num_tokens)) {
      fail_protocol(src, epoch, signal_word(epoch, num_tokens));
      return lose(epoch);
    }
    num_received[src] = args.src_num_tokens[src] = num_tokens;
    if (config_.is_token_major) {
      // One that died may have written cells that it never signalled.
      if (is_dead(src)) local(slot, layout_.num_clean)[src] = 0;
      clean_cells(slot, src, num_tokens);
      count_experts(slot, src, num_tokens, args.expert_num_tokens);
      continue;
    }
    for (int l = 0; l < num_local; ++l) {
      args.layout_range[int64_t{l} * s.num_ranks + src] = int64_t{args.expert_num_tokens[l]} << 32;
    }
    for (int32_t i = 0; i < num_tokens; ++i) unpack_cell(slot, src, i, args);
    for (int l = 0; l < num_local; ++l) {
      int64_t& range = args.layout_range[int64_t{l} * s.num_ranks + src];
      range |= args.expert_num_tokens[l] - (range >> 32);
    }
  }
  if (args.expert_stats != nullptr) {
    for (int l = 0; l < num_local; ++l) {
      if (args.has_int64_stats) {
        static_cast<int64_t*>(args.expert_stats)[l] += args.expert_num_tokens[l];
      } else {
        static_cast<int32_t*>(args.expert_stats)[l] += args.expert_num_tokens[l];
      }
    }
  }
  return true;
}

}  // namespace moebius::cpu
