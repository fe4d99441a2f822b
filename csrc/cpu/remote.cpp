// What the engine does for remote ranks: messages leave from the outbox, refusals travel.
//
// The outbox is filled again only after `clear_outbox`. Its cells are numbered as the replies are
// (reply_base + i), so those of one rank stand together, as they do in that rank's inbox.
#include <algorithm>

#include "cpu/engine.h"

namespace moebius::cpu {
namespace {

constexpr uint32_t kRefusals[] = {0, 1};  // stay as they are for as long as they may be read

}  // namespace

void Engine::refuse(int rank, bool is_given_up) {
  network_->give_up(rank, is_given_up);
  network_->put(rank,
                layout_.refusal(rank_),
                reinterpret_cast<const std::byte*>(&kRefusals[is_given_up ? 1 : 0]),
                sizeof(uint32_t));
}

void Engine::send_signal(int dst, int slot, SignalKind kind, uint64_t word) {
  if (is_remote(dst)) {
    network_->put_signal(dst, 0, nullptr, 0, layout_.signal(slot, rank_, kind), word);
  } else {
    publish(signal(dst, slot, rank_, kind), word);
  }
}

void Engine::beat(int awaited) {
  // A new word each time: that it changes is the news.
  const uint64_t word = signal_word(++num_beats_, static_cast<uint64_t>(awaited));
  for (int dst = 0; dst < config_.shape.num_ranks; ++dst) {
    if (dst == awaited || !is_remote(dst) || is_dead(dst)) continue;
    network_->put_signal(dst, 0, nullptr, 0, layout_.beat(rank_), word);
  }
}

int Engine::heard_from(int src, int64_t now, SeenBeat* seen) const {
  const auto* signal = reinterpret_cast<const Signal*>(heap(rank_, layout_.beat(src)));
  const uint64_t word = load_signal(*signal);
  if (seen->time_ns == 0) {
    *seen = {word, 1};  // of an earlier wait, for all we know
  } else if (word != seen->word) {
    *seen = {word, now};
  }
  const int64_t awaited = signal_value(seen->word);
  const bool is_late = now - seen->time_ns > config_.timeout_ns / 2;
  const bool is_rank = awaited >= 0 && awaited < config_.shape.num_ranks && awaited != rank_;
  return is_late || !is_rank ? -1 : static_cast<int>(awaited);
}

bool Engine::clear_outbox(uint64_t epoch) {
  outbox_used_ = 0;
  if (network_ == nullptr) return true;
  const int64_t start = now_ns();
  // Half the deadline: meanwhile others wait for this rank, and would give it up with the keeper.
  const int keeper = network_->quiet(config_.timeout_ns / 2);
  if (keeper < 0) return true;
  return fail(FaultKind::kTimeout, Reason::kDeadline, keeper, -1, epoch, 0, now_ns() - start);
}

bool Engine::make_room(int64_t num_rows, uint64_t epoch) {
  if (outbox_used_ + num_rows <= config_.shape.outbox_rows()) return true;
  return clear_outbox(epoch);
}

void Engine::send_cells_remote(int dst, int slot, uint64_t epoch, const DispatchSend& args) {
  const auto num_tokens = static_cast<int32_t>(tokens_for_[dst].size());
  const int64_t cell_bytes = layout_.cell_bytes;
  int32_t most = num_tokens;  // cells of one message
  if (config_.chunk_bytes > 0) {
    const int64_t in_chunk = std::max<int64_t>(config_.chunk_bytes / cell_bytes, 1);
    most = static_cast<int32_t>(std::min<int64_t>(in_chunk, num_tokens));
  }
  std::byte* cells = heap(rank_, layout_.outbox_cell(dst, reply_base_[dst]));
  int32_t num_put = 0;
  for (int32_t i = 0; i < num_tokens; ++i) {
    fill_cell(cells + i * cell_bytes, dst, i, args);
    // The last chunk waits for the word.
    if (i + 1 - num_put < most || i + 1 == num_tokens) continue;
    network_->put(dst,
                  layout_.cell(slot, rank_, num_put),
                  cells + num_put * cell_bytes,
                  (i + 1 - num_put) * cell_bytes);
    num_put = i + 1;
  }
  network_->put_signal(dst,
                       layout_.cell(slot, rank_, num_put),
                       cells + num_put * cell_bytes,
                       (num_tokens - num_put) * cell_bytes,
                       layout_.signal(slot, rank_, SignalKind::kDispatch),
                       signal_word(epoch, static_cast<uint64_t>(num_tokens)));
}

}  // namespace moebius::cpu
