// The functions of device.cuh as instructions. The only file with inline assembly.
#pragma once

#include <cuda_fp8.h>

#define MOEBIUS_DEVICE __device__ __forceinline__
// For what seldom runs, or only waits: a kernel with few rows mostly fetches instructions, and
// these would stand between those that it needs.
// Static: of what other programs could call (-rdc), arguments would go by the stack.
#define MOEBIUS_COLD [[maybe_unused]] static __device__ __noinline__
#define MOEBIUS_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads, 1)
#define MOEBIUS_PARAMS const __grid_constant__

namespace moebius::cuda {

// Bulk copies came with sm_90; before, a warp copies by itself, 16 bytes a lane, and is done when
// it returns.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasBulk = false;
#else
constexpr bool kHasBulk = true;
#endif

MOEBIUS_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MOEBIUS_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
MOEBIUS_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
MOEBIUS_DEVICE int num_blocks() { return static_cast<int>(gridDim.x); }
MOEBIUS_DEVICE int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
MOEBIUS_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

MOEBIUS_DEVICE void sync_block() { __syncthreads(); }
MOEBIUS_DEVICE void sync_warp() { __syncwarp(); }
MOEBIUS_DEVICE uint32_t ballot(bool b) { return __ballot_sync(~0u, b); }
template <class T>
MOEBIUS_DEVICE T shfl(T v, int from) {
  return __shfl_sync(~0u, v, from);
}
MOEBIUS_DEVICE std::byte* shfl(std::byte* v, int from) {
  return reinterpret_cast<std::byte*>(
      __shfl_sync(~0u, reinterpret_cast<unsigned long long>(v), from));
}
MOEBIUS_DEVICE const std::byte* shfl(const std::byte* v, int from) {
  return shfl(const_cast<std::byte*>(v), from);
}
template <class T>
MOEBIUS_DEVICE T shfl_xor(T v, int mask) {
  return __shfl_xor_sync(~0u, v, mask);
}
template <class T>
MOEBIUS_DEVICE T shfl_up(T v, int delta) {
  return __shfl_up_sync(~0u, v, delta);
}

MOEBIUS_DEVICE std::byte* shared_memory() {
  extern __shared__ __align__(128) std::byte moebius_shared[];
  return moebius_shared;
}

template <class T>
MOEBIUS_DEVICE T load(const T* p) {
  return *p;
}
template <>
MOEBIUS_DEVICE Vec16 load(const Vec16* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
template <class T>
MOEBIUS_DEVICE void store(T* p, T v) {
  *p = v;
}
template <>
MOEBIUS_DEVICE void store(Vec16* p, Vec16 v) {
  *reinterpret_cast<uint4*>(p) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}
MOEBIUS_DEVICE Vec16 load_stream(const Vec16* p) {
#if defined(MOEBIUS_NO_STREAM_LOADS)
  return load(p);
#else
  Vec16 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p));
  return v;
#endif
}
// Kept in neither cache: what is written meanwhile, and read again soon, stays in the second one.
MOEBIUS_DEVICE Vec16 load_last(const Vec16* p) {
  Vec16 v;
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], policy;\n"
      "}"
      : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
      : "l"(p)
      : "memory");
  return v;
}

MOEBIUS_DEVICE uint32_t or_shared(uint32_t* p, uint32_t bits) { return atomicOr(p, bits); }
MOEBIUS_DEVICE int add_shared(int* p, int n) { return atomicAdd(p, n); }

MOEBIUS_DEVICE void add_relaxed_gpu(int32_t* p, int32_t n) { atomicAdd(p, n); }
MOEBIUS_DEVICE void add_relaxed_gpu(int64_t* p, int64_t n) {
  atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(n));
}
MOEBIUS_DEVICE uint32_t fetch_add_relaxed_gpu(uint32_t* p, uint32_t n) { return atomicAdd(p, n); }
MOEBIUS_DEVICE uint32_t add_acq_rel_gpu(uint32_t* p, uint32_t n) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(p), "r"(n)
               : "memory");
  return before;
}
MOEBIUS_DEVICE uint64_t exchange_max_gpu(uint64_t* p, uint64_t v) {
  return atomicMax(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}

MOEBIUS_DEVICE uint64_t load_acquire_sys(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
MOEBIUS_DEVICE uint64_t load_relaxed_sys(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
MOEBIUS_DEVICE uint32_t load_relaxed_sys(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
MOEBIUS_DEVICE void store_release_sys(uint64_t* p, uint64_t v) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
MOEBIUS_DEVICE void store_release_sys(uint32_t* p, uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MOEBIUS_DEVICE void store_relaxed_sys(uint64_t* p, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
MOEBIUS_DEVICE void store_relaxed_sys(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MOEBIUS_DEVICE void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

using Barrier = uint64_t;

MOEBIUS_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
MOEBIUS_DEVICE void barrier_init(Barrier* b) {
  if constexpr (kHasBulk) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(b)) : "memory");
  }
}
MOEBIUS_DEVICE void fence_barrier_init() {
  if constexpr (kHasBulk) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
MOEBIUS_DEVICE void barrier_wait(Barrier* b, uint32_t parity) {
  if constexpr (kHasBulk) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(b)),
        "r"(parity)
        : "memory");
  }
}

MOEBIUS_DEVICE void warp_copy(void* to, const void* from, uint32_t num_bytes) {
  const uint4* src = static_cast<const uint4*>(from);
  uint4* dst = static_cast<uint4*>(to);
#pragma unroll 4
  for (uint32_t v = lane(); v < num_bytes / 16; v += kWarp) dst[v] = src[v];
}
MOEBIUS_DEVICE void warp_bulk_load(void* shared,
                                   const void* global,
                                   uint32_t num_bytes,
                                   Barrier* b) {
  if constexpr (kHasBulk) {
    if (lane() == 0) {
      asm volatile(
          "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
          "r"(num_bytes)
          : "memory");
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
          "[%3];" ::"r"(shared_address(shared)),
          "l"(global),
          "r"(num_bytes),
          "r"(shared_address(b))
          : "memory");
    }
    __syncwarp();
  } else {
    warp_copy(shared, global, num_bytes);
    __syncwarp();
  }
}
MOEBIUS_DEVICE void warp_bulk_store(void* global, const void* shared, uint32_t num_bytes) {
  if constexpr (kHasBulk) {
    if (lane() == 0) {
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                   "r"(shared_address(shared)),
                   "r"(num_bytes)
                   : "memory");
    }
    __syncwarp();
  } else {
    warp_copy(global, shared, num_bytes);
    __syncwarp();
  }
}
MOEBIUS_DEVICE void bulk_commit() {
  if constexpr (kHasBulk) asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int kMostPending>
MOEBIUS_DEVICE void bulk_wait_read() {
  if constexpr (kHasBulk) {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kMostPending) : "memory");
  }
  __syncwarp();  // lane 0 waits for all
}
MOEBIUS_DEVICE void bulk_wait_all() {
  if constexpr (kHasBulk) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  __syncwarp();
}
MOEBIUS_DEVICE void fence_proxy_async() {
  if constexpr (kHasBulk) asm volatile("fence.proxy.async;" ::: "memory");
}
// The other waits for all earlier stores of the thread to global memory, as a fence does.
MOEBIUS_DEVICE void fence_proxy_async_shared() {
  if constexpr (kHasBulk) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#if !defined(MOEBIUS_NVSHMEM)
// Every rank is reached directly: nothing calls these.
constexpr bool kHasNetwork = false;
MOEBIUS_DEVICE void warp_put_signal(
    int, std::byte*, const std::byte*, int64_t, uint64_t*, uint64_t) {}
MOEBIUS_DEVICE void warp_put(int, std::byte*, const std::byte*, int64_t) {}
template <class T>
MOEBIUS_DEVICE void put_word(int, T*, T) {}
MOEBIUS_DEVICE void network_fence() {}
MOEBIUS_DEVICE void network_quiet() {}
#endif

MOEBIUS_DEVICE uint64_t now_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)::"memory");
  return t;
}
MOEBIUS_DEVICE void relax() {}
MOEBIUS_DEVICE void wait_for_previous_kernel() {
  if constexpr (kHasBulk) asm volatile("griddepcontrol.wait;" ::: "memory");
}
MOEBIUS_DEVICE void let_next_kernel_start() {
  if constexpr (kHasBulk) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

MOEBIUS_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
MOEBIUS_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
MOEBIUS_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
MOEBIUS_DEVICE uint32_t bits_of(float f) { return __float_as_uint(f); }
MOEBIUS_DEVICE float float_of(uint32_t u) { return __uint_as_float(u); }
// Two e4m3 numbers, `lo` in the low byte; NaN stays NaN, what is too large becomes 448.
MOEBIUS_DEVICE uint32_t e4m3x2(float lo, float hi) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  return __nv_cvt_float2_to_fp8x2(make_float2(lo, hi), __NV_SATFINITE, __NV_E4M3);
#else
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(hi), "f"(lo));
  return packed;
#endif
}
// Two numbers rounded to nearest even, `lo` in the low half.
MOEBIUS_DEVICE uint32_t bf16x2(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}
MOEBIUS_DEVICE uint32_t fp16x2(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}
MOEBIUS_DEVICE float float_of_fp16(uint32_t half) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(static_cast<uint16_t>(half)));
  return f;
}
MOEBIUS_DEVICE int popcount(uint32_t u) { return __popc(u); }

}  // namespace moebius::cuda
