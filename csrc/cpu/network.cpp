#include "cpu/network.h"

#include <string.h>

#include <initializer_list>

#include "cpu/wait.h"

namespace moebius::cpu {
namespace {

// Without overflow, whatever came.
bool is_within(int64_t offset, int64_t num_bytes, int64_t begin, int64_t end) {
  return offset >= begin && offset <= end && num_bytes >= 0 && num_bytes <= end - offset;
}

bool is_own_signal(const HeapLayout& layout, int src, int64_t signal) {
  if (layout.shape.has_outbox && signal == layout.beat(src)) return true;
  for (int slot = 0; slot < layout.shape.depth; ++slot) {
    for (SignalKind kind : {SignalKind::kDispatch, SignalKind::kCombine}) {
      if (signal == layout.signal(slot, src, kind)) return true;
    }
  }
  return false;
}

bool is_own_data(const HeapLayout& layout, int src, const Message& m) {
  for (int slot = 0; slot < layout.shape.depth; ++slot) {
    const int64_t begin = layout.counts(slot, src);
    if (is_within(m.offset, m.num_bytes, begin, begin + layout.source_bytes())) return true;
    const int64_t rows = layout.reply(slot, 0);
    if (is_within(m.offset, m.num_bytes, rows, layout.reply(slot + 1, 0))) return true;
  }
  return m.offset == layout.refusal(src) && m.num_bytes == int64_t{sizeof(uint32_t)};
}

}  // namespace

bool is_allowed(const HeapLayout& layout, int src, const Message& message) {
  if (src < 0 || src >= layout.shape.num_ranks) return false;
  if (message.signal != kNoSignal && !is_own_signal(layout, src, message.signal)) return false;
  if (message.num_bytes == 0) return true;
  return is_own_data(layout, src, message);
}

bool deliver(const HeapLayout& layout, std::byte* heap, int src, const Message& message) {
  if (!is_allowed(layout, src, message)) return false;
  const auto* masks = reinterpret_cast<const uint32_t*>(heap + layout.masks);
  if (__atomic_load_n(&masks[src], __ATOMIC_ACQUIRE) != 0) return true;
  if (message.offset == layout.refusal(src) && message.num_bytes != 0) {
    // No signal orders a refusal: it is looked at any time.
    uint32_t refusal;
    memcpy(&refusal, message.data, sizeof(refusal));
    __atomic_store_n(reinterpret_cast<uint32_t*>(heap + message.offset), refusal, __ATOMIC_RELEASE);
  } else if (message.num_bytes != 0) {
    memcpy(heap + message.offset, message.data, static_cast<size_t>(message.num_bytes));
  }
  if (message.signal != kNoSignal) {
    publish(*reinterpret_cast<Signal*>(heap + message.signal), message.word);
  }
  return true;
}

}  // namespace moebius::cpu
