// Signals between ranks of one host: publish, and wait with a deadline. The only spin of the
// engine.
#pragma once

#include <stdint.h>
#include <time.h>

#include <cstddef>

#include "layout.h"

namespace moebius::cpu {

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1000000000 + t.tv_nsec;
}

// How long to poll before giving the core away. Polling wins only while every rank has a core; a
// rank that polls on another's core makes both wait for the scheduler.
struct WaitPolicy {
  int64_t spin_ns;   // poll with `pause`
  int64_t yield_ns;  // then poll with sched_yield; then sleep on a futex
};
// `num_cores`: those that the ranks of this host may run on, all together.
WaitPolicy wait_policy(int num_ranks, int num_cores);

// Pairs with [signal] in `load_signal`: all that this thread wrote before is visible to who sees
// the word.
void publish(Signal& signal, uint64_t word);

// Pairs with [signal] in `publish`.
inline uint64_t load_signal(const Signal& signal) {
  return __atomic_load_n(&signal.word, __ATOMIC_ACQUIRE);
}

// Sleeps until the word may have changed, at most `timeout_ns`.
void sleep_on(Signal& signal, uint64_t seen, int64_t timeout_ns);

// Gives the core a moment without giving it away.
inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace moebius::cpu
