// What the parts of the scheduler share: fibers.cpp switches between threads, collectives.cpp knows what threads of a
// block wait for together, simt.cpp runs a launch. All bookkeeping is done on the host's stack: a fiber only says what
// it waits for and switches to the host. Compiled without -fsanitize, whose runtimes are told of every switch instead.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

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

// simt.cpp
extern Launch* launching;
std::string describe(const Site& site);
[[noreturn]] void fail(const Fiber& fiber, const std::string& what);

// fibers.cpp
extern Fiber* running;
void begin_fibers();  // the caller is the host of a launch
Fiber* take_fiber();  // that runs the launch's kernel from its beginning
void give_back(const std::vector<Fiber*>& fibers);
void give_back_all();  // after an error they are left where they stand
void run(Fiber* fiber);  // until it waits
void wait(Wait what);  // on the fiber's stack: back to the host until it runs this fiber again
// What `from` did so far comes before what `to` does from now on; an empty list is the host.
#if defined(SIMT_TSAN)
void order(const std::vector<Fiber*>& from, const std::vector<Fiber*>& to);
#else
inline void order(const std::vector<Fiber*>&, const std::vector<Fiber*>&) {}
#endif

// collectives.cpp: each makes threads ready whose wait is over, and fails where it can't end.
void at_barrier(Fiber* fiber);
void at_warp_operation(Fiber* fiber);
void at_return(Fiber* fiber);
[[noreturn]] void deadlock(const std::vector<std::unique_ptr<Block>>& blocks);
inline bool in_warp(Wait wait) { return wait == Wait::kWarp || wait == Wait::kVote; }

}  // namespace simt
