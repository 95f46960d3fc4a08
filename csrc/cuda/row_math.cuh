// The numbers of a row: twin of the functions of that name in csrc/cpu/scalars.inl and rows.inl.
#pragma once

#include <cmath>
#include <limits>

#include "launchers.h"

namespace amn::cuda {

__device__ inline double& at(const Scalars& rows, int64_t scalar, int64_t row) {
  return rows.data[scalar * rows.stride + row];
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// 0 for a zero vector; NaN for a norm that is not finite, so that it can't pass for a zero vector.
__device__ inline double inverse_norm(double square) {
  const double norm = sqrt(square);
  if (norm < kEps) return 0;
  return norm < kInfinity ? 1 / norm : kNan;
}

// Whether d = p - t keeps the digits of both vectors; `excess` is (|p| - |t|)/|t|.
__device__ inline bool similar_norms(double excess) { return fabs(excess) < 0.5; }

// Row i counts: it is not masked. NaN, which a weight never is, would count.
__device__ inline bool counts(const Scalars& rows, int64_t i) { return !(at(rows, kWeight, i) == 0); }

// Row i sends a gradient from cosine and InfoNCE.
__device__ inline bool sends(const Scalars& rows, int64_t i) {
  return counts(rows, i) && at(rows, kInvPred, i) != 0 && at(rows, kInvTarget, i) != 0;
}

__device__ inline double value_of(const Temperature& temperature) {
  if (temperature.learned == nullptr) return temperature.number;
  if (temperature.dtype == Dtype::kDouble) return *static_cast<const double*>(temperature.learned);
  return *static_cast<const float*>(temperature.learned);
}

__device__ inline double own_logit(const Scalars& rows, int64_t i, double temperature) {
  return (1 - at(rows, kOneMinusCos, i)) / temperature;
}

// Share of the others in a softmax: others / (others + own). Without any, max is -inf, own inf and the share 0.
__device__ inline double share_of_others(double max, double others, double own) {
  return others / (others + exp(own - max));
}

}  // namespace amn::cuda
