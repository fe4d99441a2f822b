// Combine, send half, as a kernel of its own.
#include "cuda/combine_send.cuh"

#include "cuda/launchers.h"

namespace moebius::cuda {
namespace {

template <bool kMoves, Dtype kDtype>
MOEBIUS_KERNEL(kThreadsPerBlock)
combine_send_kernel(MOEBIUS_PARAMS CombineSendParams p) {
  const Rank& self = p.self;
  const ReplyShared shared = ReplyShared::in(shared_memory(), kMoves, self.layout.shape.num_ranks);
  if constexpr (kMoves) shared.mover.init();
  if (thread_index() == 0) store(&shared.ending->has_failed, 0u);
  sync_block();
  wait_for_previous_kernel();
  const Begun begun = begin_half(self, p.handle, Half::kCombineSend);
  if (begun.is_stale || begun.is_lost) return;
  uint32_t sequence = 0;
  reply_part<kMoves, kDtype>(p, begun, Place::of_block(), NoTurns{}, &sequence, shared);
}

template <bool kMoves, Dtype kDtype>
void enqueue(const CombineSendParams& params, int num_sms, Target target) {
  const Shape& s = params.self.layout.shape;
  const size_t num_bytes = ReplyShared::num_bytes(kMoves, s.num_ranks);
  launch(combine_send_kernel<kMoves, kDtype>,
         LaunchShape{parts_to_reply(s, num_sms), kThreadsPerBlock, num_bytes},
         params,
         target);
}

}  // namespace

void launch_combine_send(const CombineSendParams& params, int num_sms, Target target) {
  if (rows_only_move(params.self)) return enqueue<true, Dtype::kBf16>(params, num_sms, target);
  switch (params.self.output_dtype) {
    case Dtype::kBf16:
      return enqueue<false, Dtype::kBf16>(params, num_sms, target);
    case Dtype::kFp16:
      return enqueue<false, Dtype::kFp16>(params, num_sms, target);
    case Dtype::kFp32:
      return enqueue<false, Dtype::kFp32>(params, num_sms, target);
  }
}

}  // namespace moebius::cuda
