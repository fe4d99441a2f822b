#include "simt/fiber.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define MOEBIUS_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MOEBIUS_ASAN
#endif
#endif
#if defined(MOEBIUS_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(MOEBIUS_SIMT_UCONTEXT)
// void moebius_simt_switch(void** from_sp, void* to_sp): saves what a call preserves on the stack
// it leaves, takes it from the one it goes to.
extern "C" void moebius_simt_switch(void** from_sp, void* to_sp);
#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl moebius_simt_switch
.hidden moebius_simt_switch
.type moebius_simt_switch, @function
moebius_simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size moebius_simt_switch, .-moebius_simt_switch
)");
#else
asm(R"(
.text
.p2align 4
.globl moebius_simt_switch
.hidden moebius_simt_switch
.type moebius_simt_switch, %function
moebius_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size moebius_simt_switch, .-moebius_simt_switch
)");
#endif
#endif

namespace moebius::simt {
namespace {

constexpr size_t kGuardBytes = 4096;
constexpr size_t kSlabStacks = 64;  // mapped at once
constexpr size_t kSpacing = StackPool::kStackBytes + kGuardBytes;

void jump(Context& from, Context& to) {
#if defined(MOEBIUS_SIMT_UCONTEXT)
  swapcontext(&from.saved, &to.saved);
#else
  moebius_simt_switch(&from.sp, to.sp);
#endif
}

}  // namespace

std::byte* StackPool::take() {
  if (free_.empty()) {
    void* slab = mmap(nullptr,
                      kSlabStacks * kSpacing,
                      PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                      -1,
                      0);
    if (slab == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = kSlabStacks; i-- > 0;) {
      std::byte* const guard = static_cast<std::byte*>(slab) + i * kSpacing;
      mprotect(guard, kGuardBytes, PROT_NONE);
      free_.push_back(guard + kGuardBytes);
    }
  }
  std::byte* const stack = free_.back();
  free_.pop_back();
  return stack;
}

void prepare(Context& fiber, std::byte* stack, void (*entry)()) {
#if defined(MOEBIUS_ASAN)
  // A fiber that was given up left its frames poisoned.
  __asan_unpoison_memory_region(stack, StackPool::kStackBytes);
#endif
  fiber.bottom = stack;
  fiber.num_bytes = StackPool::kStackBytes;
  fiber.fake = nullptr;
#if defined(MOEBIUS_SIMT_UCONTEXT)
  getcontext(&fiber.saved);
  fiber.saved.uc_stack.ss_sp = stack;
  fiber.saved.uc_stack.ss_size = StackPool::kStackBytes;
  fiber.saved.uc_link = nullptr;
  makecontext(&fiber.saved, entry, 0);
#else
  auto* top = reinterpret_cast<uint64_t*>(stack + StackPool::kStackBytes);
#if defined(__x86_64__)
  // At entry the stack is as after a call: a return address, and sp = 8 modulo 16.
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  top -= 6;
  memset(top, 0, 6 * sizeof *top);
#else
  top -= 20;
  memset(top, 0, 20 * sizeof *top);
  top[11] = reinterpret_cast<uint64_t>(entry);  // x30
#endif
  fiber.sp = top;
#endif
}

void enter(Context& scheduler, Context& fiber) {
#if defined(MOEBIUS_ASAN)
  __sanitizer_start_switch_fiber(&scheduler.fake, fiber.bottom, fiber.num_bytes);
#endif
  jump(scheduler, fiber);
#if defined(MOEBIUS_ASAN)
  __sanitizer_finish_switch_fiber(scheduler.fake, nullptr, nullptr);
#endif
}

void leave(Context& fiber, Context& scheduler, [[maybe_unused]] bool ends) {
#if defined(MOEBIUS_ASAN)
  __sanitizer_start_switch_fiber(
      ends ? nullptr : &fiber.fake, scheduler.bottom, scheduler.num_bytes);
#endif
  jump(fiber, scheduler);
#if defined(MOEBIUS_ASAN)
  // The next slice may run on another thread of the host.
  __sanitizer_finish_switch_fiber(fiber.fake, &scheduler.bottom, &scheduler.num_bytes);
#endif
}

void entered([[maybe_unused]] Context& scheduler) {
#if defined(MOEBIUS_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.num_bytes);
#endif
}

}  // namespace moebius::simt
