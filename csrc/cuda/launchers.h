// What the host enqueues, one kernel each: a half, or both at once. Implemented beside the kernels,
// over csrc/cuda/runtime.h.
#pragma once

#include "cuda/params.h"
#include "cuda/runtime.h"

namespace moebius::cuda {

// `num_sms`: most blocks of a kernel (DESIGN.md, I6).
void launch_dispatch_send(const DispatchSendParams& params, int num_sms, Target target);
void launch_dispatch_recv(const DispatchRecvParams& params, int num_sms, Target target);
void launch_combine_send(const CombineSendParams& params, int num_sms, Target target);
void launch_combine_recv(const CombineRecvParams& params, int num_sms, Target target);
void launch_dispatch(const DispatchSendParams& send,
                     const DispatchRecvParams& recv,
                     int num_sms,
                     Target target);
void launch_combine(const CombineSendParams& send,
                    const CombineRecvParams& recv,
                    int num_sms,
                    Target target);

}  // namespace moebius::cuda
