// Dispatch, receive half, as a kernel of its own.
#include "cuda/dispatch_recv.cuh"

#include "cuda/launchers.h"

namespace moebius::cuda {
namespace {

MOEBIUS_KERNEL(kThreadsPerBlock) dispatch_recv_kernel(MOEBIUS_PARAMS DispatchRecvParams p) {
  const Rank& self = p.self;
  const Shape& s = self.layout.shape;
  const RecvShared shared = RecvShared::in(shared_memory(), s);
  prepare_receiving(shared, s.num_local_experts());
  sync_block();
  wait_for_previous_kernel();
  const Begun begun = begin_half(self, p.handle, Half::kDispatchRecv);
  if (!begun.is_stale) return receive(p, begun, shared);
  // Its results are somebody else's by now, or never were: none.
  if (block_index() != 0) return;
  for (int i = thread_index(); i < s.num_local_experts(); i += num_threads()) {
    store(p.expert_num_tokens + i, 0);
  }
  for (int i = thread_index(); i < s.num_ranks; i += num_threads()) store(p.src_num_tokens + i, 0);
}

}  // namespace

void launch_dispatch_recv(const DispatchRecvParams& params, int num_sms, Target target) {
  const Shape& s = params.self.layout.shape;
  launch(dispatch_recv_kernel,
         LaunchShape{blocks_to_receive(s, num_sms), kThreadsPerBlock, RecvShared::num_bytes(s)},
         params,
         target);
}

}  // namespace moebius::cuda
