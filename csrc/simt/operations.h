// What the functions of device.h do beyond plain arithmetic. All act for `current`.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <cstddef>

#include "simt/machine.h"
#include "simt/site.h"
#include "simt/world.h"

namespace moebius::simt {

// Sometimes gives others a turn; before every operation that they can see.
void preempt();
inline void touch() {
  if (--current->budget <= 0) preempt();
}

enum class Order { kRelaxed, kAcquire, kRelease };
enum class Scope { kBlock, kGpu, kSys };

// Refuses what is misaligned, of another block's shared memory, or out of bounds.
void check_access(const void* p, size_t n, bool is_gpu_atomic = false);
void read(const void* p, size_t n, void* out);
void write(void* p, size_t n, const void* data);
// Fails if somebody wrote there whom the kernel's start does not follow.
void read_constant(const void* p, size_t n, void* out);
void read_word(const void* p, size_t n, void* out, Order order);
void write_word(void* p, size_t n, const void* data, Order order);
// Around a read-modify-write: what is there, and what is to be there.
void begin_update(void* p, size_t n, Order order, Scope scope);
void end_update(void* p, size_t n, const void* data, Order order, Scope scope);
void fence_sys();
// With or without what bulk copies of this thread may read of global memory.
void fence_proxy(bool is_global);

// What `by` knows becomes known to those that acquire the result.
const Release* publish(Thread& by, bool is_sys, const Release* sequence);
void acquire(Thread& by, const Release* release);
// All know from here on what one of them knows.
void synchronise(Thread* const* threads, int num_threads);
// What only `by` knows becomes known to who waits for the barrier that it arrives at.
void arrive(Thread& by, PhaseBarrier& barrier);

void sync_block(const Site& site);
void sync_group(int barrier, int num_threads, const Site& site);
void sync_warp(const Site& site);
uint32_t ballot(bool vote, const Site& site);
// Every lane hands in 16 bytes and leaves with those of lane `from`.
void shuffle(LaneValue& value, int from, const Site& site);

void barrier_init(void* barrier);
void fence_barrier_init();
void barrier_wait(void* barrier, uint32_t parity, const Site& site);
void bulk_load(void* shared, const void* global, uint32_t num_bytes, void* barrier);
void bulk_store(void* global, const void* shared, uint32_t num_bytes);
void bulk_commit();
void bulk_wait(int most_pending, bool is_for_writes, const Site& site);

void put_signal(
    int dst, void* to, const void* from, size_t num_bytes, uint64_t* signal, uint64_t word);
void put_word32(int dst, uint32_t* to, uint32_t word);
void network_fence();
void network_quiet(const Site& site);

uint64_t now_ns();
void relax(const Site& site);
void wait_for_previous_kernel(const Site& site);
void let_next_kernel_start();

}  // namespace moebius::simt
