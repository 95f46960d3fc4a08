// One fiber per CUDA thread: its stack, the switch to it and back, and what the sanitizers are told of that.
#include <sys/mman.h>

#include <new>
#include <stdexcept>

#include "scheduler.h"

#if !defined(__x86_64__)
#error "simt: the switch between fibers is written for x86-64"
#endif

extern "C" {
// Saves what a call must keep, stores the stack pointer and goes on where the other one was stored.
void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
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
)");

#if defined(SIMT_TSAN)
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
#elif defined(SIMT_ASAN)
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
#endif
}

namespace simt {

Fiber* running = nullptr;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kPage = 4096;
// For races each thread of a launch needs a fiber of its own, of which ThreadSanitizer has some 8,000.
constexpr size_t kRaceThreads = 7000;

std::vector<std::unique_ptr<Fiber>> all_fibers;
std::vector<Fiber*> idle;
void* host_pointer = nullptr;

#if defined(SIMT_TSAN)
void* host_identity = nullptr;
void become(void* identity) { __tsan_switch_to_fiber(identity, /*no_sync=*/1); }
#elif defined(SIMT_ASAN)
const void* host_stack = nullptr;
size_t host_stack_bytes = 0;
#endif

void entry() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
  launching->call(launching->body);
  wait(Wait::kDone);
}

}  // namespace

void begin_fibers() {
#if defined(SIMT_TSAN)
  host_identity = __tsan_get_current_fiber();
#endif
}

Fiber* take_fiber() {
  if (idle.empty()) {
#if defined(SIMT_TSAN)
    if (all_fibers.size() >= kRaceThreads) throw std::runtime_error("simt: more threads in a launch than can be told apart");
#endif
    auto fiber = std::make_unique<Fiber>();
    void* memory = mmap(
        nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kPage, PROT_NONE);  // an overflow of the stack is a fault
    fiber->stack = static_cast<char*>(memory) + kPage;
#if defined(SIMT_TSAN)
    fiber->identity = __tsan_create_fiber(0);
#endif
    idle.push_back(fiber.get());
    all_fibers.push_back(std::move(fiber));
  }
  Fiber* fiber = idle.back();
  idle.pop_back();
  // At its first instruction a function finds rsp % 16 == 8: the address it returns to lies there, here a null one.
  auto** top = reinterpret_cast<void**>(fiber->stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber->pointer = top;
  fiber->fake_stack = nullptr;
  fiber->wait = Wait::kNothing;
  return fiber;
}

void give_back(const std::vector<Fiber*>& fibers) { idle.insert(idle.end(), fibers.begin(), fibers.end()); }

void give_back_all() {
  idle.clear();
  for (const auto& fiber : all_fibers) idle.push_back(fiber.get());
}

void run(Fiber* fiber) {
  running = fiber;
  threadIdx = fiber->thread;
  blockIdx = fiber->block->index;
#if defined(SIMT_TSAN)
  become(fiber->identity);
  simt_switch(&host_pointer, fiber->pointer);
#elif defined(SIMT_ASAN)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber->stack, kStackBytes);
  simt_switch(&host_pointer, fiber->pointer);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  simt_switch(&host_pointer, fiber->pointer);
#endif
}

void wait(Wait what) {
  Fiber* fiber = running;
  fiber->wait = what;
#if defined(SIMT_TSAN)
  become(host_identity);
  simt_switch(&fiber->pointer, host_pointer);
#elif defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(what == Wait::kDone ? nullptr : &fiber->fake_stack, host_stack, host_stack_bytes);
  simt_switch(&fiber->pointer, host_pointer);
  __sanitizer_finish_switch_fiber(fiber->fake_stack, nullptr, nullptr);
#else
  simt_switch(&fiber->pointer, host_pointer);
#endif
}

#if defined(SIMT_TSAN)
void order(const std::vector<Fiber*>& from, const std::vector<Fiber*>& to) {
  const auto address = std::make_unique<int64_t>();  // fresh, so that it holds the order of nothing else
  if (from.empty()) __tsan_release(address.get());
  for (Fiber* fiber : from) {
    become(fiber->identity);
    __tsan_release(address.get());
  }
  for (Fiber* fiber : to) {
    become(fiber->identity);
    __tsan_acquire(address.get());
  }
  become(host_identity);
  if (to.empty()) __tsan_acquire(address.get());
}
#endif

}  // namespace simt
