// Both halves of combine in one kernel, for calls with nothing in between: see dispatch.cu. What
// each half does: combine_send.cuh, combine_recv.cuh.
//
// Grid: as of the half that has more to deal out.
// Requirements: those of both. `out` may be written over `expert_out`: the own signal, for which
//   every block waits, says that all of that is sent.
#include <algorithm>

#include "cuda/combine_recv.cuh"
#include "cuda/combine_send.cuh"
#include "cuda/launchers.h"

namespace moebius::cuda {
namespace {

struct CombineLaunch {
  CombineSendParams send;
  CombineRecvParams recv;
  int num_parts;  // that sending is dealt out in
};

// Before what the replies need.
struct alignas(kVectorBytes) CombineShared {
  Ending receiving;
  int32_t turn;
};

// `kMoves`: as of combine_send.cuh; `kHasWeights`: as of combine_recv.cuh.
template <bool kMoves, Dtype kDtype, bool kHasWeights>
MOEBIUS_KERNEL(kThreadsPerBlock)
combine_kernel(MOEBIUS_PARAMS CombineLaunch l) {
  const Rank& self = l.send.self;
  auto* own = reinterpret_cast<CombineShared*>(shared_memory());
  const ReplyShared shared =
      ReplyShared::in(shared_memory() + sizeof(CombineShared), kMoves, self.layout.shape.num_ranks);
  if constexpr (kMoves) shared.mover.init();
  if (thread_index() == 0) {
    store(&shared.ending->has_failed, 0u);
    store(&own->receiving.has_failed, 0u);
  }
  wait_for_previous_kernel();
  const Begun begun = begin_half(self, l.send.handle, Half::kCombineSend);
  if (begun.is_stale) return;
  uint32_t sequence = 0;
  const Turns turns{self, Half::kCombineSend, l.num_parts, &own->turn};
  for (Place place{turns.first(), turns.num}; place.index >= 0 && !begun.is_lost;
       place.index = turns.next()) {
    reply_part<kMoves, kDtype>(l.send, begun, place, turns, &sequence, shared);
  }
  add_replies<kDtype, kHasWeights>(l.recv, begun, &own->receiving);
  if (load(&own->receiving.met) != 0 && is_bookkeeper()) turns.end();
}

template <bool kMoves, Dtype kDtype, bool kHasWeights>
void enqueue(const CombineLaunch& l, int num_sms, Target target) {
  const Shape& s = l.send.self.layout.shape;
  const int num_blocks = std::max(l.num_parts, blocks_to_add(l.recv, num_sms));
  const size_t num_bytes = sizeof(CombineShared) + ReplyShared::num_bytes(kMoves, s.num_ranks);
  launch(combine_kernel<kMoves, kDtype, kHasWeights>,
         LaunchShape{num_blocks, kThreadsPerBlock, num_bytes},
         l,
         target);
}

template <Dtype kDtype>
void enqueue(const CombineLaunch& l, int num_sms, Target target) {
  if (!rows_only_move(l.send.self)) return enqueue<false, kDtype, false>(l, num_sms, target);
  if (l.recv.topk_weights == nullptr) return enqueue<true, kDtype, false>(l, num_sms, target);
  enqueue<true, kDtype, true>(l, num_sms, target);
}

}  // namespace

void launch_combine(const CombineSendParams& send,
                    const CombineRecvParams& recv,
                    int num_sms,
                    Target target) {
  const CombineLaunch l{send, recv, parts_to_reply(send.self.layout.shape, num_sms)};
  switch (send.self.output_dtype) {
    case Dtype::kBf16:
      return enqueue<Dtype::kBf16>(l, num_sms, target);
    case Dtype::kFp16:
      return enqueue<Dtype::kFp16>(l, num_sms, target);
    case Dtype::kFp32:
      return enqueue<Dtype::kFp32>(l, num_sms, target);
  }
}

}  // namespace moebius::cuda
