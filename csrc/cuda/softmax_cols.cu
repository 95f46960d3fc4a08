// softmax_cols, col_factors: the softmax over the rows of a column. A block has 32 columns and 8 threads for each,
// which take every eighth row; a warp reads a row of 32 columns.
#include "row_math.cuh"

namespace amn::cuda {
namespace {

constexpr int kWide = 32, kDeep = 8;  // of a block
constexpr int kStep = 8;              // rows that a thread takes at once

// Maximum, and sum of exp(s - maximum), over some rows of a column; and the sum of the s of its positives.
struct ColumnSums {
  double max, others, positives;

  __device__ void merge(double other_max, double other_sum) {
    const double now = max < other_max ? other_max : max;
    // Without a maximum the sum is 0, or NaN if there were but NaN.
    others = (max == -kInfinity ? others : others * exp(max - now)) +
             (other_max == -kInfinity ? other_sum : other_sum * exp(other_max - now));
    max = now;
  }
};

template <class Real>
__global__ void __launch_bounds__(kWide * kDeep) softmax_cols_kernel(
    Matrix logits, Scalars key_rows, int64_t cols, Pairs pairs, InfonceForm form) {
  constexpr Real kLowest = -kInfinity;
  AMN_SHARED(double, of_threads, 3 * kDeep * kWide);
  const int64_t tiles = (cols + kWide - 1) / kWide, group = blockIdx.x / tiles;
  const int64_t j = (blockIdx.x - group * tiles) * kWide + threadIdx.x;
  const Real* column = static_cast<const Real*>(logits.data) + group * logits.group_stride + j;
  const bool has_ids = form.positives_by_id && pairs.row_ids != nullptr && j < pairs.id_keys;
  const int64_t id = has_ids && j < cols ? pairs.key_ids[group * pairs.id_stride + j] : 0;
  ColumnSums sums{-kInfinity, 0, 0};
  for (int64_t top = threadIdx.y; j < cols && top < logits.rows; top += kDeep * kStep) {
    Real s[kStep], largest = kLowest, total = 0;
#pragma unroll
    for (int r = 0; r < kStep; ++r) {
      const int64_t i = top + r * kDeep;
      s[r] = i < logits.rows ? column[i * logits.row_stride] : kLowest;
      largest = largest < s[r] ? s[r] : largest;
    }
#pragma unroll
    for (int r = 0; r < kStep; ++r) {
      const int64_t i = top + r * kDeep;
      if (s[r] == kLowest) continue;
      total += exp(s[r] - largest);
      if (has_ids && pairs.row_ids[group * logits.rows + i] == id) sums.positives += s[r];
    }
    sums.merge(largest, total);
  }
  const int at_thread = threadIdx.y * kWide + threadIdx.x, count = kDeep * kWide;
  of_threads[at_thread] = sums.max;
  of_threads[count + at_thread] = sums.others;
  of_threads[2 * count + at_thread] = sums.positives;
  __syncthreads();
  if (threadIdx.y != 0 || j >= cols) return;
  const int64_t key = group * cols + j;
  ColumnSums column_sums{at(key_rows, kColMax, key), at(key_rows, kColOthers, key), 0};
  for (int d = 0; d < kDeep; ++d) {
    const int of = d * kWide + threadIdx.x;
    column_sums.merge(of_threads[of], of_threads[count + of]);
    column_sums.positives += of_threads[2 * count + of];
  }
  at(key_rows, kColMax, key) = column_sums.max;
  at(key_rows, kColOthers, key) = column_sums.others;
  if (has_ids) at(key_rows, kColPositiveSum, key) += column_sums.positives;
}

template <class Real>
__global__ void __launch_bounds__(kWide * kDeep) col_factors_kernel(
    Scalars rows, int64_t keys, Real* col_max, Real* col_factor, Temperature temperature) {
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= keys) return;
  const double own = own_logit(rows, j, value_of(temperature)), max = at(rows, kColMax, j);
  const double shift = max > own ? max : own;
  const double total = exp(own - shift) + at(rows, kColOthers, j) * exp(max - shift);
  col_max[j] = shift;
  col_factor[j] = sends(rows, j) ? 0.5 / total : 0.0;
}

}  // namespace

void softmax_cols(
    const Matrix& logits, const Scalars& key_rows, int64_t cols, const Pairs& pairs, const InfonceForm& form,
    cudaStream_t stream) {
  const int64_t blocks = logits.groups * ((cols + kWide - 1) / kWide);
  const dim3 grid(static_cast<unsigned>(blocks)), block(kWide, kDeep);
  if (logits.dtype == Dtype::kDouble) {
    AMN_LAUNCH(softmax_cols_kernel<double>, grid, block, 0, stream, logits, key_rows, cols, pairs, form);
  } else {
    AMN_LAUNCH(softmax_cols_kernel<float>, grid, block, 0, stream, logits, key_rows, cols, pairs, form);
  }
}

void col_factors(
    const Scalars& key_rows, int64_t keys, const Matrix& col_max, const Matrix& col_factor,
    const Temperature& temperature, cudaStream_t stream) {
  constexpr int kBlock = kWide * kDeep;
  const dim3 grid(static_cast<unsigned>((keys + kBlock - 1) / kBlock));
  const auto launch = [&]<class Real>() {
    AMN_LAUNCH(
        col_factors_kernel<Real>, grid, dim3(kBlock), 0, stream, key_rows, keys, static_cast<Real*>(col_max.data),
        static_cast<Real*>(col_factor.data), temperature);
  };
  col_max.dtype == Dtype::kDouble ? launch.template operator()<double>() : launch.template operator()<float>();
}

}  // namespace amn::cuda
