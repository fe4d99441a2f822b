// Combine, receive half, as a kernel of its own.
#include "cuda/combine_recv.cuh"

#include "cuda/launchers.h"

namespace moebius::cuda {
namespace {

template <Dtype kDtype, bool kHasWeights>
MOEBIUS_KERNEL(kThreadsPerBlock)
combine_recv_kernel(MOEBIUS_PARAMS CombineRecvParams p) {
  auto* ending = reinterpret_cast<Ending*>(shared_memory());
  if (thread_index() == 0) store(&ending->has_failed, 0u);
  sync_block();
  wait_for_previous_kernel();
  const Begun begun = begin_half(p.self, p.handle, Half::kCombineRecv);
  if (begun.is_stale) return;
  add_replies<kDtype, kHasWeights>(p, begun, ending);
}

template <Dtype kDtype>
void enqueue(const CombineRecvParams& params, int num_sms, Target target) {
  const LaunchShape shape{blocks_to_add(params, num_sms), kThreadsPerBlock, sizeof(Ending)};
  if (params.topk_weights != nullptr) {
    launch(combine_recv_kernel<kDtype, true>, shape, params, target);
  } else {
    launch(combine_recv_kernel<kDtype, false>, shape, params, target);
  }
}

}  // namespace

void launch_combine_recv(const CombineRecvParams& params, int num_sms, Target target) {
  switch (params.self.output_dtype) {
    case Dtype::kBf16:
      return enqueue<Dtype::kBf16>(params, num_sms, target);
    case Dtype::kFp16:
      return enqueue<Dtype::kFp16>(params, num_sms, target);
    case Dtype::kFp32:
      return enqueue<Dtype::kFp32>(params, num_sms, target);
  }
}

}  // namespace moebius::cuda
