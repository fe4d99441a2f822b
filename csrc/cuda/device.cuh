// The machine that the kernels are written for, in two makes: instructions (ptx.cuh, nvcc) and the
// host executor (csrc/simt/device.h, any C++17 compiler with -DMOEBIUS_SIMT). A kernel uses these
// functions and plain C++ on its own variables, nothing else; above all, no pointer into global or
// shared memory is dereferenced: what does not go through here, the executor cannot see.
//
// Identity     thread_index() num_threads() block_index() num_blocks() lane() warp_index()
// Kinds        MOEBIUS_DEVICE, MOEBIUS_COLD (not inlined), MOEBIUS_KERNEL, MOEBIUS_PARAMS
// Meeting      sync_block() sync_warp()
// Warp         ballot(bool) shfl(v, lane) shfl_xor(v, mask) shfl_up(v, delta): all 32 lanes call
// Memory       shared_memory(); load, store: plain, of 1 to 16 bytes, global or shared;
//              load_stream: 16 bytes that nobody writes while the kernel runs;
//              load_last: 16 bytes of global memory that nobody reads again
// Atomics      shared: or_shared, add_shared (return what was there); global, device scope:
//              add_relaxed_gpu (returns nothing), fetch_add_relaxed_gpu, add_acq_rel_gpu,
//              exchange_max_gpu (atomicMax)
// Order        load_acquire_sys, store_release_sys, load_relaxed_sys, store_relaxed_sys,
//              fence_acq_rel_sys
// Bulk copies  by a whole warp, 16-byte aligned, multiples of 16 bytes:
//              barrier_init(b), fence_barrier_init(), warp_bulk_load(shared, global, n, b),
//              barrier_wait(b, parity); warp_bulk_store(global, shared, n), bulk_commit(),
//              bulk_wait_read<N>() (shared memory may be reused, but for the last N groups),
//              bulk_wait_all() (written, and visible to this thread);
//              fence_proxy_async() (between ordinary accesses and bulk copies of the same memory),
//              fence_proxy_async_shared() (likewise, of shared memory only)
// Network      kHasNetwork; to ranks whose memory is not mapped here, addresses being those of the
// same
//              place in the own heap: warp_put_signal(dst, to, from, n, signal, word),
//              warp_put(dst, to, from, n), put_word(dst, to, word): post, and return; a put's
//              signal waits for its data only; network_fence() (what follows arrives after what
//              this rank has posted to the same rank), network_quiet() (all has arrived, sources
//              may be written again)
// Time         now_ns() relax() wait_for_previous_kernel() let_next_kernel_start()
// Arithmetic   mul, add, divide: rounded once each, never fused; e4m3x2(lo, hi),
//              saturating, bf16x2(lo, hi), fp16x2(lo, hi); float_of_fp16, bits_of, float_of
#pragma once

#include <stdint.h>

#include <cstddef>

namespace moebius::cuda {

struct alignas(16) Vec16 {
  uint32_t w[4];
};

constexpr int kWarp = 32;

}  // namespace moebius::cuda

#if defined(MOEBIUS_SIMT)
#include "simt/device.h"
#else
#include "cuda/ptx.cuh"
#if defined(MOEBIUS_NVSHMEM)
#include "nvshmem/network.cuh"
#endif
#endif
