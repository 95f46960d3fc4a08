// col_stats, col_terms, col_dots: what the moment and the variance term need of the columns.
//
// col_stats has two stages: a thread goes down its column over a part of the rows with running means and sums of
// products (Welford 1962), so that the rows are read once; then a thread per column merges the parts in order.
#include "columns.cuh"
#include "row_math.cuh"
#include "team.cuh"

namespace amn::cuda {
namespace {

constexpr int kColumnThreads = 128;
constexpr int64_t kLeastRows = 64, kMostParts = 256;
// Moments 0 ... kMeans - 1 are means, the others sums of products of these.
constexpr int kMeans = kPredPredS;
constexpr int kProducts = kMoments - kMeans;
constexpr int kPartNumbers = kMoments + 1;  // and the number of rows

// Moment kMeans + q is S(x, y), where the means of x and y are moments left(q) and right(q).
__device__ constexpr int left(int q) { return q < 3 ? q : q == 3 ? 2 : q - 1; }
__device__ constexpr int right(int q) { return q < 3 ? q : q == 3 ? 0 : q - 1; }

int64_t parts_of(int64_t rows) {
  const int64_t parts = (rows + kLeastRows - 1) / kLeastRows;
  return parts < kMostParts ? parts : kMostParts;
}

// One element of a matrix of any dtype.
template <class Real>
__device__ Real element(const Matrix& x, int64_t i, int64_t k) {
  const int64_t group = x.groups == 1 ? 0 : i / x.rows;
  const int64_t offset = group * x.group_stride + (i - group * x.rows) * x.row_stride + k;
  switch (x.dtype) {
    case Dtype::kFloat:
      return static_cast<const float*>(x.data)[offset];
    case Dtype::kHalf:
      return float_of_half(static_cast<const uint16_t*>(x.data)[offset]);
    case Dtype::kBfloat16:
      return float_of_bits(uint32_t{static_cast<const uint16_t*>(x.data)[offset]} << 16);
    default:
      return static_cast<const double*>(x.data)[offset];
  }
}

// Rounded before anything is taken from it: a fused multiply-add would leave its rounding as a difference.
__device__ float product(float x, float y) { return __fmul_rn(x, y); }
__device__ double product(double x, double y) { return __dmul_rn(x, y); }

template <class Real>
__global__ void __launch_bounds__(kColumnThreads) col_parts_kernel(
    Matrix pred, Matrix target, Scalars rows, Real* partial) {
  const int64_t k = int64_t{blockIdx.x} * kColumnThreads + threadIdx.x, count = pred.groups * pred.rows;
  if (k >= pred.cols) return;
  const int64_t share = (count + gridDim.y - 1) / gridDim.y, first = blockIdx.y * share;
  const int64_t end = first + share < count ? first + share : count;
  Real mean[kMeans] = {}, products[kProducts] = {};
  int64_t n = 0;
  for (int64_t i = first; i < end; ++i) {
    if (!counts(rows, i)) continue;
    const Real p = element<Real>(pred, i, k), t = element<Real>(target, i, k);
    const Real x[kMeans] = {
        p, t, p - t, product(p, static_cast<Real>(at(rows, kInvPred, i))),
        product(t, static_cast<Real>(at(rows, kInvTarget, i)))};
    const Real weight = Real{1} / ++n;
    Real before[kMeans], after[kMeans];
#pragma unroll
    for (int q = 0; q < kMeans; ++q) {
      before[q] = x[q] - mean[q];
      mean[q] += before[q] * weight;
      after[q] = x[q] - mean[q];
    }
#pragma unroll
    for (int q = 0; q < kProducts; ++q) products[q] += before[left(q)] * after[right(q)];
  }
  Real* out = partial + blockIdx.y * kPartNumbers * pred.cols + k;
#pragma unroll
  for (int q = 0; q < kMeans; ++q) out[q * pred.cols] = mean[q];
#pragma unroll
  for (int q = 0; q < kProducts; ++q) out[(kMeans + q) * pred.cols] = products[q];
  out[kMoments * pred.cols] = n;
}

// Chan, Golub & LeVeque 1983: means and sums of products of two sets of rows make those of their union.
template <class Real>
__global__ void __launch_bounds__(kColumnThreads) col_merge_kernel(
    const Real* partial, int64_t parts, int64_t dim, double* moments, double* count) {
  const int64_t k = int64_t{blockIdx.x} * kColumnThreads + threadIdx.x;
  if (k >= dim) return;
  double running[kMoments], n = *count;
  for (int q = 0; q < kMoments; ++q) running[q] = moments[q * dim + k];
  for (int64_t part = 0; part < parts; ++part) {
    const Real* of = partial + part * kPartNumbers * dim + k;
    const double rows = of[kMoments * dim];
    if (rows == 0) continue;
    const double share = rows / (n + rows), both = n * share;
    double delta[kMeans];
#pragma unroll
    for (int q = 0; q < kMeans; ++q) {
      delta[q] = of[q * dim] - running[q];
      running[q] += delta[q] * share;
    }
#pragma unroll
    for (int q = 0; q < kProducts; ++q) {
      running[kMeans + q] += of[(kMeans + q) * dim] + delta[left(q)] * delta[right(q)] * both;
    }
    n += rows;
  }
  for (int q = 0; q < kMoments; ++q) moments[q * dim + k] = running[q];
}

// After all columns have been merged with the former count.
template <class Real>
__global__ void col_count_kernel(const Real* partial, int64_t parts, int64_t dim, double* count) {
  for (int64_t part = 0; part < parts; ++part) *count += partial[(part * kPartNumbers + kMoments) * dim];
}

template <class Real>
__global__ void __launch_bounds__(kColumnThreads) col_terms_kernel(
    const double* moments, const double* count, double gamma, Matrix columns, double* values) {
  AMN_SHARED(double, sums, 2 * kColumnThreads);
  const int64_t cols = columns.cols;
  const double n = *count, dim = static_cast<double>(cols);
  Real* out = static_cast<Real*>(columns.data);
  const int64_t stride = columns.row_stride;
  double moment = 0, variance = 0;
  for (int64_t k = threadIdx.x; k < cols; k += kColumnThreads) {
    const auto of = [&](Moment which) { return moments[which * cols + k]; };
    const auto deviation = [&](Moment square) { return n > 1 ? sqrt(of(square) / (n - 1)) : of(square) * 0; };
    const auto slope = [&](double factor, double sd) { return sd > 0 ? factor / ((n - 1) * sd) : 0.0; };
    const double sd_pred = deviation(kPredPredS), sd_target = deviation(kTargetTargetS);
    double sd_difference = sd_pred - sd_target;
    // sd_p^2 - sd_t^2 = S(d, p + t)/(n - 1) = (2 S(d, p) - S(d, d))/(n - 1), in which nothing cancels for p near t.
    if (fabs(sd_difference) < 0.5 * sd_target) {
      sd_difference = (2 * of(kDiffPredS) - of(kDiffDiffS)) / (n - 1) / (sd_pred + sd_target);
    }
    const double shift = of(kMeanDiff), sd_unit = deviation(kUnitPredS);
    const double missing = (gamma < 0 ? deviation(kUnitTargetS) : gamma) - sd_unit;
    moment += shift * shift + sd_difference * sd_difference;
    variance += missing > 0 || missing != missing ? missing : 0;
    out[kMomentA * stride + k] = n > 0 ? 2 / (n * dim) * shift : 0.0;
    out[kMomentC * stride + k] = slope(2 / dim * sd_difference, sd_pred);
    out[kMomentPred * stride + k] = of(kMeanPred);
    out[kMomentCTarget * stride + k] = slope(2 / dim * sd_difference, sd_target);
    out[kMomentTarget * stride + k] = of(kMeanTarget);
    out[kVarianceV * stride + k] = missing > 0 ? slope(-1 / dim, sd_unit) : 0.0;
    out[kVarianceUnit * stride + k] = of(kMeanUnitPred);
  }
  sums[threadIdx.x] = moment;
  sums[kColumnThreads + threadIdx.x] = variance;
  for (int width = kColumnThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x >= width) continue;
    sums[threadIdx.x] += sums[threadIdx.x + width];
    sums[kColumnThreads + threadIdx.x] += sums[kColumnThreads + threadIdx.x + width];
  }
  if (threadIdx.x != 0) return;
  values[0] = sums[0] / dim;
  values[1] = n > 0 ? sums[kColumnThreads] / dim : 0;
}

template <class L>
__global__ void __launch_bounds__(kTeamLimit) col_dots_kernel(
    Matrix pred, Matrix target, Matrix attention, Matrix columns, Scalars rows) {
  using Real = typename L::Real;
  using O = RealLayout<L>;
  constexpr int kDots = kVarianceVariance - kPredMoment + 1;
  AMN_TEAM_MEMORY(memory);
  for_rows(pred.groups * pred.rows, [&](int64_t i, bool is_row) {
    const int64_t row = is_row ? i : 0;
    const bool reads = is_row && counts(rows, i);
    const int64_t cols = reads ? pred.cols : 0;
    const Row<L> p = row_of<L>(pred, row), t = row_of<L>(target, row);
    const Row<O> o = row_of<O>(attention, row);
    const Real inv_pred = at(rows, kInvPred, row);
    const Packs<L> packs(cols);

    Real lanes[1] = {};
    packs.each([&](int64_t k) {
      const Pack<L> pk = load(p, k, cols);
      const Columns<L> at_k(columns, k);
#pragma unroll
      for (int e = 0; e < L::kPack; ++e) {
        const Real unit = pk.x[e] * inv_pred;
        lanes[0] += at_k.spread(e, unit) * unit;
      }
    });
    double spread[1];
    sum_team(lanes, spread, memory);

    const Real out = spread[0];
    Real dots[kDots] = {};
    packs.each([&](int64_t k) {
      const Pair<L> x = load_pair(p, t, k, cols);
      const Columns<L> at_k(columns, k);
      Pack<O> ok{};
      if (attention.data != nullptr) ok = load(o, k, cols);
#pragma unroll
      for (int e = 0; e < L::kPack; ++e) {
        const Real pk = x.p.x[e], dk = pk - x.t.x[e], unit = pk * inv_pred;
        const Real hk = at_k.moment(e, pk), vk = (at_k.spread(e, unit) - unit * out) * inv_pred;
        const Real product[kDots] = {pk * hk,      dk * hk,      ok.x[e] * hk, hk * hk,
                                     dk * vk,      ok.x[e] * vk, hk * vk,      vk * vk};
#pragma unroll
        for (int q = 0; q < kDots; ++q) dots[q] += product[q];
      }
    });
    double sums[kDots];
    sum_team(dots, sums, memory);
    if (!is_row || threadIdx.x != 0) return;
    at(rows, kPredSpread, i) = spread[0];
    for (int q = 0; q < kDots; ++q) at(rows, kPredMoment + q, i) = sums[q];
  });
}

dim3 columns_grid(int64_t dim, int64_t parts) {
  return dim3(static_cast<unsigned>((dim + kColumnThreads - 1) / kColumnThreads), static_cast<unsigned>(parts));
}

}  // namespace

int64_t col_stats_scratch(int64_t rows, int64_t dim) { return parts_of(rows) * kPartNumbers * dim; }

void col_stats(
    const Matrix& pred, const Matrix& target, const Scalars& rows, double* moments, double* count, void* partial,
    cudaStream_t stream) {
  const int64_t parts = parts_of(pred.groups * pred.rows);
  const auto launch = [&]<class Real>() {
    Real* part = static_cast<Real*>(partial);
    const dim3 block(kColumnThreads);
    AMN_LAUNCH(
        col_parts_kernel<Real>, columns_grid(pred.cols, parts), block, 0, stream, pred, target, rows, part);
    AMN_LAUNCH(
        col_merge_kernel<Real>, columns_grid(pred.cols, 1), block, 0, stream, part, parts, pred.cols, moments, count);
    AMN_LAUNCH(col_count_kernel<Real>, dim3(1), dim3(1), 0, stream, part, parts, pred.cols, count);
  };
  is_double(pred, target) ? launch.template operator()<double>() : launch.template operator()<float>();
}

void col_terms(
    const double* moments, const double* count, double gamma, const Matrix& columns, double* values,
    cudaStream_t stream) {
  const auto launch = [&]<class Real>() {
    AMN_LAUNCH(
        col_terms_kernel<Real>, dim3(1), dim3(kColumnThreads), 0, stream, moments, count, gamma, columns, values);
  };
  columns.dtype == Dtype::kDouble ? launch.template operator()<double>() : launch.template operator()<float>();
}

void col_dots(
    const Matrix& pred, const Matrix& target, const Matrix& attention, const Matrix& columns, const Scalars& rows,
    cudaStream_t stream) {
  const auto launch = [&]<class L>() {
    const Teams teams = teams_for<L>(pred.groups * pred.rows, pred.cols);
    AMN_LAUNCH(
        col_dots_kernel<L>, teams.grid, teams.block, 0, stream, pred, target, attention, columns, rows);
  };
  dispatch_rows(columns.dtype == Dtype::kDouble, launch, pred, target, attention, columns);
}

}  // namespace amn::cuda
