// The scheduler of simt.h. All of its bookkeeping is done on the host's stack: a fiber only says what it waits for and
// switches to the host. Compiled without -fsanitize, whose runtimes are told of every switch instead.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

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

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kPage = 4096;
constexpr size_t kSharedBytes = 48 << 10;  // what a kernel gets without asking for more
constexpr size_t kBlockThreads = 1024;
// For races each thread of a launch needs a fiber of its own, of which ThreadSanitizer has some 8,000.
constexpr size_t kRaceThreads = 7000;

enum class Wait { kNothing, kShared, kBarrier, kWarp, kVote, kDone };

struct Block;

struct Fiber {
  char* stack = nullptr;
  void* pointer = nullptr;  // of the stack, while it does not run
  void* identity = nullptr;  // ThreadSanitizer's
  void* fake_stack = nullptr;  // AddressSanitizer's
  Block* block = nullptr;
  uint3 thread{};
  int index = 0;  // in the block

  Wait wait = Wait::kNothing;
  Site site{};
  uint32_t mask = 0;
  int source = 0;
  bool predicate = false, ordered = false;
  const void* key = nullptr;
  size_t bytes = 0;
  alignas(16) char given[kSlot] = {};
  alignas(16) char got[kSlot] = {};
  void* memory = nullptr;
  uint32_t answer = 0;
};

struct Block {
  uint3 index{};
  std::vector<Fiber*> fibers;
  std::map<const void*, char*> shared;
  size_t shared_bytes = 0;
  size_t done = 0, at_barrier = 0;
  std::vector<int> in_warp;  // threads of each warp that wait in a warp operation
};

struct Launch {
  const char* kernel = nullptr;
  void (*call)(const void*) = nullptr;
  const void* body = nullptr;
  size_t dynamic_bytes = 0;
  std::vector<Fiber*> ready;
  std::vector<char*> allocated;
  std::vector<Fiber*> started;
};

uint64_t random_state = 1;
std::vector<std::unique_ptr<Fiber>> all_fibers;
std::vector<Fiber*> idle;
Fiber* running = nullptr;
Launch* launching = nullptr;
void* host_pointer = nullptr;

uint64_t random(uint64_t below) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * 0x2545f4914f6cdd1dull >> 32) % below;
}

std::string describe(uint3 x) {
  return "(" + std::to_string(x.x) + ", " + std::to_string(x.y) + ", " + std::to_string(x.z) + ")";
}

std::string describe(const Site& site) {
  return std::string(site.operation) + " at " + site.file + ":" + std::to_string(site.line);
}

[[noreturn]] void fail(const Fiber& fiber, const std::string& what) {
  throw std::runtime_error(
      std::string("simt: kernel ") + launching->kernel + ", block " + describe(fiber.block->index) + ", thread " +
      describe(fiber.thread) + ": " + what);
}

#if defined(SIMT_TSAN)
void* host_identity = nullptr;
void become(void* identity) { __tsan_switch_to_fiber(identity, /*no_sync=*/1); }
#endif

// What `from` did so far comes before what `to` does from now on.
void order(const std::vector<Fiber*>& from, const std::vector<Fiber*>& to) {
#if defined(SIMT_TSAN)
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
#else
  (void)from, (void)to;
#endif
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

#if defined(SIMT_ASAN)
const void* host_stack = nullptr;
size_t host_stack_bytes = 0;
#endif

// On the fiber's stack: back to the host until it runs this fiber again.
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

void entry() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
  launching->call(launching->body);
  wait(Wait::kDone);
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

void give_memory(Fiber* fiber) {
  Block& block = *fiber->block;
  char*& memory = block.shared[fiber->key];
  if (memory == nullptr) {
    block.shared_bytes += fiber->bytes;
    if (block.shared_bytes > kSharedBytes) {
      fail(*fiber, std::to_string(block.shared_bytes) + " bytes of shared memory, at most " +
                       std::to_string(kSharedBytes) + " (" + describe(fiber->site) + ")");
    }
    // Exactly as long as it was asked for, so that AddressSanitizer sees its end.
    if (posix_memalign(reinterpret_cast<void**>(&memory), 128, std::max<size_t>(1, fiber->bytes)) != 0) {
      throw std::bad_alloc();
    }
    std::fill_n(memory, fiber->bytes, static_cast<char>(0xff));
    launching->allocated.push_back(memory);
  }
  fiber->memory = memory;
  order({}, {fiber});
  launching->ready.push_back(fiber);
}

// Once the last thread has come: all go on. A thread that has returned never comes.
void check_barrier(Block& block) {
  if (block.at_barrier == 0 || block.at_barrier + block.done < block.fibers.size()) return;
  const Fiber* first = nullptr;
  for (const Fiber* fiber : block.fibers) {
    if (fiber->wait == Wait::kBarrier) first = fiber;
  }
  uint32_t count = 0;
  for (const Fiber* fiber : block.fibers) {
    if (fiber->wait == Wait::kDone) {
      fail(*fiber, "returned, but others of its block wait in " + describe(first->site) + ": divergent barrier");
    }
    if (fiber->site.line != first->site.line || std::strcmp(fiber->site.file, first->site.file) != 0) {
      fail(*fiber, "waits in " + describe(fiber->site) + ", others of its block in " + describe(first->site) +
                       ": divergent barrier");
    }
    count += fiber->predicate;
  }
  order(block.fibers, block.fibers);
  block.at_barrier = 0;
  for (Fiber* fiber : block.fibers) {
    fiber->answer = count;
    fiber->wait = Wait::kNothing;
    launching->ready.push_back(fiber);
  }
}

bool in_warp(Wait wait) { return wait == Wait::kWarp || wait == Wait::kVote; }

std::string of_mask(const Fiber& fiber) {
  char text[32];
  std::snprintf(text, sizeof text, "the mask 0x%08x", fiber.mask);
  return text;
}

// Whether all lanes of the mask are there for the same operation.
bool is_complete(Fiber* last, std::vector<Fiber*>& threads) {
  Block& block = *last->block;
  const size_t first = last->index / 32 * 32;
  bool complete = true;
  for (int lane = 0; lane < 32; ++lane) {
    const size_t index = first + lane;
    if (!(last->mask >> lane & 1)) continue;
    if (index >= block.fibers.size()) {
      fail(*last, describe(last->site) + ": " + of_mask(*last) + " names lane " + std::to_string(lane) +
                      ", which the block does not have");
    }
    Fiber* fiber = block.fibers[index];
    if (fiber->wait == Wait::kDone) {
      fail(*last, describe(last->site) + ": " + of_mask(*last) + " names lane " + std::to_string(lane) +
                      ", which has returned");
    }
    threads.push_back(fiber);
    if (!in_warp(fiber->wait)) {
      complete = false;
      continue;
    }
    if (fiber->mask != last->mask || fiber->site.line != last->site.line ||
        std::strcmp(fiber->site.operation, last->site.operation) != 0) {
      fail(*last, describe(last->site) + " with " + of_mask(*last) + ", but lane " + std::to_string(lane) + " is in " +
                      describe(fiber->site) + " with " + of_mask(*fiber) + ": divergent warp operation");
    }
  }
  return complete;
}

void check_warp(Fiber* last) {
  static std::vector<Fiber*> threads;
  Block& block = *last->block;
  const size_t warp = last->index / 32;
  if (!(last->mask >> (last->index % 32) & 1)) {
    fail(*last, describe(last->site) + ": " + of_mask(*last) + " does not name the thread itself");
  }
  if (++block.in_warp[warp] < __builtin_popcount(last->mask)) return;  // some are still to come
  threads.clear();
  if (!is_complete(last, threads)) return;
  block.in_warp[warp] -= static_cast<int>(threads.size());
  uint32_t votes = 0;
  for (const Fiber* fiber : threads) votes |= static_cast<uint32_t>(fiber->predicate) << fiber->index % 32;
  for (Fiber* fiber : threads) {
    fiber->answer = votes;
    if (fiber->wait == Wait::kVote) continue;
    if (fiber->source < 0 || fiber->source > 31 || !(last->mask >> fiber->source & 1)) {
      fail(*fiber, describe(fiber->site) + ": reads lane " + std::to_string(fiber->source) + ", which " +
                       of_mask(*fiber) + " does not name");
    }
    const Fiber* source = block.fibers[warp * 32 + fiber->source];
    for (int i = 0; i < kSlot; ++i) fiber->got[i] = source->given[i];
  }
  if (last->ordered) order(threads, threads);
  for (Fiber* fiber : threads) {
    fiber->wait = Wait::kNothing;
    launching->ready.push_back(fiber);
  }
}

// Nobody can go on, but not all have returned: that is because lanes of a mask do not come.
[[noreturn]] void deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
  std::vector<Fiber*> threads;
  for (const auto& block : blocks) {
    for (Fiber* fiber : block->fibers) {
      if (!in_warp(fiber->wait)) continue;
      is_complete(fiber, threads);
      fail(*fiber, "waits for ever for the lanes of " + of_mask(*fiber) + " in " + describe(fiber->site));
    }
  }
  throw std::logic_error("simt: nobody runs and nobody waits");
}

void check_limits(const char* kernel, dim3 grid, dim3 block) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  const bool fits = grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
                    grid.z <= 65535 && threads >= 1 && threads <= kBlockThreads && block.z <= 64;
  if (!fits) {
    throw std::runtime_error(
        std::string("simt: kernel ") + kernel + ": invalid configuration, grid " + describe({grid.x, grid.y, grid.z}) +
        ", block " + describe({block.x, block.y, block.z}));
  }
}

std::unique_ptr<Block> start_block(uint64_t number) {
  auto block = std::make_unique<Block>();
  block->index = {
      unsigned(number % gridDim.x), unsigned(number / gridDim.x % gridDim.y), unsigned(number / gridDim.x / gridDim.y)};
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber* fiber = take_fiber();
    fiber->block = block.get();
    fiber->thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber->index = i;
    block->fibers.push_back(fiber);
    launching->ready.push_back(fiber);
    launching->started.push_back(fiber);
  }
  block->in_warp.resize((threads + 31) / 32);
  order({}, block->fibers);
  return block;
}

void run_grid() {
  std::vector<uint64_t> numbers(uint64_t(gridDim.x) * gridDim.y * gridDim.z);
  for (size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = i;
    std::swap(numbers[i], numbers[random(i + 1)]);
  }
  const size_t together = 1 + random(4);  // blocks that run at the same time
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Fiber*>& ready = launching->ready;
  size_t running_blocks = 0;
  while (true) {
    while (running_blocks < together && !numbers.empty()) {
      blocks.push_back(start_block(numbers.back()));
      numbers.pop_back();
      ++running_blocks;
    }
    if (running_blocks == 0) break;
    if (ready.empty()) deadlock(blocks);
    std::swap(ready[random(ready.size())], ready.back());
    Fiber* fiber = ready.back();
    ready.pop_back();
    run(fiber);
    Block& block = *fiber->block;
    if (fiber->wait == Wait::kShared) give_memory(fiber);
    if (in_warp(fiber->wait)) check_warp(fiber);
    if (fiber->wait == Wait::kBarrier) ++block.at_barrier, check_barrier(block);
    if (fiber->wait == Wait::kDone) {
      ++block.done;
      check_barrier(block);
      if (block.done == block.fibers.size()) {
        --running_blocks;
#if !defined(SIMT_TSAN)  // there the threads of all blocks stay apart until the launch is over
        idle.insert(idle.end(), block.fibers.begin(), block.fibers.end());
        std::erase_if(blocks, [&](const auto& other) { return other.get() == &block; });
#endif
      }
    }
  }
}

}  // namespace

void seed(uint64_t seed) { random_state = seed * 0x9e3779b97f4a7c15ull | 1; }

int lane() { return running->index % 32; }

void (*observer)(const Observed*) = nullptr;

static int64_t launched = 0;

int64_t launches() { return launched; }

void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, void (*call)(const void*), const void* body) {
  check_limits(kernel, grid, block);
  ++launched;
#if defined(SIMT_TSAN)
  host_identity = __tsan_get_current_fiber();
#endif
  Launch launch;
  launch.kernel = kernel;
  launch.call = call;
  launch.body = body;
  launch.dynamic_bytes = dynamic_bytes;
  launching = &launch;
  gridDim = grid;
  blockDim = block;
  const auto finish = [&] {
    order(launch.started, {});
    for (char* memory : launch.allocated) std::free(memory);
    idle.clear();
    for (const auto& fiber : all_fibers) idle.push_back(fiber.get());  // after an error they are left where they stand
    launching = nullptr;
  };
  try {
    run_grid();
  } catch (...) {
    finish();
    throw;
  }
  finish();
}

void* shared_memory(const void* key, size_t bytes, const Site& site) {
  Fiber* fiber = running;
  fiber->key = key;
  fiber->bytes = bytes;
  fiber->site = site;
  wait(Wait::kShared);
  return fiber->memory;
}

void* dynamic_shared_memory(const Site& site) { return shared_memory(nullptr, launching->dynamic_bytes, site); }

int block_barrier(bool predicate, const Site& site) {
  Fiber* fiber = running;
  fiber->predicate = predicate;
  fiber->site = site;
  wait(Wait::kBarrier);
  return static_cast<int>(fiber->answer);
}

void warp_exchange(
    uint32_t mask, int source, const void* value, void* result, size_t bytes, bool ordered, const Site& site) {
  Fiber* fiber = running;
  fiber->mask = mask;
  fiber->source = source;
  fiber->predicate = false;
  fiber->ordered = ordered;
  fiber->site = site;
  std::memcpy(fiber->given, value, bytes);
  wait(Wait::kWarp);
  std::memcpy(result, fiber->got, bytes);
}

uint32_t warp_vote(uint32_t mask, bool predicate, const Site& site) {
  Fiber* fiber = running;
  fiber->mask = mask;
  fiber->predicate = predicate;
  fiber->ordered = false;
  fiber->site = site;
  wait(Wait::kVote);
  return fiber->answer;
}

}  // namespace simt
