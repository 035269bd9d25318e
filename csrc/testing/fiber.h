// Fibers with their own stacks for the host executor: a few instructions per switch on x86-64,
// ucontext elsewhere. Every switch is announced to AddressSanitizer.
#pragma once

#include <cstddef>
#include <memory>

#if !(defined(__x86_64__) && defined(__ELF__))
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define MCIBI_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MCIBI_ASAN 1
#endif
#endif
#ifdef MCIBI_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace mcibi_host {

// A saved execution state. The scheduler's own context has no stack of its own here.
class Context {
 public:
  // Prepares `entry` (which must never return) to run on the given stack.
  void prepare(void* stack, size_t bytes, void (*entry)());
  // Saves the running state here and continues `to`. With `leaving`, this state will not be
  // continued again.
  void switch_to(Context& to, bool leaving = false);
  // The first call in the entry of a new fiber.
  static void arrived();

 private:
#if defined(__x86_64__) && defined(__ELF__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  const void* stack_ = nullptr;  // the scheduler's is set by the sanitizer at the first switch
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
};

#if defined(__x86_64__) && defined(__ELF__)
// Saves the callee-saved registers and the stack pointer, then loads those of the other context.
extern "C" void mcibi_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.type mcibi_switch_stack,@function
.local mcibi_switch_stack
mcibi_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mcibi_switch_stack,.-mcibi_switch_stack
)");
#endif

#ifdef MCIBI_ASAN
inline Context* switched_from = nullptr;
#endif

inline void Context::prepare(void* stack, size_t bytes, void (*entry)()) {
  stack_ = stack;
  bytes_ = bytes;
  fake_stack_ = nullptr;
#ifdef MCIBI_ASAN
  __asan_unpoison_memory_region(stack, bytes);  // frames of an abandoned fiber
#endif
#if defined(__x86_64__) && defined(__ELF__)
  // `ret` enters entry() with the stack as after a call: a multiple of 16, plus 8. Six registers
  // are popped before that.
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes) - 2;
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  stack_pointer_ = top - 6;
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

inline void Context::switch_to(Context& to, [[maybe_unused]] bool leaving) {
#ifdef MCIBI_ASAN
  switched_from = this;
  __sanitizer_start_switch_fiber(leaving ? nullptr : &fake_stack_, to.stack_, to.bytes_);
#endif
#if defined(__x86_64__) && defined(__ELF__)
  mcibi_switch_stack(&stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&context_, &to.context_);
#endif
#ifdef MCIBI_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, &switched_from->stack_, &switched_from->bytes_);
#endif
}

inline void Context::arrived() {
#ifdef MCIBI_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &switched_from->stack_, &switched_from->bytes_);
#endif
}

}  // namespace mcibi_host
