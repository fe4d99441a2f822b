// Combine, receive half.
//
// Postcondition: out[t] = sum of t's rows in fp32, ascending rank (or ascending choice, with
// weights
//   given here), rounded once; zeros for a token that went nowhere.
// Grid: at most num_sms blocks. A warp takes a slice of a token.
// Memory: reads the own combine inbox and the workspace; writes out. Nothing remote.
// Synchronisation: [arrived] acquire, by every block, of the ranks that owe rows; [all-done].
// Requirements: rows of out 16-byte aligned.
// Cost: reads each reply once, writes each row of out once.
#include "cuda/launch.cuh"
#include "cuda/launchers.h"
#include "cuda/sum.cuh"

namespace moebius::cuda {
namespace {

// Waits for the rows that rank `src` owes; false when they will not come.
MOEBIUS_DEVICE bool await_rows(const CombineRecvParams& p, const Begun& begun, int src, int owed) {
  const Rank& self = p.self;
  if (is_masked(self, src)) {
    // Given up after it was sent to. What it said before still holds.
    const uint64_t word =
        load_acquire_sys(signal_at(self, self.rank, begun.slot, src, SignalKind::kCombine));
    if (!signal_arrived(word, begun.epoch)) {
      return fail(
          self, begun.epoch, FaultKind::kTimeout, Reason::kDeadline, src, -1, begun.epoch, word, 0);
    }
  }
  // Pairs with [arrived] of combine send.
  const int64_t count = await_count(self, src, SignalKind::kCombine, begun.epoch, p.wait_stats);
  if (count < 0) return false;
  if (count == owed) return true;
  return fail(self,
              begun.epoch,
              FaultKind::kProtocol,
              Reason::kDeadline,
              src,
              -1,
              begun.epoch,
              signal_word(begun.epoch, 0),
              0);
}

template <Dtype kDtype, bool kHasWeights>
MOEBIUS_KERNEL(kThreadsPerBlock)
combine_recv_kernel(MOEBIUS_PARAMS CombineRecvParams p) {
  const Rank& self = p.self;
  const HeapLayout& layout = self.layout;
  const Shape& s = layout.shape;
  auto* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  if (thread_index() == 0) store(scratch, 0u);
  sync_block();
  wait_for_previous_kernel();
  const Begun begun = begin_half(self, p.handle, Half::kCombineRecv);
  if (begun.is_stale) return;
  const int32_t* num_sent = in_workspace<int32_t>(self, begun.slot, layout.num_sent);
  for (int src = thread_index(); !begun.is_lost && src < s.num_ranks; src += num_threads()) {
    const int owed = load(num_sent + src);
    if (owed == 0) continue;  // the closing wait will look for its signal
    if (!await_rows(p, begun, src, owed)) store(scratch, 1u);
  }
  sync_block();
  const bool is_lost = begun.is_lost || load(scratch) != 0;
  const int64_t num_valid = is_lost ? 0 : load(num_sent + s.num_ranks);
  const int replies = static_cast<int>(s.replies_per_token());
  const int32_t* reply_rows = in_workspace<int32_t>(self, begun.slot, layout.reply_rows);
  const int slices = num_slices(s.reply_bytes);
  const int num_vectors = static_cast<int>(s.reply_bytes / 16);
  const int64_t num_items = p.num_tokens * slices;
  const int64_t step = int64_t{kWarpsPerBlock} * num_blocks();
  const auto find_row = [&](int64_t item) {
    const int64_t token = item / slices;
    const bool is_there = item < num_items && token < num_valid && lane() < replies;
    return is_there ? load(reply_rows + token * replies + lane()) : -1;
  };
  int64_t item = int64_t{warp_index()} * num_blocks() + block_index();
  int32_t ahead = find_row(item);
  for (; item < num_items; item += step) {
    const int64_t token = item / slices;
    const int32_t row = ahead;
    ahead = find_row(item + step);  // on its way while this one is summed
    float weight = 1.0f;
    if (kHasWeights && row >= 0) weight = load(p.topk_weights + token * s.num_topk + lane());
    const int begin = static_cast<int>(item % slices) * kUnroll * kWarp;
    const int end = static_cast<int>(min_of(begin + kUnroll * kWarp, num_vectors));
    sum_rows<kDtype, kHasWeights>(p.out + token * p.out_stride,
                                  row >= 0 ? self.heap + layout.reply(begun.slot, row) : nullptr,
                                  weight,
                                  ballot(row >= 0),
                                  begin,
                                  end);
  }
  let_next_kernel_start();
  if (!is_last_block(self, Half::kCombineRecv, scratch + 1)) return;
  clear_awaiting(self);
  if (!begun.is_lost && has_failed(self, begun.epoch)) {
    lose(self, Half::kCombineRecv, begun.epoch);
  }
}

template <Dtype kDtype>
void enqueue(const CombineRecvParams& params, int num_sms, Stream stream) {
  const int64_t num_items = params.num_tokens * num_slices(params.self.layout.shape.reply_bytes);
  const LaunchShape shape{
      static_cast<int>(num_items < 1 ? 1 : min_of(num_items, num_sms)), kThreadsPerBlock, 8};
  if (params.topk_weights != nullptr) {
    launch(combine_recv_kernel<kDtype, true>, shape, params, stream);
  } else {
    launch(combine_recv_kernel<kDtype, false>, shape, params, stream);
  }
}

}  // namespace

void launch_combine_recv(const CombineRecvParams& params, int num_sms, Stream stream) {
  switch (params.self.output_dtype) {
    case Dtype::kBf16:
      return enqueue<Dtype::kBf16>(params, num_sms, stream);
    case Dtype::kFp16:
      return enqueue<Dtype::kFp16>(params, num_sms, stream);
    case Dtype::kFp32:
      return enqueue<Dtype::kFp32>(params, num_sms, stream);
  }
}

}  // namespace moebius::cuda
