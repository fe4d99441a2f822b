// How a launcher enqueues its kernel: `launch(kernel<...>, shape, params, target)`, for both makes.
#pragma once

#include "cuda/runtime.h"

#if defined(MOEBIUS_SIMT)
#include "simt/launch.h"
#else

namespace moebius::cuda {

// Enqueues `kernel(params)`. Where the target says so (only where can_overlap()), the kernel may
// start before the one ahead of it on the stream has ended; it calls wait_for_previous_kernel()
// before it touches what that one wrote. Captured into a graph when the stream is capturing.
//
// `kernel`: a __global__ function of this program that was loaded; `arguments` as
// cudaLaunchKernelExC takes them. Throws DeviceError.
void launch_kernel(const void* kernel, const LaunchShape& shape, void** arguments, Target target);

// While one lives, `launch` on this thread enqueues nothing: it loads the kernel and allows it its
// shared memory. Otherwise the first launch would do that; it may then wait for the device, and so
// for kernels that wait for other ranks, and is not always allowed in a capture. Throws DeviceError
// where the device has not the shared memory.
class LoadOnly {
 public:
  LoadOnly();
  ~LoadOnly();
  LoadOnly(const LoadOnly&) = delete;
  LoadOnly& operator=(const LoadOnly&) = delete;
};

template <class Params>
void launch(void (*kernel)(Params), const LaunchShape& shape, const Params& params, Target target) {
  void* arguments[] = {const_cast<Params*>(&params)};
  launch_kernel(reinterpret_cast<const void*>(kernel), shape, arguments, target);
}

}  // namespace moebius::cuda

#endif
