// CUDA kernels on the CPU: what csrc/cuda/launch.h includes in place of cuda_runtime.h under -DAMN_SIMT. One fiber per
// CUDA thread; the scheduler (scheduler.h) runs the fibers of a few blocks at a time in seeded random order.
//
// A test instrument, to find errors and not to be quick. What it checks, and by which build:
//   all builds    every thread of a block reaches the same __syncthreads; every thread named in a mask reaches the same
//                 warp operation with the same mask; no lane is read that is not in the mask; launch limits; shared
//                 memory starts as NaN (all bits one), so that what was never written shows in the result
//   SIMT_ASAN     AddressSanitizer: accesses beyond shared and global arrays; alignment of vector accesses and other
//                 undefined behaviour (UBSan)
//   SIMT_TSAN     ThreadSanitizer: races. Order comes from __syncthreads and __syncwarp within a block, and from launch
//                 and end of a kernel; shuffles and votes order nothing, and nothing orders blocks
//
// What it does not model: weak memory beyond that (fences are not provided, atomics are relaxed), the schedules and the
// timing of a GPU, convergence without a mask (warp operations of the same threads must be at one place in the source),
// constant memory, textures, inline PTX, cooperative groups, clusters, dynamic parallelism. Arithmetic is that of the
// CPU: no fused multiply-add across statements, exact division and exponentials where a GPU approximates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <typeinfo>

#include "cuda_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

// Of the running thread; the scheduler sets them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

// Where in the source a thread waits.
struct Site {
  const char* operation;
  const char* file;
  int line;
};

constexpr int kSlot = 16;  // bytes that one thread can hand to another in a shuffle

void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, void (*call)(const void*), const void* body);
void* shared_memory(const void* key, size_t bytes, const Site& site);
void* dynamic_shared_memory(const Site& site);
// The number of threads of the block with a true predicate, once all have come.
int block_barrier(bool predicate, const Site& site);
// The value of lane `source` once all of `mask` have come; ordered says whether that orders memory.
void warp_exchange(uint32_t mask, int source, const void* value, void* result, size_t bytes, bool ordered, const Site& site);
uint32_t warp_vote(uint32_t mask, bool predicate, const Site& site);
int lane();

void seed(uint64_t seed);
int64_t launches();  // of kernels, so far

// What an observer is told of a launch before it runs: `instance` is the mangled name of Instance<kernel>, template
// arguments included, and the parameters are the bytes that a kernel would get on the device.
struct Observed {
  const char* instance;
  dim3 grid, block;
  size_t count;
  const void* const* parameters;
  const size_t* sizes;
};
extern void (*observer)(const Observed*);  // null: there is none

template <auto kernel>
struct Instance {};

// As on the device the parameters are copied at the launch, converted to what the kernel declares.
template <auto kernel, class... Parameters, class... Arguments>
void launch(
    void (*)(Parameters...), const char* name, dim3 grid, dim3 block, size_t dynamic_bytes, const Arguments&... arguments) {
  const std::tuple<Parameters...> parameters(arguments...);
  if (observer != nullptr) {
    std::apply(
        [&](const Parameters&... each) {
          const void* const values[] = {&each...};
          const size_t sizes[] = {sizeof each...};
          const Observed launch{typeid(Instance<kernel>).name(), grid, block, sizeof...(each), values, sizes};
          observer(&launch);
        },
        parameters);
  }
  const auto call = [](const void* given) {
    std::apply(kernel, *static_cast<const std::tuple<Parameters...>*>(given));
  };
  launch(name, grid, block, dynamic_bytes, call, &parameters);
}

}  // namespace simt

// The places below are those of the caller: gcc's default arguments.
#define SIMT_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_SITE(operation) \
  simt::Site { operation, file, line }

inline void __syncthreads(SIMT_PLACE) { simt::block_barrier(false, SIMT_SITE("__syncthreads")); }
inline int __syncthreads_count(int predicate, SIMT_PLACE) {
  return simt::block_barrier(predicate, SIMT_SITE("__syncthreads_count"));
}
inline int __syncthreads_or(int predicate, SIMT_PLACE) {
  return simt::block_barrier(predicate, SIMT_SITE("__syncthreads_or")) > 0;
}
inline int __syncthreads_and(int predicate, SIMT_PLACE) {
  return simt::block_barrier(!predicate, SIMT_SITE("__syncthreads_and")) == 0;
}

inline void __syncwarp(uint32_t mask = 0xffffffffu, SIMT_PLACE) {
  char nothing = 0;
  simt::warp_exchange(mask, simt::lane(), &nothing, &nothing, 1, true, SIMT_SITE("__syncwarp"));
}

namespace simt {

template <class T>
T shuffle(uint32_t mask, T value, int source, const Site& site) {
  static_assert(sizeof(T) <= kSlot);
  T result;
  warp_exchange(mask, source, &value, &result, sizeof(T), false, site);
  return result;
}

}  // namespace simt

// Lanes of a segment of `width`: a source outside of it is the thread itself, as on the device.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, SIMT_PLACE) {
  const int first = simt::lane() & ~(width - 1);
  return simt::shuffle(mask, value, first + (source & (width - 1)), SIMT_SITE("__shfl_sync"));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, SIMT_PLACE) {
  const int own = simt::lane(), source = own ^ lanes;
  return simt::shuffle(mask, value, source < (own & ~(width - 1)) + width ? source : own, SIMT_SITE("__shfl_xor_sync"));
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_PLACE) {
  const int own = simt::lane(), source = own + static_cast<int>(delta);
  return simt::shuffle(mask, value, source < (own & ~(width - 1)) + width ? source : own, SIMT_SITE("__shfl_down_sync"));
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_PLACE) {
  const int own = simt::lane(), source = own - static_cast<int>(delta);
  return simt::shuffle(mask, value, source >= (own & ~(width - 1)) ? source : own, SIMT_SITE("__shfl_up_sync"));
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_PLACE) {
  return simt::warp_vote(mask, predicate, SIMT_SITE("__ballot_sync"));
}
inline int __any_sync(uint32_t mask, int predicate, SIMT_PLACE) {
  return simt::warp_vote(mask, predicate, SIMT_SITE("__any_sync")) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, SIMT_PLACE) {
  return simt::warp_vote(mask, predicate, SIMT_SITE("__all_sync")) == mask;
}

#undef SIMT_PLACE
#undef SIMT_SITE

// The macros of launch.h. A static array is one per block and place in the source (and instance of a template), as on
// the device.
#define AMN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), simt::launch<(kernel)>(kernel, #kernel, grid, block, shared_bytes, __VA_ARGS__))
#define AMN_SHARED(type, name, count)                                                                   \
  static const char name##_key = 0;                                                                     \
  type* const name = static_cast<type*>(simt::shared_memory(                                            \
      &name##_key, sizeof(type) * (count), simt::Site{"__shared__ " #name, __FILE__, __LINE__}))

// Relaxed, as on the device. Integers alone: the order of float atomics is not deterministic, and no kernel has one.
#define SIMT_ATOMIC(T)                                                                              \
  inline T atomicAdd(T* x, T y) { return __atomic_fetch_add(x, y, __ATOMIC_RELAXED); }              \
  inline T atomicSub(T* x, T y) { return __atomic_fetch_sub(x, y, __ATOMIC_RELAXED); }              \
  inline T atomicOr(T* x, T y) { return __atomic_fetch_or(x, y, __ATOMIC_RELAXED); }                \
  inline T atomicAnd(T* x, T y) { return __atomic_fetch_and(x, y, __ATOMIC_RELAXED); }              \
  inline T atomicExch(T* x, T y) { return __atomic_exchange_n(x, y, __ATOMIC_RELAXED); }            \
  inline T atomicCAS(T* x, T expected, T y) {                                                       \
    __atomic_compare_exchange_n(x, &expected, y, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);        \
    return expected;                                                                                \
  }                                                                                                 \
  inline T atomicMax(T* x, T y) {                                                                   \
    T old = __atomic_load_n(x, __ATOMIC_RELAXED);                                                   \
    while (old < y && !__atomic_compare_exchange_n(x, &old, y, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                               \
    return old;                                                                                     \
  }
SIMT_ATOMIC(int)
SIMT_ATOMIC(unsigned)
SIMT_ATOMIC(unsigned long long)
#undef SIMT_ATOMIC
