// Kernels that are broken on purpose, each beside what is right, and which of the shim's layers must say so. Run as
// `broken NAME SEED`; exit status 0 means that nothing was noticed and that the result was right.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include "launch.h"

namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 3;
constexpr unsigned kAll = 0xffffffffu;

enum class Fault {
  kNone,
  kMissingBarrier,
  kMissingBarrierBetweenUses,
  kDivergentBarrier,
  kEarlyReturn,
  kWrongMask,
  kDivergentShuffle,
  kLaneOutsideMask,
  kMissingSyncwarp,
  kSharedOutOfBounds,
  kGlobalOutOfBounds,
  kGlobalWriteOutOfBounds,
  kUninitialisedShared,
  kMisalignedVector,
  kBlockRace,
  kBlockOrder,
  kTooManyThreads,
};

__device__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAll, x, lanes);
  return x;
}

// sums[block] = sum of the block's row of `rows` [kBlocks, kThreads], twice over, each time through shared memory.
template <Fault fault>
__global__ void row_sums(const float* __restrict__ rows, float* __restrict__ sums) {
  AMN_SHARED(float, partial, kThreads);
  const int i = threadIdx.x, lane = i % 32;
  const float* row = rows + blockIdx.x * kThreads;
  if (fault == Fault::kEarlyReturn && i == 5) return;

  const int read = fault == Fault::kGlobalOutOfBounds && blockIdx.x == kBlocks - 1 ? i + 1 : i;
  const int place = fault == Fault::kSharedOutOfBounds ? i + 1 : i;
  if (!(fault == Fault::kUninitialisedShared && i == 7)) partial[place] = row[read];
  if (fault == Fault::kDivergentBarrier && i < 32) {
    __syncthreads();
  } else if (fault != Fault::kMissingBarrier) {
    __syncthreads();
  }
  float x = partial[kThreads - 1 - i];
  if (fault != Fault::kMissingBarrierBetweenUses) __syncthreads();

  if (fault == Fault::kWrongMask) {
    x += __shfl_xor_sync(0xffffu, x, 16);
  } else if (fault == Fault::kDivergentShuffle) {
    if (lane < 16) x += __shfl_xor_sync(kAll, x, 8);
  } else if (fault == Fault::kLaneOutsideMask) {
    x += __shfl_xor_sync(lane < 16 ? 0xffffu : 0xffff0000u, x, 16);
  }
  x = warp_sum(x);
  partial[i] = lane == 0 ? x : 0;
  if (fault != Fault::kMissingSyncwarp) __syncwarp();
  x = partial[i / 32 * 32];
  __syncthreads();
  partial[i] = x;
  __syncthreads();
  if (i != 0) return;
  x = partial[0] + partial[32];
  const int out = fault == Fault::kBlockRace ? 0 : blockIdx.x;
  sums[fault == Fault::kGlobalWriteOutOfBounds ? out + kBlocks : out] = x;
}

// copy = rows, four at a time; `sums` of the block before is read where blocks are taken to be in order.
template <Fault fault>
__global__ void copy_rows(const float* __restrict__ rows, float* copy) {
  const int i = blockIdx.x * kThreads + 4 * threadIdx.x + (fault == Fault::kMisalignedVector && blockIdx.x == 0);
  const float4 x = *reinterpret_cast<const float4*>(rows + i);
  copy[i] = x.x, copy[i + 1] = x.y, copy[i + 2] = x.z, copy[i + 3] = x.w;
  if (fault == Fault::kBlockOrder && blockIdx.x > 0) copy[i] += copy[i - kThreads];
}

template <Fault fault>
int run() {
  std::vector<float> rows(kBlocks * kThreads), sums(kBlocks), copy(kBlocks * kThreads);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i % 7);
  const int threads = fault == Fault::kTooManyThreads ? 2048 : kThreads;
  AMN_LAUNCH(row_sums<fault>, kBlocks, threads, 0, nullptr, rows.data(), sums.data());
  AMN_LAUNCH(copy_rows<fault>, kBlocks, kThreads / 4, 0, nullptr, rows.data(), copy.data());
  bool right = rows == copy;
  for (int block = 0; block < kBlocks; ++block) {
    float sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += rows[block * kThreads + i];
    right = right && sums[block] == sum;
  }
  if (!right) std::fprintf(stderr, "simt: wrong result\n");
  return right ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const auto named = [&](const char* name) { return std::strcmp(arguments[1], name) == 0; };
  simt::seed(std::strtoull(arguments[2], nullptr, 10));
  try {
    if (named("none")) return run<Fault::kNone>();
    if (named("missing barrier")) return run<Fault::kMissingBarrier>();
    if (named("missing barrier between uses")) return run<Fault::kMissingBarrierBetweenUses>();
    if (named("divergent barrier")) return run<Fault::kDivergentBarrier>();
    if (named("early return")) return run<Fault::kEarlyReturn>();
    if (named("wrong mask")) return run<Fault::kWrongMask>();
    if (named("divergent shuffle")) return run<Fault::kDivergentShuffle>();
    if (named("lane outside the mask")) return run<Fault::kLaneOutsideMask>();
    if (named("missing syncwarp")) return run<Fault::kMissingSyncwarp>();
    if (named("shared out of bounds")) return run<Fault::kSharedOutOfBounds>();
    if (named("global out of bounds")) return run<Fault::kGlobalOutOfBounds>();
    if (named("global write out of bounds")) return run<Fault::kGlobalWriteOutOfBounds>();
    if (named("uninitialised shared")) return run<Fault::kUninitialisedShared>();
    if (named("misaligned vector")) return run<Fault::kMisalignedVector>();
    if (named("block race")) return run<Fault::kBlockRace>();
    if (named("block order")) return run<Fault::kBlockOrder>();
    if (named("too many threads")) return run<Fault::kTooManyThreads>();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::fprintf(stderr, "no kernel named %s\n", arguments[1]);
  return 2;
}
