// A launch: its limits, shared memory, and blocks and threads in random order.
#include "simt.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>

#include "scheduler.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Launch* launching = nullptr;

static std::string describe(uint3 x) {
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

namespace {

constexpr size_t kSharedBytes = 48 << 10;  // what a kernel gets without asking for more
constexpr size_t kBlockThreads = 1024;

uint64_t random_state = 1;

uint64_t random(uint64_t below) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * 0x2545f4914f6cdd1dull >> 32) % below;
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
    if (in_warp(fiber->wait)) at_warp_operation(fiber);
    if (fiber->wait == Wait::kBarrier) at_barrier(fiber);
    if (fiber->wait == Wait::kDone) {
      at_return(fiber);
      if (block.done == block.fibers.size()) {
        --running_blocks;
#if !defined(SIMT_TSAN)  // there the threads of all blocks stay apart until the launch is over
        give_back(block.fibers);
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
  begin_fibers();
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
    give_back_all();
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

}  // namespace simt
