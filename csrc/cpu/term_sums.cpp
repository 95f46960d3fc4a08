// The primitives that sum over rows on the CPU: values, Gram matrix and metrics, and the gradient of the temperature.
#include <ATen/Dispatch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "tensors.h"

namespace amn::cpu {
namespace {

// log(own + others) - own logit, written so that neither a dominating nor a vanishing own key loses digits.
double cross_entropy(double max, double others, double own_logit) {
  // No other key: 0, or NaN where the row is not finite.
  if (max == -std::numeric_limits<double>::infinity() && others == 0) return 0 * own_logit;
  const double own = std::exp(own_logit - max);
  // Further below, the own key is nothing beside the others, and before it is 0 the quotient overflows.
  return own > 1e-200 ? std::log1p(others / own) : max - own_logit + std::log(others);
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

}  // namespace

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

}  // namespace amn::cpu
