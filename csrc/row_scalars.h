// The per-row numbers that the primitives share; free of torch, so that kernels can include it.
#pragma once

#include <cstdint>

namespace amn {

constexpr double kEps = 1e-8;  // a norm below this counts as zero

// Per-row scalars, float64 [kRowScalars, N]: a few numbers a row, so their precision is free.
enum RowScalar : int64_t {
  kInvPred,      // 1/|p|, or 0 for a zero vector
  kInvTarget,    // 1/|t|, or 0
  kExcess,       // (|p| - |t|)/|t|, summed from d: does not cancel for p near t
  kOneMinusCos,  // |p/|p| - t/|t||^2 / 2, or 1 where either is a zero vector
  kPredPred,     // p.p
  kTargetTarget, // t.t
  kDiffDiff,     // d.d
  kPredDiff,     // p.d
  kMax,          // max over the other keys of s_ij = cos(p_i, k_j) / temperature; -inf without any
  kOthers,       // sum over the other keys of exp(s_ij - max)
  kPredAtt,      // p.o
  kDiffAtt,      // d.o
  kAttAtt,       // o.o
  kRowScalars,
};

}  // namespace amn
