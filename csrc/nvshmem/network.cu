#include "nvshmem/network.cuh"

#include <nvshmem.h>
#include <nvshmemx.h>

// What is used is in 3.4.5, and the same in later versions. Of what came later, queue pairs of
// one's own (nvshmemx_qp_*, 3.5.19) could spread the puts of one peer, of which there is one for
// each half; puts by the bulk copy engine (3.7) are for peers in reach, which are written directly.
static_assert(NVSHMEM_VENDOR_VERSION >= 30405, "moebius needs NVSHMEM 3.4.5 or later");

namespace moebius::cuda {

__device__ void warp_put_signal(int dst,
                                std::byte* to,
                                const std::byte* from,
                                int64_t num_bytes,
                                uint64_t* signal,
                                uint64_t word) {
  if (num_bytes == 0) {
    // Not every transport takes a message of no bytes.
    if (lane() == 0) nvshmemx_signal_op(signal, word, NVSHMEM_SIGNAL_SET, dst);
    sync_warp();
    return;
  }
  nvshmemx_putmem_signal_nbi_warp(
      to, from, static_cast<size_t>(num_bytes), signal, word, NVSHMEM_SIGNAL_SET, dst);
}

__device__ void warp_put(int dst, std::byte* to, const std::byte* from, int64_t num_bytes) {
  if (num_bytes != 0) nvshmemx_putmem_nbi_warp(to, from, static_cast<size_t>(num_bytes), dst);
}

__device__ void put_word(int dst, uint64_t* to, uint64_t word) {
  nvshmemx_signal_op(to, word, NVSHMEM_SIGNAL_SET, dst);
}

__device__ void put_word(int dst, uint32_t* to, uint32_t word) { nvshmem_uint32_p(to, word, dst); }

// It is about all that this PE has posted, and may look at every queue: once is enough for the
// threads that come here together.
__device__ void network_fence() {
  const unsigned together = __activemask();
  if (lane() == __ffs(static_cast<int>(together)) - 1) nvshmem_fence();
  __syncwarp(together);
}

__device__ void network_quiet() { nvshmem_quiet(); }

}  // namespace moebius::cuda
