// What the checks are meant to find, in one small kernel.
#include "cuda/device.cuh"

namespace moebius::cuda {

MOEBIUS_KERNEL(128) dispatch_send_kernel(uint64_t* signals, std::byte* to, const std::byte* from) {
  wait_for_previous_kernel();
  Barrier* barrier = reinterpret_cast<Barrier*>(shared_memory());
  std::byte* stage = shared_memory() + 128;
  if (thread_index() == 0) {
    barrier_init(barrier);
    fence_barrier_init();
  }
  sync_block();
  while (load_acquire_sys(signals) == 0) relax();
  fence_proxy_async();
  if (warp_index() == 0) {
    warp_bulk_load(stage, from, 512, barrier);
    barrier_wait(barrier, 0);
    warp_bulk_store(to, stage, 512);
    bulk_commit();
    bulk_wait_all();
    if (lane() == 0) store_release_sys(signals + 1, uint64_t{2});
  }
  let_next_kernel_start();
}

}  // namespace moebius::cuda
