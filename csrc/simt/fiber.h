// Stacks and the switch between them. Known to the address sanitizer.
#pragma once

#include <stddef.h>

#include <cstddef>
#include <vector>

#if !defined(MOEBIUS_SIMT_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define MOEBIUS_SIMT_UCONTEXT
#endif
#if defined(MOEBIUS_SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace moebius::simt {

struct Context {
  void* sp = nullptr;
#if defined(MOEBIUS_SIMT_UCONTEXT)
  ucontext_t saved;
#endif
  // For the sanitizer: the bounds of the stack, and what it set aside for it.
  const void* bottom = nullptr;
  size_t num_bytes = 0;
  void* fake = nullptr;
};

// Stacks with a guard page below each, kept for reuse as long as the process lives.
class StackPool {
 public:
  static constexpr size_t kStackBytes = 128 << 10;

  std::byte* take();
  void give(std::byte* stack) { free_.push_back(stack); }

 private:
  std::vector<std::byte*> free_;
};

// Makes `fiber` a context that runs `entry`, which must not return, on `stack`.
void prepare(Context& fiber, std::byte* stack, void (*entry)());
// From the scheduler into a fiber, until that calls `leave`.
void enter(Context& scheduler, Context& fiber);
// From a fiber to the scheduler. `ends`: it will not be entered again.
void leave(Context& fiber, Context& scheduler, bool ends);
// What `entry` does first.
void entered(Context& scheduler);

}  // namespace moebius::simt
