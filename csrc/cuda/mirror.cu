// mirror_rows, mirror_columns: scalars with pred and target exchanged. One thread a row or column.
#include "row_math.cuh"

namespace amn::cuda {
namespace {

constexpr int kMirrorThreads = 128;

__global__ void __launch_bounds__(kMirrorThreads) mirror_rows_kernel(Scalars from, Scalars to, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kMirrorThreads + threadIdx.x;
  if (i >= count) return;
  for (const RowScalar same :
       {kWeight, kOneMinusCos, kDiffDiff, kMax, kOthers, kKeys, kColMax, kColOthers, kPositives, kPositiveSum}) {
    at(to, same, i) = at(from, same, i);
  }
  const double inv_pred = at(from, kInvPred, i), inv_target = at(from, kInvTarget, i);
  at(to, kInvPred, i) = inv_target;
  at(to, kInvTarget, i) = inv_pred;
  at(to, kPredPred, i) = at(from, kTargetTarget, i);
  at(to, kTargetTarget, i) = at(from, kPredPred, i);
  at(to, kPredDiff, i) = at(from, kDiffDiff, i) - at(from, kPredDiff, i);  // t.(t - p) = d.d - p.d
  // (|t| - |p|)/|p|; without both norms nothing reads it.
  at(to, kExcess, i) = inv_target != 0 ? -at(from, kExcess, i) * inv_pred / inv_target : 0;
  at(to, kPredSpread, i) = 0;
  at(to, kPredAtt, i) = 0;
}

template <class Real>
__global__ void __launch_bounds__(kMirrorThreads) mirror_columns_kernel(Matrix columns, Matrix mirrored) {
  const int64_t k = int64_t{blockIdx.x} * kMirrorThreads + threadIdx.x;
  if (k >= columns.cols) return;
  const Real* from = static_cast<const Real*>(columns.data) + k;
  Real* to = static_cast<Real*>(mirrored.data) + k;
  const int64_t in = columns.row_stride, out = mirrored.row_stride;
  to[kMomentA * out] = -from[kMomentA * in];
  to[kMomentC * out] = -from[kMomentCTarget * in];
  to[kMomentPred * out] = from[kMomentTarget * in];
  to[kMomentCTarget * out] = -from[kMomentC * in];
  to[kMomentTarget * out] = from[kMomentPred * in];
  to[kVarianceV * out] = 0;
  to[kVarianceUnit * out] = 0;
}

dim3 grid_for(int64_t count) { return dim3(static_cast<unsigned>((count + kMirrorThreads - 1) / kMirrorThreads)); }

}  // namespace

void mirror_rows(const Scalars& rows, const Scalars& mirrored, int64_t count, cudaStream_t stream) {
  AMN_LAUNCH(mirror_rows_kernel, grid_for(count), dim3(kMirrorThreads), 0, stream, rows, mirrored, count);
}

void mirror_columns(const Matrix& columns, const Matrix& mirrored, cudaStream_t stream) {
  if (columns.dtype == Dtype::kDouble) {
    AMN_LAUNCH(
        mirror_columns_kernel<double>, grid_for(columns.cols), dim3(kMirrorThreads), 0, stream, columns, mirrored);
  } else {
    AMN_LAUNCH(
        mirror_columns_kernel<float>, grid_for(columns.cols), dim3(kMirrorThreads), 0, stream, columns, mirrored);
  }
}

}  // namespace amn::cuda
