// What the threads of a block do together: barriers, shuffles and votes, with the checks that all are there who must be.
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "scheduler.h"

namespace simt {
namespace {

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

}  // namespace

void at_barrier(Fiber* fiber) {
  ++fiber->block->at_barrier;
  check_barrier(*fiber->block);
}

void at_return(Fiber* fiber) {
  ++fiber->block->done;
  check_barrier(*fiber->block);
}

void at_warp_operation(Fiber* last) {
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
