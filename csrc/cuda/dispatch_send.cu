// Dispatch, send half, as a kernel of its own.
#include "cuda/dispatch_send.cuh"

#include "cuda/launchers.h"

namespace moebius::cuda {
namespace {

template <Encoding kEncoding, Dtype kX>
MOEBIUS_KERNEL(kThreadsPerBlock)
dispatch_send_kernel(MOEBIUS_PARAMS SendLaunch l) {
  const SendShared shared = SendShared::in(shared_memory(), l.args.self.layout.shape, l.num_words);
  if (thread_index() == 0) store(&shared.ending->has_failed, 0u);
  prepare_part(shared);
  wait_for_previous_kernel();
  send_part<kEncoding, kX>(l, Opening::read(l.args), Place::of_block(), NoTurns{}, shared);
}

template <Encoding kEncoding, Dtype kX>
void enqueue(const DispatchSendParams& params, int num_sms, Target target) {
  const SendLaunch l = plan_sending<kEncoding, kX>(params, num_sms);
  const size_t num_bytes = SendShared::num_bytes(params.self.layout.shape, l.num_words);
  launch(dispatch_send_kernel<kEncoding, kX>,
         LaunchShape{l.num_parts, kThreadsPerBlock, num_bytes},
         l,
         target);
}

}  // namespace

void launch_dispatch_send(const DispatchSendParams& params, int num_sms, Target target) {
  if (params.encoding == Encoding::kCopy) {
    return enqueue<Encoding::kCopy, Dtype::kBf16>(params, num_sms, target);
  }
  switch (params.x_dtype) {
    case Dtype::kBf16:
      return enqueue<Encoding::kQuantise, Dtype::kBf16>(params, num_sms, target);
    case Dtype::kFp16:
      return enqueue<Encoding::kQuantise, Dtype::kFp16>(params, num_sms, target);
    case Dtype::kFp32:
      return enqueue<Encoding::kQuantise, Dtype::kFp32>(params, num_sms, target);
  }
}

}  // namespace moebius::cuda
