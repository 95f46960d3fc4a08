// Counts the bytes that kernels load and store. The kernels of this build are compiled with -fsanitize=thread, for which
// the compiler calls a function at every access to memory: here are these functions, in place of ThreadSanitizer's.
// Accesses are those that g++ leaves at -O1: a value that is held in a register is not loaded again.
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "simt.h"

namespace {

using Bytes = std::vector<bool>;  // which of a piece of memory

// What is read of a piece of memory by the running launch, or written.
struct Traffic {
  int64_t accessed = 0, of_blocks = 0, distinct = 0;
  Bytes seen;
  std::unordered_map<uint64_t, Bytes> seen_by_block;

  void add(uint64_t block, size_t first, size_t end, size_t size) {
    Bytes& by_block = seen_by_block[block];
    by_block.resize(size);
    seen.resize(size);
    for (size_t i = first; i < end; ++i) {
      ++accessed;
      if (!by_block[i]) ++of_blocks, by_block[i] = true;
      if (!seen[i]) ++distinct, seen[i] = true;
    }
  }
};

struct Piece {
  uintptr_t begin, end;
  Traffic read, written;
};

// There from the first access on to the last: those of static objects' constructors and destructors come here too.
std::vector<Piece>& pieces() {
  static auto* const all = new std::vector<Piece>;
  return *all;
}

void see(const void* address, size_t bytes, bool writes) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  for (Piece& piece : pieces()) {
    if (at < piece.begin || at >= piece.end) continue;
    const uint64_t block = blockIdx.x + uint64_t{gridDim.x} * (blockIdx.y + uint64_t{gridDim.y} * blockIdx.z);
    const size_t first = at - piece.begin;
    (writes ? piece.written : piece.read).add(block, first, first + bytes, piece.end - piece.begin);
    return;
  }
}

}  // namespace

extern "C" {

// From now on accesses to these `count` pieces of memory are counted; ends: first and last address of each.
void simt_watch(const size_t* ends, size_t count) {
  pieces().clear();
  for (size_t i = 0; i < count; ++i) pieces().push_back({ends[2 * i], ends[2 * i + 1], {}, {}});
}

// Accessed, of blocks and distinct, read and then written, of each piece; counting starts anew.
void simt_take_counts(int64_t* out) {
  for (Piece& piece : pieces()) {
    for (Traffic* traffic : {&piece.read, &piece.written}) {
      for (const int64_t x : {traffic->accessed, traffic->of_blocks, traffic->distinct}) *out++ = x;
      *traffic = {};
    }
  }
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* x, size_t bytes) { see(x, bytes, false); }
void __tsan_write_range(void* x, size_t bytes) { see(x, bytes, true); }
#define SIMT_ACCESS(bytes)                                             \
  void __tsan_read##bytes(void* x) { see(x, bytes, false); }           \
  void __tsan_write##bytes(void* x) { see(x, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* x) { see(x, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* x) { see(x, bytes, true); }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
#undef SIMT_ACCESS

}  // extern "C"
