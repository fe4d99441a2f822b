// What the checks are meant to catch: local memory, a fused multiply-add, signals without an order.
#include "cuda/device.cuh"

namespace moebius::cuda {

MOEBIUS_KERNEL(128) combine_recv_kernel(uint64_t* signals, float* to, const float* from, int n) {
  while (load_relaxed_sys(signals) == 0) relax();
  float rows[64];
  for (int i = 0; i < 64; ++i) rows[i] = from[i];
  float sum = 0.0f;
  for (int i = 0; i < n; ++i) sum = sum + rows[(i * 7) % 64] * from[i];
  rows[n % 64] = sum;
  for (int i = 0; i < n; ++i) to[i] = rows[i % 64];
  store_relaxed_sys(signals + 1, uint64_t{2});
}

}  // namespace moebius::cuda
