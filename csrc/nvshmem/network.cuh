// device.cuh's network over NVSHMEM. Declarations only: the kernels are compiled without NVSHMEM's
// headers, and these calls, which NVSHMEM does not inline either, are bound by the device linker.
//
// Ranks are PEs: NVSHMEM's world is made of the group's own ranks, in their order
// (csrc/nvshmem/world.h checks it). Addresses are those of the caller's own heap, which lies in the
// symmetric heap, as NVSHMEM wants them.
#pragma once

#include "cuda/device.cuh"

namespace moebius::cuda {

constexpr bool kHasNetwork = true;

// By all 32 lanes.
__device__ void warp_put_signal(int dst,
                                std::byte* to,
                                const std::byte* from,
                                int64_t num_bytes,
                                uint64_t* signal,
                                uint64_t word);
__device__ void warp_put(int dst, std::byte* to, const std::byte* from, int64_t num_bytes);
// By one thread, or several that come here together.
__device__ void put_word(int dst, uint64_t* to, uint64_t word);
__device__ void put_word(int dst, uint32_t* to, uint32_t word);
__device__ void network_fence();
__device__ void network_quiet();

}  // namespace moebius::cuda
