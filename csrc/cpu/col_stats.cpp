// The primitives of moment and variance on the CPU: moments of columns, what follows from them, and their rows' part.
#include <ATen/Dispatch.h>

#include <cmath>

#include "tensors.h"

namespace amn::cpu {

void col_stats(
    const Tensor& pred, const Tensor& target, const Tensor& rows, const Tensor& moments, const Tensor& count) {
  AT_DISPATCH_FLOATING_TYPES(pred.scalar_type(), "col_stats", [&] {
    const auto p = const_batch<scalar_t>(pred), t = const_batch<scalar_t>(target);
    const Matrix<double> running = batch<double>(moments).first;
    double& n = *count.data_ptr<double>();
    for (int64_t group = 0; group < p.groups; ++group) {
      const Scalars row_scalars = scalars(rows, group * p.rows);
      parallel_columns(1, p.first.cols, p.rows, [&](int64_t, int64_t begin, int64_t end) {
        kernels<scalar_t>().col_stats(p.of(group), t.of(group), row_scalars, running, n, begin, end, p.rows);
      });
      for (int64_t i = 0; i < p.rows; ++i) n += row_scalars.at(kWeight, i) != 0;
    }
  });
}

void col_terms(
    const Tensor& moments, const Tensor& count, double gamma, const Tensor& columns, const Tensor& values) {
  const Matrix<double> sums = batch<double>(moments).first;
  const double n = *count.const_data_ptr<double>(), dim = static_cast<double>(moments.size(1));
  double moment = 0, variance = 0;
  AT_DISPATCH_FLOATING_TYPES(columns.scalar_type(), "col_terms", [&] {
    const Matrix<scalar_t> out = batch<scalar_t>(columns).first;
    const auto deviation = [&](Moment square, int64_t k) {
      return n > 1 ? std::sqrt(sums.row(square)[k] / (n - 1)) : sums.row(square)[k] * 0;
    };
    for (int64_t k = 0; k < moments.size(1); ++k) {
      const double sd_pred = deviation(kPredPredS, k), sd_target = deviation(kTargetTargetS, k);
      double sd_difference = sd_pred - sd_target;
      // sd_p^2 - sd_t^2 = S(d, p + t)/(n - 1) = (2 S(d, p) - S(d, d))/(n - 1), in which nothing cancels for p near t.
      if (std::abs(sd_difference) < 0.5 * sd_target) {
        sd_difference = (2 * sums.row(kDiffPredS)[k] - sums.row(kDiffDiffS)[k]) / (n - 1) / (sd_pred + sd_target);
      }
      const double shift = sums.row(kMeanDiff)[k];
      moment += shift * shift + sd_difference * sd_difference;
      const auto slope = [&](double factor, double sd) { return sd > 0 ? factor / ((n - 1) * sd) : 0.0; };
      out.row(kMomentA)[k] = static_cast<scalar_t>(n > 0 ? 2 / (n * dim) * shift : 0.0);
      out.row(kMomentC)[k] = static_cast<scalar_t>(slope(2 / dim * sd_difference, sd_pred));
      out.row(kMomentPred)[k] = static_cast<scalar_t>(sums.row(kMeanPred)[k]);
      out.row(kMomentCTarget)[k] = static_cast<scalar_t>(slope(2 / dim * sd_difference, sd_target));
      out.row(kMomentTarget)[k] = static_cast<scalar_t>(sums.row(kMeanTarget)[k]);
      const double sd_unit = deviation(kUnitPredS, k);
      const double missing = (gamma < 0 ? deviation(kUnitTargetS, k) : gamma) - sd_unit;
      variance += missing > 0 || std::isnan(missing) ? missing : 0;
      out.row(kVarianceV)[k] = static_cast<scalar_t>(missing > 0 ? slope(-1 / dim, sd_unit) : 0.0);
      out.row(kVarianceUnit)[k] = static_cast<scalar_t>(sums.row(kMeanUnitPred)[k]);
    }
  });
  values.data_ptr<double>()[0] = moment / dim;
  values.data_ptr<double>()[1] = n > 0 ? variance / dim : 0;
}

void col_dots(
    const Tensor& pred, const Tensor& target, const Tensor& attention, const Tensor& columns, const Tensor& rows) {
  AT_DISPATCH_FLOATING_TYPES(pred.scalar_type(), "col_dots", [&] {
    const auto p = const_batch<scalar_t>(pred), t = const_batch<scalar_t>(target);
    const auto o = const_batch<scalar_t>(attention), c = const_batch<scalar_t>(columns);
    parallel_rows(p.groups, p.rows, p.first.cols, [&](int64_t group, int64_t begin, int64_t end) {
      kernels<scalar_t>().col_dots(
          p.of(group), t.of(group), o.empty() ? Matrix<const scalar_t>{} : o.of(group), c.first,
          scalars(rows, group * p.rows), begin, end);
    });
  });
}

}  // namespace amn::cpu
