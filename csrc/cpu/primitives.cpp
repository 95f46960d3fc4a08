// The primitives of primitives.h on the CPU. The arithmetic on rows is in row_kernels.inl.
#include <ATen/Dispatch.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>

#include "tensors.h"

namespace amn::cpu {
namespace {

// Large fresh memory in huge pages where the system leaves it to the program: of 1,354 page faults a call with 4,096
// rows 86 were left. Not the largest: virtual machines return free huge pages to their host, and to get 256 MiB of them
// back took 0.1 to 0.6 s, small pages 0.2 s. Only a hint: whether it is heard changes no result.
void prepare(const Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20, kMost = 128 << 20;
  if (fresh.nbytes() >= kMost) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + fresh.nbytes()) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

template <class T>
KeyPairs<T> pairs_of(const Pairs& pairs, int64_t group, int64_t rows) {
  KeyPairs<T> out{nullptr, nullptr, 0, {}, static_cast<T>(pairs.margin)};
  if (pairs.key_ids.defined()) {
    out.row_ids = pairs.row_ids.const_data_ptr<int64_t>() + group * rows;
    out.key_ids = vectors_of(pairs.key_ids, pairs.key_ids.const_data_ptr<int64_t>()).of(group);
    out.id_keys = pairs.key_ids.size(-1);
  }
  if (pairs.guide.defined()) out.guide = const_batch<T>(pairs.guide).of(group);
  return out;
}

void row_stats(
    const Tensor& pred, const Tensor& target, const Tensor& rows, const Tensor& key_scale, double weight,
    const InfonceForm& form, const Tensor& pred_copy, const Tensor& target_copy) {
  constexpr double kLowest = -std::numeric_limits<double>::infinity();
  const at::ScalarType real = key_scale.scalar_type();
  // Rare: float64 and something else.
  if (!is_read_as_stored(pred, real) || !is_read_as_stored(target, real)) {
    const Tensor p = with_unit_stride(pred.to(real)), t = with_unit_stride(target.to(real));
    return row_stats(p, t, rows, key_scale, weight, form, pred_copy, target_copy);
  }
  AT_DISPATCH_FLOATING_TYPES(real, "row_stats", [&] {
    const AnyBatch p(pred), t(target);
    const auto p_copy = batch_or_none<scalar_t>(pred_copy), t_copy = batch_or_none<scalar_t>(target_copy);
    const auto scale = vectors_of(key_scale, key_scale.data_ptr<scalar_t>());
    parallel_rows(p.groups, p.rows, pred.size(-1), [&](int64_t group, int64_t begin, int64_t end) {
      const Scalars row_scalars = scalars(rows, group * p.rows);
      if (weight > 0) std::fill_n(&row_scalars.at(kWeight, begin), end - begin, weight);
      kernels<scalar_t>().row_stats(
          p.of(group), t.of(group), p_copy.of(group), t_copy.of(group), row_scalars, scale.of(group), begin, end);
      for (int64_t i = begin; i < end; ++i) {
        if (form.both) {
          row_scalars.at(kColMax, i) = kLowest;
          row_scalars.at(kColOthers, i) = 0;
        }
        if (form.positives_by_id) {
          row_scalars.at(kPositives, i) = 0;
          row_scalars.at(kPositiveSum, i) = 0;
          row_scalars.at(kColPositiveSum, i) = 0;
          row_scalars.at(kNegativeMax, i) = kLowest;
        }
      }
    });
  });
}

void softmax_rows_(
    const Tensor& logits, const Tensor& key_scale, const Tensor& rows, const Tensor& rescale, const Tensor& weights,
    const Pairs& pairs, int64_t own, const Temperature& temperature) {
  TORCH_INTERNAL_ASSERT(weights.is_same(logits), "in place only");
  const double tau = value_of(temperature);
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "softmax_rows_", [&] {
    const auto s = batch<scalar_t>(logits);
    const auto scale = vectors_of(key_scale, key_scale.const_data_ptr<scalar_t>());
    auto* shrink = rescale.numel() ? rescale.data_ptr<scalar_t>() : nullptr;
    parallel_rows(s.groups, s.rows, s.first.cols, [&](int64_t group, int64_t begin, int64_t end) {
      const int64_t first = group * s.rows;
      kernels<scalar_t>().softmax_rows_(
          s.of(group), scale.of(group), scalars(rows, first), shrink ? shrink + first : nullptr,
          pairs_of<scalar_t>(pairs, group, s.rows), own, tau, begin, end);
    });
  });
}

void softmax_stats_(
    const Tensor& logits, const Tensor& key_scale, const Tensor& rows, const Pairs& pairs, const InfonceForm& form,
    int64_t own, const Temperature& temperature) {
  const double tau = value_of(temperature);
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "softmax_stats_", [&] {
    const auto s = batch<scalar_t>(logits);
    const auto scale = vectors_of(key_scale, key_scale.const_data_ptr<scalar_t>());
    parallel_rows(s.groups, s.rows, s.first.cols, [&](int64_t group, int64_t begin, int64_t end) {
      kernels<scalar_t>().softmax_stats_(
          s.of(group), scale.of(group), scalars(rows, group * s.rows), pairs_of<scalar_t>(pairs, group, s.rows), form,
          own, tau, begin, end);
    });
  });
}

void softmax_cols(const Tensor& logits, const Tensor& key_rows, const Pairs& pairs, const InfonceForm& form) {
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "softmax_cols", [&] {
    const auto s = const_batch<scalar_t>(logits);
    const int64_t cols = key_rows.size(1) / s.groups;
    parallel_columns(s.groups, cols, s.rows, [&](int64_t group, int64_t begin, int64_t end) {
      kernels<scalar_t>().softmax_cols(
          s.of(group), scalars(key_rows, group * cols), pairs_of<scalar_t>(pairs, group, s.rows), form, begin, end,
          s.rows);
    });
  });
}

void col_factors(const Tensor& key_rows, const Tensor& cols, const Temperature& temperature) {
  const double tau = value_of(temperature);
  const Scalars rows = scalars(key_rows);
  AT_DISPATCH_FLOATING_TYPES(cols.scalar_type(), "col_factors", [&] {
    auto* out = cols.data_ptr<scalar_t>();
    for (int64_t j = 0; j < key_rows.size(1); ++j) {
      const double own = (1 - rows.at(kOneMinusCos, j)) / tau, max = rows.at(kColMax, j);
      const double shift = max > own ? max : own;
      const double total = std::exp(own - shift) + rows.at(kColOthers, j) * std::exp(max - shift);
      const bool sends = rows.at(kWeight, j) != 0 && rows.at(kInvPred, j) != 0 && rows.at(kInvTarget, j) != 0;
      out[j] = static_cast<scalar_t>(shift);
      out[cols.stride(0) + j] = static_cast<scalar_t>(sends ? 0.5 / total : 0.0);
    }
  });
}

void softmax_weights_(
    const Tensor& logits, const Tensor& key_scale, const Tensor& rows, const Tensor& cols, const Pairs& pairs,
    const InfonceForm& form, int64_t own, bool raw, const Temperature& temperature) {
  const double tau = value_of(temperature);
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "softmax_weights_", [&] {
    const auto s = batch<scalar_t>(logits);
    const auto scale = vectors_of(key_scale, key_scale.const_data_ptr<scalar_t>());
    const int64_t col_keys = cols.size(-1), col_stride = cols.dim() == 3 ? cols.stride(1) : 0;
    const auto* col_max = cols.const_data_ptr<scalar_t>();
    parallel_rows(s.groups, s.rows, s.first.cols, [&](int64_t group, int64_t begin, int64_t end) {
      const auto* shift = col_max + group * col_stride;
      kernels<scalar_t>().softmax_weights_(
          s.of(group), scale.of(group), scalars(rows, group * s.rows), shift, shift + cols.stride(0), col_keys,
          pairs_of<scalar_t>(pairs, group, s.rows), form, own, raw, tau, begin, end);
    });
  });
}

void row_dots(
    const Tensor& pred, const Tensor& target, const Tensor& attention, const Tensor& rows, Attention held,
    const InfonceForm& form, const Temperature& temperature) {
  const double tau = value_of(temperature);
  AT_DISPATCH_FLOATING_TYPES(pred.scalar_type(), "row_dots", [&] {
    const auto p = const_batch<scalar_t>(pred), t = const_batch<scalar_t>(target);
    const auto o = batch<scalar_t>(attention);
    parallel_rows(p.groups, p.rows, p.first.cols, [&](int64_t group, int64_t begin, int64_t end) {
      kernels<scalar_t>().row_dots(
          p.of(group), t.of(group), o.of(group), scalars(rows, group * p.rows), held, form, tau, begin, end);
    });
  });
}

void row_combine(
    const Incoming& gradients, const Tensor& pred, const Tensor& target, const Tensor& attention, const Tensor& columns,
    const Tensor& rows, const TermList& terms, const Temperature& temperature, const Tensor& grad) {
  const at::ScalarType real = attention.scalar_type();
  // Rare, as above.
  if (!is_read_as_stored(pred, real) || !is_read_as_stored(target, real) || grad.scalar_type() != pred.scalar_type()) {
    const Tensor p = with_unit_stride(pred.to(real)), t = with_unit_stride(target.to(real));
    const Tensor wide = attention.new_empty(grad.sizes());
    row_combine(gradients, p, t, attention, columns, rows, terms, temperature, wide);
    grad.copy_(wide);
    return;
  }
  const double tau = value_of(temperature);
  AT_DISPATCH_FLOATING_TYPES(real, "row_combine", [&] {
    const auto incoming = [&](Term term) { return incoming_of<scalar_t>(gradients, terms, term); };
    const Coefficients weights{
        incoming(kMse) * 2 / pred.size(-1), incoming(kCosine), incoming(kInfonce) / tau, incoming(kMoment),
        incoming(kVariance)};
    const AnyBatch p(pred), t(target);
    const auto o = const_batch<scalar_t>(attention), c = const_batch<scalar_t>(columns);
    const Matrix<char> first_grad{static_cast<char*>(grad.data_ptr()), row_bytes(grad), grad.size(-1)};
    const Batch<char> g{first_grad, group_bytes(grad), p.groups, p.rows};
    parallel_rows(p.groups, p.rows, pred.size(-1), [&](int64_t group, int64_t begin, int64_t end) {
      kernels<scalar_t>().row_combine(
          p.of(group), t.of(group), o.empty() ? Matrix<const scalar_t>{} : o.of(group), c.first,
          scalars(rows, group * p.rows), weights, g.of(group), begin, end);
    });
  });
}

void mirror_rows(const Tensor& rows, const Tensor& mirrored) {
  const Scalars from = scalars(rows), to = scalars(mirrored);
  constexpr RowScalar kSame[] = {kWeight,    kOneMinusCos, kDiffDiff,  kMax,       kOthers,
                                 kKeys,      kColMax,      kColOthers, kPositives, kPositiveSum};
  for (const RowScalar scalar : kSame) std::copy_n(&from.at(scalar, 0), rows.size(1), &to.at(scalar, 0));
  for (int64_t i = 0; i < rows.size(1); ++i) {
    const double inv_pred = from.at(kInvPred, i), inv_target = from.at(kInvTarget, i);
    to.at(kInvPred, i) = inv_target;
    to.at(kInvTarget, i) = inv_pred;
    to.at(kPredPred, i) = from.at(kTargetTarget, i);
    to.at(kTargetTarget, i) = from.at(kPredPred, i);
    to.at(kPredDiff, i) = from.at(kDiffDiff, i) - from.at(kPredDiff, i);  // t.(t - p) = d.d - p.d
    // (|t| - |p|)/|p|; without both norms nothing reads it.
    to.at(kExcess, i) = inv_target != 0 ? -from.at(kExcess, i) * inv_pred / inv_target : 0;
    to.at(kPredSpread, i) = 0;
    to.at(kPredAtt, i) = 0;
  }
}

void mirror_columns(const Tensor& columns, const Tensor& mirrored) {
  AT_DISPATCH_FLOATING_TYPES(columns.scalar_type(), "mirror_columns", [&] {
    const auto from = const_batch<scalar_t>(columns).first;
    const auto to = batch<scalar_t>(mirrored).first;
    for (int64_t k = 0; k < columns.size(1); ++k) {
      to.row(kMomentA)[k] = -from.row(kMomentA)[k];
      to.row(kMomentC)[k] = -from.row(kMomentCTarget)[k];
      to.row(kMomentPred)[k] = from.row(kMomentTarget)[k];
      to.row(kMomentCTarget)[k] = -from.row(kMomentC)[k];
      to.row(kMomentTarget)[k] = from.row(kMomentPred)[k];
      to.row(kVarianceV)[k] = 0;
      to.row(kVarianceUnit)[k] = 0;
    }
  });
}

}  // namespace

const Primitives primitives = {
    /*reads_any_dtype=*/false, /*splits_memory=*/true, prepare, row_stats, softmax_rows_, softmax_stats_, softmax_cols,
    col_factors, softmax_weights_, row_dots, col_stats, col_terms, col_dots, term_sums, row_combine, temperature_grad,
    mirror_rows, mirror_columns, balance};

}  // namespace amn::cpu
