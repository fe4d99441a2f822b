// The functions of csrc/cuda/device.cuh on the host executor; signatures as in csrc/cuda/ptx.cuh,
// but for the place of the call, which reports name.
#pragma once

#include <string.h>

#include <cstddef>
#include <type_traits>

#include "simt/numbers.h"
#include "simt/operations.h"

#define MOEBIUS_DEVICE inline
#define MOEBIUS_COLD inline
#define MOEBIUS_KERNEL(max_threads) void
#define MOEBIUS_PARAMS const

namespace moebius::cuda {

constexpr bool kHasBulk = true;

inline int thread_index() { return simt::current->index; }
inline int num_threads() { return simt::current->block->launch->shape().num_threads; }
inline int block_index() { return simt::current->block->index; }
inline int num_blocks() { return simt::current->block->launch->shape().num_blocks; }
inline int lane() { return simt::current->lane; }
inline int warp_index() { return simt::current->warp; }

inline void sync_block(simt::Site site = simt::Site::here()) { simt::sync_block(site); }
inline void sync_warp(simt::Site site = simt::Site::here()) { simt::sync_warp(site); }
inline void sync_group(int barrier, int num_threads, simt::Site site = simt::Site::here()) {
  simt::sync_group(barrier, num_threads, site);
}

inline uint32_t ballot(bool b, simt::Site site = simt::Site::here()) {
  return simt::ballot(b, site);
}
template <class T>
T shuffle_from(T v, int from, simt::Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what __shfl_sync takes");
  simt::LaneValue value{};
  memcpy(value.bytes, &v, sizeof v);
  simt::shuffle(value, from, site);
  memcpy(&v, value.bytes, sizeof v);
  return v;
}
template <class T>
T shfl(T v, int from, simt::Site site = simt::Site::here()) {
  return shuffle_from(v, from & (kWarp - 1), site);
}
template <class T>
T shfl_xor(T v, int mask, simt::Site site = simt::Site::here()) {
  const int from = lane() ^ mask;
  return shuffle_from(v, from < kWarp ? from : lane(), site);
}
template <class T>
T shfl_up(T v, int delta, simt::Site site = simt::Site::here()) {
  const int from = lane() - delta;
  return shuffle_from(v, from >= 0 ? from : lane(), site);
}

inline std::byte* shared_memory() { return simt::current->block->shared; }

template <class T>
constexpr bool kIsAccess =
    std::is_trivially_copyable_v<T> &&
    (sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);

template <class T>
T load(const T* p) {
  static_assert(kIsAccess<T>, "1, 2, 4, 8 or 16 bytes");
  T v;
  simt::read(p, sizeof v, &v);
  return v;
}
template <class T>
void store(T* p, T v) {
  static_assert(kIsAccess<T>, "1, 2, 4, 8 or 16 bytes");
  simt::write(p, sizeof v, &v);
}
inline Vec16 load_last(const Vec16* p) { return load(p); }
inline Vec16 load_stream(const Vec16* p) {
  Vec16 v;
  simt::read_constant(p, sizeof v, &v);
  return v;
}

template <class T, class Change>
T update(T* p, simt::Order order, simt::Scope scope, const Change& change) {
  simt::begin_update(p, sizeof *p, order, scope);
  T before;
  memcpy(&before, p, sizeof before);
  const T after = change(before);
  simt::end_update(p, sizeof after, &after, order, scope);
  return before;
}
inline uint32_t or_shared(uint32_t* p, uint32_t bits) {
  return update(
      p, simt::Order::kRelaxed, simt::Scope::kBlock, [&](uint32_t v) { return v | bits; });
}
inline int add_shared(int* p, int n) {
  return update(p, simt::Order::kRelaxed, simt::Scope::kBlock, [&](int v) {
    return static_cast<int>(static_cast<uint32_t>(v) + static_cast<uint32_t>(n));
  });
}
inline void add_relaxed_gpu(int32_t* p, int32_t n) {
  update(p, simt::Order::kRelaxed, simt::Scope::kGpu, [&](int32_t v) {
    return static_cast<int32_t>(static_cast<uint32_t>(v) + static_cast<uint32_t>(n));
  });
}
inline void add_relaxed_gpu(int64_t* p, int64_t n) {
  update(p, simt::Order::kRelaxed, simt::Scope::kGpu, [&](int64_t v) {
    return static_cast<int64_t>(static_cast<uint64_t>(v) + static_cast<uint64_t>(n));
  });
}
inline uint32_t fetch_add_relaxed_gpu(uint32_t* p, uint32_t n) {
  return update(p, simt::Order::kRelaxed, simt::Scope::kGpu, [&](uint32_t v) { return v + n; });
}
inline uint32_t add_acq_rel_gpu(uint32_t* p, uint32_t n) {
  return update(p, simt::Order::kAcquire, simt::Scope::kGpu, [&](uint32_t v) { return v + n; });
}
inline uint64_t exchange_max_gpu(uint64_t* p, uint64_t v) {
  return update(p, simt::Order::kRelaxed, simt::Scope::kGpu, [&](uint64_t before) {
    return before > v ? before : v;
  });
}

template <class T>
T read_word(const T* p, simt::Order order) {
  T v;
  simt::read_word(p, sizeof v, &v, order);
  return v;
}
inline uint64_t load_acquire_sys(const uint64_t* p) { return read_word(p, simt::Order::kAcquire); }
inline uint64_t load_relaxed_sys(const uint64_t* p) { return read_word(p, simt::Order::kRelaxed); }
inline uint32_t load_relaxed_sys(const uint32_t* p) { return read_word(p, simt::Order::kRelaxed); }
inline void store_release_sys(uint64_t* p, uint64_t v) {
  simt::write_word(p, sizeof v, &v, simt::Order::kRelease);
}
inline void store_release_sys(uint32_t* p, uint32_t v) {
  simt::write_word(p, sizeof v, &v, simt::Order::kRelease);
}
inline void store_relaxed_sys(uint64_t* p, uint64_t v) {
  simt::write_word(p, sizeof v, &v, simt::Order::kRelaxed);
}
inline void store_relaxed_sys(uint32_t* p, uint32_t v) {
  simt::write_word(p, sizeof v, &v, simt::Order::kRelaxed);
}
inline void fence_acq_rel_sys() { simt::fence_sys(); }

using Barrier = uint64_t;

inline void barrier_init(Barrier* b) { simt::barrier_init(b); }
inline void fence_barrier_init() { simt::fence_barrier_init(); }
inline void barrier_wait(Barrier* b, uint32_t parity, simt::Site site = simt::Site::here()) {
  simt::barrier_wait(b, parity, site);
}
inline void warp_bulk_load(void* shared,
                           const void* global,
                           uint32_t num_bytes,
                           Barrier* b,
                           simt::Site site = simt::Site::here()) {
  if (lane() == 0) simt::bulk_load(shared, global, num_bytes, b);
  simt::sync_warp(site);
}
inline void warp_bulk_store(void* global,
                            const void* shared,
                            uint32_t num_bytes,
                            simt::Site site = simt::Site::here()) {
  if (lane() == 0) simt::bulk_store(global, shared, num_bytes);
  simt::sync_warp(site);
}
inline void bulk_commit() { simt::bulk_commit(); }
template <int kMostPending>
void bulk_wait_read(simt::Site site = simt::Site::here()) {
  simt::bulk_wait(kMostPending, false, site);
  simt::sync_warp(site);
}
inline void bulk_wait_all(simt::Site site = simt::Site::here()) {
  simt::bulk_wait(0, true, site);
  simt::sync_warp(site);
}
inline void fence_proxy_async() { simt::fence_proxy(true); }
inline void fence_proxy_async_shared() { simt::fence_proxy(false); }

constexpr bool kHasNetwork = true;
inline void warp_put_signal(int dst,
                            std::byte* to,
                            const std::byte* from,
                            int64_t num_bytes,
                            uint64_t* signal,
                            uint64_t word,
                            simt::Site site = simt::Site::here()) {
  const auto n = static_cast<size_t>(num_bytes);
  if (lane() == 0) simt::put_signal(dst, to, from, n, signal, word);
  simt::sync_warp(site);
}
inline void warp_put(int dst,
                     std::byte* to,
                     const std::byte* from,
                     int64_t num_bytes,
                     simt::Site site = simt::Site::here()) {
  const auto n = static_cast<size_t>(num_bytes);
  if (lane() == 0) simt::put_signal(dst, to, from, n, nullptr, 0);
  simt::sync_warp(site);
}
inline void put_word(int dst, uint64_t* to, uint64_t word) {
  simt::put_signal(dst, nullptr, nullptr, 0, to, word);
}
inline void put_word(int dst, uint32_t* to, uint32_t word) { simt::put_word32(dst, to, word); }
inline void network_fence() { simt::network_fence(); }
inline void network_quiet(simt::Site site = simt::Site::here()) { simt::network_quiet(site); }

inline uint64_t now_ns() { return simt::now_ns(); }
inline void relax(simt::Site site = simt::Site::here()) { simt::relax(site); }
inline void wait_for_previous_kernel(simt::Site site = simt::Site::here()) {
  simt::wait_for_previous_kernel(site);
}
inline void let_next_kernel_start() { simt::let_next_kernel_start(); }

// Rounded one by one under -ffp-contract=off, which the executor is built with.
inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float divide(float a, float b) { return a / b; }
inline uint32_t bits_of(float f) { return simt::bits(f); }
inline float float_of(uint32_t u) { return simt::from_bits(u); }
inline uint32_t e4m3x2(float lo, float hi) {
  return simt::e4m3_bits(hi) << 8 | simt::e4m3_bits(lo);
}
inline uint32_t bf16x2(float lo, float hi) {
  return simt::bf16_bits(hi) << 16 | simt::bf16_bits(lo);
}
inline uint32_t fp16x2(float lo, float hi) {
  return simt::fp16_bits(hi) << 16 | simt::fp16_bits(lo);
}
inline float float_of_fp16(uint32_t half) { return simt::from_fp16(half & 0xffffu); }
inline int popcount(uint32_t u) { return __builtin_popcount(u); }

}  // namespace moebius::cuda
