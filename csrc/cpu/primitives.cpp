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

template <class T>
Matrix<T> matrix(const Tensor& x) {
  return {x.data_ptr<T>(), x.stride(0), x.size(1)};
}

template <class T>
Matrix<const T> const_matrix(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.size(1)};
}

Scalars scalars(const Tensor& rows) { return {rows.data_ptr<double>(), rows.stride(0)}; }

// Splits rows over threads, in parts of at least about 32 thousand elements, so that waking a thread is worth it.
template <class F>
void parallel_rows(int64_t rows, int64_t cols, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cols));
  at::parallel_for(0, rows, grain, f);
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

void row_stats(const Tensor& pred, const Tensor& target, const Tensor& rows, const Tensor& key_scale) {
  AT_DISPATCH_FLOATING_TYPES(pred.scalar_type(), "row_stats", [&] {
    const auto p = const_matrix<scalar_t>(pred), t = const_matrix<scalar_t>(target);
    const auto row_scalars = scalars(rows);
    auto* scale = key_scale.data_ptr<scalar_t>();
    parallel_rows(pred.size(0), pred.size(1), [&](int64_t begin, int64_t end) {
      kernels<scalar_t>().row_stats(p, t, row_scalars, scale, begin, end);
    });
  });
}

void softmax_rows_(
    const Tensor& logits, const Tensor& key_scale, const Tensor& rows, const Tensor& rescale, int64_t own,
    double temperature) {
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "softmax_rows_", [&] {
    const auto s = matrix<scalar_t>(logits);
    const auto* scale = key_scale.const_data_ptr<scalar_t>();
    auto* shrink = rescale.numel() ? rescale.data_ptr<scalar_t>() : nullptr;
    const auto row_scalars = scalars(rows);
    parallel_rows(logits.size(0), logits.size(1), [&](int64_t begin, int64_t end) {
      kernels<scalar_t>().softmax_rows_(s, scale, row_scalars, shrink, own, temperature, begin, end);
    });
  });
}

void row_dots(
    const Tensor& pred, const Tensor& target, const Tensor& attention, const Tensor& rows, double temperature) {
  AT_DISPATCH_FLOATING_TYPES(pred.scalar_type(), "row_dots", [&] {
    const auto p = const_matrix<scalar_t>(pred), t = const_matrix<scalar_t>(target);
    const auto o = matrix<scalar_t>(attention);
    const auto row_scalars = scalars(rows);
    parallel_rows(pred.size(0), pred.size(1), [&](int64_t begin, int64_t end) {
      kernels<scalar_t>().row_dots(p, t, o, row_scalars, temperature, begin, end);
    });
  });
}

// Cross entropy of a row: log(own + others) - log(own), written so that neither a dominating nor a vanishing own key
// loses digits.
double infonce_of_row(const Scalars& rows, int64_t i, double temperature) {
  const double max = rows.at(kMax, i), others = rows.at(kOthers, i);
  const double own_logit = (1 - rows.at(kOneMinusCos, i)) / temperature;
  // No other key: 0, or NaN where the row is not finite.
  if (max == -std::numeric_limits<double>::infinity() && others == 0) return 0 * own_logit;
  const double own = std::exp(own_logit - max);
  return own > 0 || std::isnan(own) ? std::log1p(others / own) : max - own_logit + std::log(others);
}

// Sums over the rows of what the values, the Gram matrix and the metrics are made of.
struct Sums {
  double diff = 0, one_minus_cos = 0, infonce = 0, top1 = 0, pred_norm = 0, target_norm = 0;
  double gram[kMaxTerms][kMaxTerms] = {};  // upper triangle, without the factors common to all rows

  void operator+=(const Sums& other) {
    diff += other.diff;
    one_minus_cos += other.one_minus_cos;
    infonce += other.infonce;
    top1 += other.top1;
    pred_norm += other.pred_norm;
    target_norm += other.target_norm;
    for (int64_t i = 0; i < kMaxTerms; ++i) {
      for (int64_t j = 0; j < kMaxTerms; ++j) gram[i][j] += other.gram[i][j];
    }
  }
};

Sums sum_rows(
    const Scalars& rows, int64_t begin, int64_t end, bool has_infonce, bool has_attention, double temperature,
    double tie) {
  Sums sums;
  for (int64_t i = begin; i < end; ++i) {
    const double inv_pred = rows.at(kInvPred, i), inv_target = rows.at(kInvTarget, i);
    const double one_minus_cos = rows.at(kOneMinusCos, i), dd = rows.at(kDiffDiff, i);
    const double target_norm = std::sqrt(rows.at(kTargetTarget, i));
    sums.diff += dd;
    sums.one_minus_cos += one_minus_cos;
    sums.pred_norm += std::sqrt(rows.at(kPredPred, i));
    sums.target_norm += target_norm;
    if (has_infonce) {
      sums.infonce += infonce_of_row(rows, i, temperature);
      sums.top1 += 1 - one_minus_cos - rows.at(kMax, i) * temperature > tie;
    }
    sums.gram[kMse][kMse] += dd;
    if (inv_pred == 0 || inv_target == 0) continue;  // cosine and InfoNCE send no gradient into such a row
    const double sin_square = one_minus_cos * (2 - one_minus_cos);
    sums.gram[kMse][kCosine] += target_norm * inv_pred * sin_square;
    sums.gram[kCosine][kCosine] += inv_pred * inv_pred * sin_square;
    if (!has_attention) continue;
    // The InfoNCE gradient is (o - (p.o)/|p|^2 p)/|p|: orthogonal to p, so of the others only their part along d counts.
    const double along_pred = rows.at(kPredAtt, i) * inv_pred * inv_pred;
    const double with_diff = inv_pred * (rows.at(kDiffAtt, i) - along_pred * rows.at(kPredDiff, i));
    sums.gram[kMse][kInfonce] += with_diff;
    sums.gram[kCosine][kInfonce] += inv_pred * inv_target * with_diff;
    sums.gram[kInfonce][kInfonce] +=
        inv_pred * inv_pred * (rows.at(kAttAtt, i) - along_pred * rows.at(kPredAtt, i));
  }
  return sums;
}

void term_sums(
    const Tensor& rows, const TermList& terms, int64_t dim, double temperature, const Tensor& values,
    const Tensor& gram, const Tensor& metrics) {
  const double n = static_cast<double>(rows.size(1));
  const int64_t infonce = terms.find(kInfonce);
  const bool has_gram = gram.numel() > 0;
  const bool has_attention = has_gram && infonce >= 0 && terms.differentiable[infonce];
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
        partial[block] = sum_rows(row_scalars, first, last, infonce >= 0, has_attention, temperature, tie);
      }
    });
    Sums sums;
    for (const Sums& block : partial) sums += block;
    const double value[kMaxTerms] = {sums.diff / (n * dim), sums.one_minus_cos / n, sums.infonce / n};
    const double factor[kMaxTerms] = {2 / (n * dim), 1 / n, 1 / (n * temperature)};
    for (int64_t i = 0; i < terms.size; ++i) {
      const int64_t term = terms.term[i];
      values.data_ptr<scalar_t>()[i] = static_cast<scalar_t>(value[term]);
      for (int64_t j = 0; has_gram && j < terms.size; ++j) {
        const int64_t low = std::min(term, terms.term[j]), high = std::max(term, terms.term[j]);
        const bool wanted = terms.differentiable[i] && terms.differentiable[j];
        gram.data_ptr<scalar_t>()[i * terms.size + j] =
            static_cast<scalar_t>(wanted ? factor[low] * factor[high] * sums.gram[low][high] : 0.0);
      }
    }
    auto* out = metrics.data_ptr<scalar_t>();
    out[0] = static_cast<scalar_t>(1 - sums.one_minus_cos / n);
    out[1] = static_cast<scalar_t>(infonce >= 0 ? sums.top1 / n : 0.0);
    out[2] = static_cast<scalar_t>(infonce >= 0 ? std::log(n) : 0.0);
    out[3] = static_cast<scalar_t>(sums.pred_norm / n);
    out[4] = static_cast<scalar_t>(sums.target_norm / n);
  });
}

void row_combine(
    const Tensor& grad_values, const Tensor& pred, const Tensor& target, const Tensor& attention, const Tensor& rows,
    const TermList& terms, int64_t total_rows, double temperature, const Tensor& grad) {
  const double n = static_cast<double>(total_rows);
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "row_combine", [&] {
    const auto incoming = [&](Term term) {
      const int64_t index = terms.find(term);
      return index >= 0 && terms.differentiable[index] ? double(grad_values.const_data_ptr<scalar_t>()[index]) : 0.0;
    };
    const Coefficients weights{
        incoming(kMse) * 2 / (n * pred.size(1)), incoming(kCosine) / n, incoming(kInfonce) / (n * temperature)};
    const auto p = const_matrix<scalar_t>(pred), t = const_matrix<scalar_t>(target);
    const auto o = attention.numel() ? const_matrix<scalar_t>(attention) : Matrix<const scalar_t>{};
    const auto g = matrix<scalar_t>(grad);
    const auto row_scalars = scalars(rows);
    parallel_rows(pred.size(0), pred.size(1), [&](int64_t begin, int64_t end) {
      kernels<scalar_t>().row_combine(p, t, o, row_scalars, weights, g, begin, end);
    });
  });
}

}  // namespace

const Primitives primitives = {prepare, row_stats, softmax_rows_, row_dots, term_sums, row_combine, balance};

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
