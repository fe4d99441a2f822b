#include "cpu/wait.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace moebius::cpu {
namespace {

// The half of the word that differs between successive rounds of a slot: the count and 8 bits of
// the epoch.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the futex is the low half of the word");
uint32_t* futex_of(Signal& signal) { return reinterpret_cast<uint32_t*>(&signal.word); }

}  // namespace

WaitPolicy wait_policy(int num_ranks, int num_cores) {
  // The spin is short even so: now and then the kernel puts two ranks on one core for a while.
  if (num_ranks <= num_cores) return {20'000, 1'000'000};
  return {0, 50'000};
}

void publish(Signal& signal, uint64_t word) {
  // [signal] Sequentially consistent, for the look at `num_sleepers` must not come before the word
  // is out: a waiter announces itself and then looks at the word, so one of the two sees the other.
  __atomic_store_n(&signal.word, word, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&signal.num_sleepers, __ATOMIC_SEQ_CST) != 0) {
    syscall(SYS_futex, futex_of(signal), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

void sleep_on(Signal& signal, uint64_t seen, int64_t timeout_ns) {
  __atomic_add_fetch(&signal.num_sleepers, 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&signal.word, __ATOMIC_SEQ_CST) == seen) {
    const timespec timeout{static_cast<time_t>(timeout_ns / 1000000000),
                           static_cast<long>(timeout_ns % 1000000000)};
    syscall(
        SYS_futex, futex_of(signal), FUTEX_WAIT, static_cast<uint32_t>(seen), &timeout, nullptr, 0);
  }
  __atomic_sub_fetch(&signal.num_sleepers, 1, __ATOMIC_SEQ_CST);
}

}  // namespace moebius::cpu
