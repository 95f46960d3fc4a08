// A team of threads works on one row at a time; a block has several teams, so that several rows are in flight.
//
// Blocks have the shape (threads of a team, teams). Sums over a team are added in a fixed order: shuffles within a
// warp in the dtype that is computed in, then the warps one after the other in float64.
#pragma once

#include "launchers.h"
#include "pack.cuh"

namespace amn::cuda {

constexpr int kThreads = 256;      // of a block, unless a team is larger
constexpr int kTeamLimit = 512;    // threads
constexpr int kSmallestTeam = 8;
constexpr int64_t kGridLimit = 1 << 16;  // blocks; further rows are taken in turns
constexpr int kMaxSums = 9;  // that are formed at once

// What a kernel over rows is launched with.
struct Teams {
  dim3 grid, block;
};

// Teams for `rows` rows of `cols` elements: a thread has one pack of a row of up to 4,096 elements (2,048 in float64).
template <class L>
Teams teams_for(int64_t rows, int64_t cols) {
  unsigned team = kSmallestTeam;
  while (team < kTeamLimit && team * int64_t{L::kPack} < cols) team *= 2;
  const unsigned teams = team < kThreads ? kThreads / team : 1;
  const int64_t blocks = (rows + teams - 1) / teams;
  return {dim3(static_cast<unsigned>(blocks < kGridLimit ? blocks : kGridLimit)), dim3(team, teams)};
}

// Calls f(row, is_row) for the rows of the block's teams. Every thread makes the same number of calls, so that f may
// have barriers; a team that has run out of rows makes them with is_row = false.
template <class F>
__device__ inline void for_rows(int64_t rows, const F& f) {
#pragma unroll 1
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < rows; first += int64_t{gridDim.x} * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    f(row, row < rows);
  }
}

// Shared memory for the sums and maxima of teams of more than a warp.
struct TeamMemory {
  double (*slots)[kMaxSums];  // one for each warp of the block
};
constexpr int kWarpsLimit = kTeamLimit / 32;
#define AMN_TEAM_MEMORY(name)                                             \
  AMN_SHARED(double, name##_slots, amn::cuda::kWarpsLimit * amn::cuda::kMaxSums); \
  const amn::cuda::TeamMemory name { reinterpret_cast<double(*)[amn::cuda::kMaxSums]>(name##_slots) }

__device__ inline int lanes_of_team() { return blockDim.x < 32 ? blockDim.x : 32; }

// Combines x over the team, `combine` for two numbers, into `out`, the same for all threads of the team. All threads of
// the block must call it.
template <int kCount, class Real, class F>
__device__ inline void reduce_team(
    const Real (&x)[kCount], double (&out)[kCount], const TeamMemory& memory, const F& combine) {
  static_assert(kCount <= kMaxSums);
  Real lane[kCount];
#pragma unroll
  for (int q = 0; q < kCount; ++q) lane[q] = x[q];
#pragma unroll 1
  for (int offset = lanes_of_team() / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int q = 0; q < kCount; ++q) lane[q] = combine(lane[q], __shfl_xor_sync(0xffffffffu, lane[q], offset));
  }
#pragma unroll
  for (int q = 0; q < kCount; ++q) out[q] = lane[q];
  if (blockDim.x <= 32) return;
  const int warps = blockDim.x / 32, first = threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int q = 0; q < kCount; ++q) memory.slots[first + threadIdx.x / 32][q] = lane[q];
  }
  __syncthreads();
#pragma unroll
  for (int q = 0; q < kCount; ++q) {
    out[q] = memory.slots[first][q];
#pragma unroll 1
    for (int w = 1; w < warps; ++w) out[q] = combine(out[q], memory.slots[first + w][q]);
  }
  __syncthreads();  // the slots are used again
}

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
// A NaN on either side is lost, as with a comparison: it shows in the sums.
struct Larger {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

template <int kCount, class Real>
__device__ inline void sum_team(const Real (&x)[kCount], double (&out)[kCount], const TeamMemory& memory) {
  reduce_team(x, out, memory, Add{});
}

}  // namespace amn::cuda
