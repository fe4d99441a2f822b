// Combine. Postcondition of send: every row that this rank owes rank s stands in s's combine inbox,
// at the row that s chose, and then the combine signal of every rank says how many. Of receive:
// out[t] = sum of t's rows in fp32, ascending rank (or ascending choice, with weights given here),
// rounded once. Bytes moved by send: one row per (token, rank), or per (token, choice).
#include <string.h>

#include <algorithm>

#include "cpu/engine.h"

namespace moebius::cpu {
namespace {

const std::byte* expert_row(const CombineSend& args, int64_t expert, int64_t row) {
  return args.expert_out + expert * args.expert_stride + row * args.row_stride;
}

}  // namespace

void Engine::reduce(int slot, int src, int32_t i, const CombineSend& args, std::byte* reply) {
  const Shape& s = config_.shape;
  if (config_.is_token_major) {
    memcpy(reply, expert_row(args, 0, int64_t{src} * s.max_num_tokens + i), s.reply_bytes);
    return;
  }
  const auto* ids = reinterpret_cast<const int32_t*>(&head_of(slot, src, i) + 1);
  const auto* cell_weights = reinterpret_cast<const float*>(ids + s.num_topk);
  const int32_t* cell_rows =
      local(slot, layout_.cell_rows) + (int64_t{src} * s.max_num_tokens + i) * s.num_topk;
  const void* rows[kMaxTopk];
  float weights[kMaxTopk];
  int num_rows = 0;
  for (int k = 0; k < s.num_topk; ++k) {
    if (ids[k] < 0) continue;
    rows[num_rows] = expert_row(args, ids[k], cell_rows[k]);
    weights[num_rows++] = cell_weights[k];
  }
  kernels_.weighted_sum(reply, rows, weights, num_rows, config_.hidden, config_.output_dtype);
}

template <class PlaceRow>
bool Engine::place_each(int slot, int src, const CombineSend& args, PlaceRow place_row) {
  const Shape& s = config_.shape;
  const int32_t num_tokens = local(slot, layout_.num_received)[src];
  for (int32_t i = 0; i < num_tokens; ++i) {
    const CellHead& head = head_of(slot, src, i);
    const auto* ids = reinterpret_cast<const int32_t*>(&head + 1);
    const int32_t* cell_rows =
        local(slot, layout_.cell_rows) + (int64_t{src} * s.max_num_tokens + i) * s.num_topk;
    for (int k = 0; k < s.num_topk; ++k) {
      if (ids[k] < 0) continue;
      if (!place_row(head.reply_row + k, expert_row(args, ids[k], cell_rows[k]))) return false;
    }
  }
  return true;
}

int64_t Engine::reply_direct(int slot, int src, const CombineSend& args) {
  const Shape& s = config_.shape;
  if (s.has_weights) {
    const int32_t num_tokens = local(slot, layout_.num_received)[src];
    for (int32_t i = 0; i < num_tokens; ++i) {
      reduce(slot, src, i, args, heap(src, layout_.reply(slot, head_of(slot, src, i).reply_row)));
    }
    return num_tokens;
  }
  int64_t num_rows = 0;
  place_each(slot, src, args, [&](int64_t row, const std::byte* from) {
    memcpy(heap(src, layout_.reply(slot, row)), from, s.reply_bytes);
    ++num_rows;
    return true;
  });
  return num_rows;
}

// The rows of one peer stand together in the outbox, in the order of its cells; with weights at
// dispatch they do so at home too. When the outbox is full (only with very uneven routing), what is
// in it leaves first.
bool Engine::reply_remote(
    int slot, int src, uint64_t epoch, const CombineSend& args, int64_t* num_rows) {
  const Shape& s = config_.shape;
  const int32_t num_tokens = local(slot, layout_.num_received)[src];
  const int64_t signal_at = layout_.signal(slot, rank_, SignalKind::kCombine);
  const uint64_t word = signal_word(epoch, static_cast<uint64_t>(num_tokens));
  if (s.has_weights && num_tokens > 0) {
    if (!make_room(num_tokens, epoch)) return false;
    std::byte* rows = heap(rank_, layout_.outbox_reply(outbox_used_));
    for (int32_t i = 0; i < num_tokens; ++i) {
      reduce(slot, src, i, args, rows + i * layout_.reply_stride);
    }
    outbox_used_ += num_tokens;
    *num_rows = num_tokens;
    network_->put_signal(src,
                         layout_.reply(slot, head_of(slot, src, 0).reply_row),
                         rows,
                         num_tokens * layout_.reply_stride,
                         signal_at,
                         word);
    return true;
  }
  const bool is_sent = place_each(slot, src, args, [&](int64_t row, const std::byte* from) {
    if (!make_room(1, epoch)) return false;
    std::byte* out = heap(rank_, layout_.outbox_reply(outbox_used_++));
    memcpy(out, from, s.reply_bytes);
    network_->put(src, layout_.reply(slot, row), out, s.reply_bytes);
    ++*num_rows;
    return true;
  });
  if (is_sent) network_->put_signal(src, 0, nullptr, 0, signal_at, word);
  return is_sent;
}

bool Engine::combine_send(uint64_t epoch, const CombineSend& args) {
  const Shape& s = config_.shape;
  const int slot = layout_.slot_of(epoch);
  const int32_t* num_received = local(slot, layout_.num_received);
  for (int src = 0; src < s.num_ranks; ++src) {
    if (!is_dead(src) && !may_write_to(src, epoch)) return lose(epoch);
  }
  if (!clear_outbox(epoch)) return lose(epoch);
  for (int i = 0; i < s.num_ranks; ++i) {
    const int src = (rank_ + 1 + i) % s.num_ranks;
    if (is_dead(src)) continue;
    int64_t num_rows = 0;
    if (is_remote(src)) {
      if (!reply_remote(slot, src, epoch, args, &num_rows)) return lose(epoch);
    } else {
      num_rows = reply_direct(slot, src, args);
      publish(signal(src, slot, rank_, SignalKind::kCombine),
              signal_word(epoch, num_received[src]));
    }
    if (src != rank_) remote_bytes_ += num_rows * s.reply_bytes;
  }
  control(rank_).combined[slot] = epoch + 1;
  return true;
}

bool Engine::combine_recv(uint64_t epoch, const CombineRecv& args) {
  const Shape& s = config_.shape;
  const int slot = layout_.slot_of(epoch);
  const int32_t* num_sent = local(slot, layout_.num_sent);
  for (int src = 0; src < s.num_ranks; ++src) {
    if (num_sent[src] == 0) continue;  // owes us nothing; the closing wait will look for its signal
    int64_t count = 0;
    if (is_dead(src)) {
      // Given up after it was sent to. What it said before still holds.
      const uint64_t word = load_signal(signal(rank_, slot, src, SignalKind::kCombine));
      if (!signal_arrived(word, epoch)) {
        fail(FaultKind::kTimeout, Reason::kDeadline, src, -1, epoch, word);
        return lose(epoch);
      }
    }
    if (!await(src, SignalKind::kCombine, epoch, &count, args.wait_stats)) return lose(epoch);
    if (count != num_sent[src]) {
      fail_protocol(src, epoch, signal_word(epoch, 0));
      return lose(epoch);
    }
  }
  const int64_t replies = s.replies_per_token();
  const int64_t num_valid = num_sent[s.num_ranks];
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    const int32_t* reply_rows = local(slot, layout_.reply_rows) + t * replies;
    const void* rows[kMaxTopk];
    float weights[kMaxTopk];
    int num_rows = 0;
    for (int64_t k = 0; t < num_valid && k < replies; ++k) {
      if (reply_rows[k] < 0) continue;
      rows[num_rows] = heap(rank_, layout_.reply(slot, reply_rows[k]));
      weights[num_rows++] =
          args.topk_weights != nullptr ? args.topk_weights[t * s.num_topk + k] : 1.0f;
    }
    kernels_.weighted_sum(args.out + t * args.out_stride,
                          rows,
                          args.topk_weights != nullptr ? weights : nullptr,
                          num_rows,
                          config_.hidden,
                          config_.output_dtype);
  }
  return true;
}

}  // namespace moebius::cpu
