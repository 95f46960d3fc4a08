// The primitives of primitives.h on the CPU: tensors to pointers, threads over rows, run-time choice of instruction
// set. The arithmetic on rows is in row_kernels.inl; sums over rows are here.
#include "../primitives.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string_view>
#include <vector>

#include "row_kernels.h"

namespace amn::cpu {
namespace {

using at::Tensor;

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best instruction set of the machine, or the lower one that AMN_CPU_ISA names (for tests and for measuring).
Isa detect_isa() {
  Isa best = Isa::kBaseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::kAvx2;
  if (best == Isa::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    best = Isa::kAvx512;
  }
#endif
  const char* name = std::getenv("AMN_CPU_ISA");
  if (name == nullptr || *name == '\0') return best;
  const std::string_view wanted = name;
  const Isa isa = wanted == "avx512" ? Isa::kAvx512 : wanted == "avx2" ? Isa::kAvx2 : Isa::kBaseline;
  TORCH_CHECK(wanted == "baseline" || isa != Isa::kBaseline, "AMN_CPU_ISA must be baseline, avx2 or avx512, got ", name);
  TORCH_CHECK(isa <= best, "AMN_CPU_ISA=", name, ", but this machine does not have it");
  return isa;
}

Isa current_isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

template <class T>
const RowKernels<T>& kernels() {
  static const RowKernels<T> chosen = [] {
#if defined(__x86_64__)
    if (current_isa() == Isa::kAvx512) return avx512_kernels<T>();
    if (current_isa() == Isa::kAvx2) return avx2_kernels<T>();
#endif
    return baseline_kernels<T>();
  }();
  return chosen;
}

// A matrix [M, cols], or G of them as [G, M, cols].
template <class T>
struct Batch {
  Matrix<T> first;
  int64_t stride;  // between matrices
  int64_t groups, rows;

  Matrix<T> of(int64_t group) const { return {first.data + group * stride, first.stride, first.cols}; }
  bool empty() const { return rows == 0; }
};

template <class T>
Batch<T> batch_of(const Tensor& x, T* data) {
  const bool many = x.dim() == 3;
  return {{data, x.stride(-2), x.size(-1)}, many ? x.stride(0) : 0, many ? x.size(0) : 1, x.size(-2)};
}

template <class T>
Batch<T> batch(const Tensor& x) {
  return batch_of<T>(x, x.data_ptr<T>());
}

template <class T>
Batch<const T> const_batch(const Tensor& x) {
  return batch_of<const T>(x, x.const_data_ptr<T>());
}

// A vector [M], or one per group as [G, M].
template <class T>
struct Vectors {
  T* data;
  int64_t stride;
  T* of(int64_t group) const { return data + group * stride; }
};

template <class T>
Vectors<T> vectors_of(const Tensor& x, T* data) {
  return {data, x.dim() == 2 ? x.stride(0) : 0};
}

// Scalars of the rows from `first` on.
Scalars scalars(const Tensor& rows, int64_t first = 0) { return {rows.data_ptr<double>() + first, rows.stride(0)}; }

double value_of(const Temperature& temperature) {
  return temperature.learned.defined() ? temperature.learned.item<double>() : temperature.number;
}

// Calls f(group, begin, end) for the rows of every group, split over threads in parts of at least about 32 thousand
// elements, so that waking a thread is worth it.
template <class F>
void parallel_rows(int64_t groups, int64_t rows, int64_t cols, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cols));
  at::parallel_for(0, groups * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin / std::max<int64_t>(1, rows); begin < end; ++group) {
      const int64_t first = group * rows, last = std::min(end, first + rows);
      f(group, begin - first, last - first);
      begin = last;
    }
  });
}

// The same for the columns of matrices, in stripes of whole vectors.
template <class F>
void parallel_columns(int64_t groups, int64_t cols, int64_t rows, const F& f) {
  constexpr int64_t kStripe = 128;
  const int64_t stripes = (cols + kStripe - 1) / kStripe;
  parallel_rows(groups, stripes, kStripe * rows, [&](int64_t group, int64_t begin, int64_t end) {
    f(group, begin * kStripe, std::min(cols, end * kStripe));
  });
}

// Large fresh memory in huge pages where the system leaves it to the program: of 1,354 page faults a call with 4,096
// rows 86 were left. Only a hint: whether it is heard changes no result.
void prepare(const Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
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
    const InfonceForm& form) {
  constexpr double kLowest = -std::numeric_limits<double>::infinity();
  AT_DISPATCH_FLOATING_TYPES(pred.scalar_type(), "row_stats", [&] {
    const auto p = const_batch<scalar_t>(pred), t = const_batch<scalar_t>(target);
    const auto scale = vectors_of(key_scale, key_scale.data_ptr<scalar_t>());
    parallel_rows(p.groups, p.rows, p.first.cols, [&](int64_t group, int64_t begin, int64_t end) {
      const Scalars row_scalars = scalars(rows, group * p.rows);
      if (weight > 0) std::fill_n(&row_scalars.at(kWeight, begin), end - begin, weight);
      kernels<scalar_t>().row_stats(p.of(group), t.of(group), row_scalars, scale.of(group), begin, end);
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
      double spread = sd_pred - sd_target;
      // sd_p^2 - sd_t^2 = S(d, p + t)/(n - 1) = (2 S(d, p) - S(d, d))/(n - 1), in which nothing cancels for p near t.
      if (std::abs(spread) < 0.5 * sd_target) {
        spread = (2 * sums.row(kDiffPredS)[k] - sums.row(kDiffDiffS)[k]) / (n - 1) / (sd_pred + sd_target);
      }
      const double shift = sums.row(kMeanDiff)[k];
      moment += shift * shift + spread * spread;
      const auto slope = [&](double factor, double sd) { return sd > 0 ? factor / ((n - 1) * sd) : 0.0; };
      out.row(kMomentA)[k] = static_cast<scalar_t>(n > 0 ? 2 / (n * dim) * shift : 0.0);
      out.row(kMomentC)[k] = static_cast<scalar_t>(slope(2 / dim * spread, sd_pred));
      out.row(kMomentPred)[k] = static_cast<scalar_t>(sums.row(kMeanPred)[k]);
      out.row(kMomentCTarget)[k] = static_cast<scalar_t>(slope(2 / dim * spread, sd_target));
      out.row(kMomentTarget)[k] = static_cast<scalar_t>(sums.row(kMeanTarget)[k]);
      const double sd_unit = deviation(kUnitPredS, k);
      const double missing = (gamma < 0 ? deviation(kUnitTargetS, k) : gamma) - sd_unit;
      variance += missing > 0 || std::isnan(missing) ? missing : 0;
      out.row(kVarianceV)[k] = static_cast<scalar_t>(missing > 0 ? slope(-1 / dim, sd_unit) : 0.0);
      out.row(kVarianceUnit)[k] = static_cast<scalar_t>(sums.row(kMeanUnitPred)[k]);
    }
  });
  values.data_ptr<double>()[0] = moment / dim;
  values.data_ptr<double>()[1] = variance / dim;
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

// log(own + others) - own logit, written so that neither a dominating nor a vanishing own key loses digits.
double cross_entropy(double max, double others, double own_logit) {
  // No other key: 0, or NaN where the row is not finite.
  if (max == -std::numeric_limits<double>::infinity() && others == 0) return 0 * own_logit;
  const double own = std::exp(own_logit - max);
  return own > 0 || std::isnan(own) ? std::log1p(others / own) : max - own_logit + std::log(others);
}

double infonce_of_row(const Scalars& rows, int64_t i, const InfonceForm& form, double temperature) {
  const double own = (1 - rows.at(kOneMinusCos, i)) / temperature;
  double value = cross_entropy(rows.at(kMax, i), rows.at(kOthers, i), own);
  if (form.both) value = (value + cross_entropy(rows.at(kColMax, i), rows.at(kColOthers, i), own)) / 2;
  if (!form.positives_by_id) return value;
  // log-sum - mean over the positives = (log-sum - own) + mean over the positives of (own - s).
  const double others = rows.at(kPositives, i);
  const double sum = form.both ? (rows.at(kPositiveSum, i) + rows.at(kColPositiveSum, i)) / 2 : rows.at(kPositiveSum, i);
  return value + (others * own - sum) / (1 + others);
}

// Sums over the rows, each with its weight, of what the values, the Gram matrix and the metrics are made of.
struct Sums {
  double diff = 0, one_minus_cos = 0, infonce = 0, weight = 0, top1 = 0, chance = 0, pred_norm = 0, target_norm = 0;
  double gram[kMaxTerms][kMaxTerms] = {};  // upper triangle, without the factors common to all rows

  void operator+=(const Sums& other) {
    diff += other.diff;
    one_minus_cos += other.one_minus_cos;
    infonce += other.infonce;
    weight += other.weight;
    top1 += other.top1;
    chance += other.chance;
    pred_norm += other.pred_norm;
    target_norm += other.target_norm;
    for (int64_t i = 0; i < kMaxTerms; ++i) {
      for (int64_t j = 0; j < kMaxTerms; ++j) gram[i][j] += other.gram[i][j];
    }
  }
};

Sums sum_rows(
    const Scalars& rows, int64_t begin, int64_t end, const TermList& terms, const InfonceForm& form, bool has_gram,
    double temperature, double tie) {
  const bool has_infonce = terms.has(kInfonce), has_attention = has_gram && terms.sends(kInfonce);
  const bool has_columns = has_gram && (terms.sends(kMoment) || terms.sends(kVariance));
  Sums sums;
  for (int64_t i = begin; i < end; ++i) {
    const double weight = rows.at(kWeight, i);
    if (weight == 0) continue;  // masked
    const double inv_pred = rows.at(kInvPred, i), inv_target = rows.at(kInvTarget, i);
    const double one_minus_cos = rows.at(kOneMinusCos, i), dd = rows.at(kDiffDiff, i);
    const double target_norm = std::sqrt(rows.at(kTargetTarget, i));
    sums.weight += weight;
    sums.diff += weight * dd;
    sums.one_minus_cos += weight * one_minus_cos;
    sums.pred_norm += weight * std::sqrt(rows.at(kPredPred, i));
    sums.target_norm += weight * target_norm;
    if (has_infonce) {
      const double own = (1 - one_minus_cos) / temperature, max = rows.at(kMax, i);
      const double margin = form.positives_by_id ? std::max(own, max) - rows.at(kNegativeMax, i) : own - max;
      sums.infonce += weight * infonce_of_row(rows, i, form, temperature);
      sums.top1 += margin * temperature > tie ? weight : 0;
      sums.chance += weight * std::log1p(rows.at(kKeys, i));
    }
    if (!has_gram) continue;
    const double square = weight * weight;
    sums.gram[kMse][kMse] += square * dd;
    const bool has_cosine = inv_pred != 0 && inv_target != 0;  // cosine sends no gradient into another row
    const double sin_square = one_minus_cos * (2 - one_minus_cos);
    if (has_cosine) {
      sums.gram[kMse][kCosine] += square * target_norm * inv_pred * sin_square;
      sums.gram[kCosine][kCosine] += square * inv_pred * inv_pred * sin_square;
    }
    // The InfoNCE gradient is (o - (p.o)/|p|^2 p)/|p|: orthogonal to p, so of the others only their part along d counts.
    const double along_pred = has_attention ? rows.at(kPredAtt, i) * inv_pred * inv_pred : 0;
    if (has_attention) {
      const double with_diff = inv_pred * (rows.at(kDiffAtt, i) - along_pred * rows.at(kPredDiff, i));
      sums.gram[kMse][kInfonce] += square * with_diff;
      sums.gram[kCosine][kInfonce] += square * inv_pred * inv_target * with_diff;
      sums.gram[kInfonce][kInfonce] +=
          square * inv_pred * inv_pred * (rows.at(kAttAtt, i) - along_pred * rows.at(kPredAtt, i));
    }
    if (!has_columns) continue;
    sums.gram[kMse][kMoment] += weight * rows.at(kDiffMoment, i);
    sums.gram[kMse][kVariance] += weight * rows.at(kDiffVariance, i);
    if (has_cosine) {
      const double along = inv_pred * inv_pred * (one_minus_cos + rows.at(kExcess, i));
      sums.gram[kCosine][kMoment] +=
          weight * (inv_pred * inv_target * rows.at(kDiffMoment, i) - along * rows.at(kPredMoment, i));
      sums.gram[kCosine][kVariance] += weight * inv_pred * inv_target * rows.at(kDiffVariance, i);
    }
    if (has_attention) {
      sums.gram[kInfonce][kMoment] += weight * inv_pred * (rows.at(kAttMoment, i) - along_pred * rows.at(kPredMoment, i));
      sums.gram[kInfonce][kVariance] += weight * inv_pred * rows.at(kAttVariance, i);
    }
    sums.gram[kMoment][kMoment] += rows.at(kMomentMoment, i);
    sums.gram[kMoment][kVariance] += rows.at(kMomentVariance, i);
    sums.gram[kVariance][kVariance] += rows.at(kVarianceVariance, i);
  }
  return sums;
}

void term_sums(
    const Tensor& rows, const Tensor& col_values, const TermList& terms, const InfonceForm& form, int64_t dim,
    const Temperature& temperature, const Tensor& weights, const Tensor& values, const Tensor& gram,
    const Tensor& metrics, const Tensor& loss) {
  const double tau = value_of(temperature);
  const bool has_gram = gram.numel() > 0;
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "term_sums", [&] {
    const double tie = 8 * std::numeric_limits<scalar_t>::epsilon();  // cosines closer than the rounding of a GEMM
    // Blocks of a fixed size, added in order: the sums do not depend on the number of threads.
    constexpr int64_t kRowsPerBlock = 256;
    const auto row_scalars = scalars(rows);
    const int64_t count = rows.size(1);
    std::vector<Sums> partial((count + kRowsPerBlock - 1) / kRowsPerBlock);
    at::parallel_for(0, partial.size(), /*grain_size=*/1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kRowsPerBlock, last = std::min(count, first + kRowsPerBlock);
        partial[block] = sum_rows(row_scalars, first, last, terms, form, has_gram, tau, tie);
      }
    });
    Sums sums;
    for (const Sums& block : partial) sums += block;
    const double* columns = col_values.numel() ? col_values.const_data_ptr<double>() : nullptr;
    const double value[kMaxTerms] = {
        sums.diff / dim, sums.one_minus_cos, sums.infonce, columns ? columns[0] : 0.0, columns ? columns[1] : 0.0};
    const double factor[kMaxTerms] = {2.0 / dim, 1, 1 / tau, 1, 1};
    double weighted = 0;
    for (int64_t i = 0; i < terms.size; ++i) {
      const int64_t term = terms.term[i];
      const auto rounded = static_cast<scalar_t>(value[term]);
      values.data_ptr<scalar_t>()[i] = rounded;
      if (loss.defined()) weighted += double{rounded} * weights.const_data_ptr<scalar_t>()[i];
      for (int64_t j = 0; has_gram && j < terms.size; ++j) {
        const int64_t low = std::min(term, terms.term[j]), high = std::max(term, terms.term[j]);
        const bool wanted = terms.differentiable[i] && terms.differentiable[j];
        gram.data_ptr<scalar_t>()[i * terms.size + j] =
            static_cast<scalar_t>(wanted ? factor[low] * factor[high] * sums.gram[low][high] : 0.0);
      }
    }
    if (loss.defined()) *loss.data_ptr<scalar_t>() = static_cast<scalar_t>(weighted);
    auto* out = metrics.data_ptr<scalar_t>();
    out[0] = static_cast<scalar_t>(sums.weight - sums.one_minus_cos);
    out[1] = static_cast<scalar_t>(sums.top1);
    out[2] = static_cast<scalar_t>(sums.chance);
    out[3] = static_cast<scalar_t>(sums.pred_norm);
    out[4] = static_cast<scalar_t>(sums.target_norm);
  });
}

// What arrives at the value of a term; 0 for one that is absent or monitored.
template <class T>
double incoming_of(const Incoming& incoming, const TermList& terms, Term term) {
  if (!terms.sends(term)) return 0;
  const int64_t i = terms.find(term);
  T sum = 0;
  if (incoming.grad_loss.defined()) {
    sum = *incoming.grad_loss.const_data_ptr<T>() * incoming.weights.const_data_ptr<T>()[i];
  }
  if (incoming.grad_values.defined()) sum += incoming.grad_values.const_data_ptr<T>()[i];
  return sum;
}

void row_combine(
    const Incoming& gradients, const Tensor& pred, const Tensor& target, const Tensor& attention, const Tensor& columns,
    const Tensor& rows, const TermList& terms, const Temperature& temperature, const Tensor& grad) {
  const double tau = value_of(temperature);
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "row_combine", [&] {
    const auto incoming = [&](Term term) { return incoming_of<scalar_t>(gradients, terms, term); };
    const Coefficients weights{
        incoming(kMse) * 2 / pred.size(-1), incoming(kCosine), incoming(kInfonce) / tau, incoming(kMoment),
        incoming(kVariance)};
    const auto p = const_batch<scalar_t>(pred), t = const_batch<scalar_t>(target);
    const auto o = const_batch<scalar_t>(attention), c = const_batch<scalar_t>(columns);
    const auto g = batch<scalar_t>(grad);
    parallel_rows(p.groups, p.rows, p.first.cols, [&](int64_t group, int64_t begin, int64_t end) {
      kernels<scalar_t>().row_combine(
          p.of(group), t.of(group), o.empty() ? Matrix<const scalar_t>{} : o.of(group), c.first,
          scalars(rows, group * p.rows), weights, g.of(group), begin, end);
    });
  });
}

void temperature_grad(
    const Incoming& incoming, const Tensor& rows, const TermList& terms, const Temperature& temperature,
    const Tensor& grad) {
  const double tau = value_of(temperature);
  const Scalars of = scalars(rows);
  double sum = 0;
  for (int64_t i = 0; i < rows.size(1); ++i) sum += of.at(kWeight, i) * of.at(kInvPred, i) * of.at(kPredAtt, i);
  const Tensor& given = incoming.grad_loss.defined() ? incoming.grad_loss : incoming.grad_values;
  AT_DISPATCH_FLOATING_TYPES(given.scalar_type(), "temperature_grad", [&] {
    grad.fill_(-sum / (tau * tau) * incoming_of<scalar_t>(incoming, terms, kInfonce));
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
    false,     prepare,   row_stats, softmax_rows_, softmax_stats_, softmax_cols, col_factors,    softmax_weights_,
    row_dots,  col_stats, col_terms, col_dots,      term_sums,      row_combine,  temperature_grad, mirror_rows,
    mirror_columns, balance};

const char* isa() {
  switch (current_isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace amn::cpu
