// The primitives that a device provides; seq_loss.cpp is the algorithm over them.
//
// Symbols: N rows in all, M rows of a chunk, D dimensions, K keys of a block, m terms; p and t are a row of pred and
// of target, d = p - t, c = cos(p, t).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "row_scalars.h"

namespace amn {

// Terms, numbered as in amn_kernels/options.py.
enum Term : int64_t { kMse = 0, kCosine = 1, kInfonce = 2 };

constexpr int64_t kMaxTerms = 3;
constexpr int64_t kMetrics = 5;  // cosine_similarity, top1, chance, pred_norm, target_norm

// What is computed, in the order of the caller's terms.
struct TermList {
  int64_t size = 0;
  int64_t term[kMaxTerms] = {};
  bool differentiable[kMaxTerms] = {};  // false: a monitored term, value only

  int64_t find(Term wanted) const {
    for (int64_t i = 0; i < size; ++i) {
      if (term[i] == wanted) return i;
    }
    return -1;
  }
};

// How balanced weights are formed.
struct BalanceOptions {
  int64_t anchor;
  double decay;
  int64_t update_every;
  bool by_value;  // balance values, else norms of gradients
  bool update;    // false: the state stays as it is
};

// Matrices have unit stride along D; `real` is the dtype that is computed in, float32 or float64.
struct Primitives {
  // Called with a fresh tensor that is about to be written whole.
  void (*prepare)(const at::Tensor& fresh);

  // Fills kInvPred ... kPredDiff, and the others as for an empty set of keys.
  void (*row_stats)(
      const at::Tensor& pred,        // [M, D] real
      const at::Tensor& target,      // [M, D] real
      const at::Tensor& rows,        // [kRowScalars, M]
      const at::Tensor& key_scale);  // [M] real, out: 1/|t|, in the dtype of the similarities

  // In place: logits hold p_i.k_j on entry and exp(s_ij - max_i)/|k_j| on return, 0 for the own key. Merges the block
  // into kMax and kOthers; what was summed with the former maximum must be multiplied by `rescale`.
  void (*softmax_rows_)(
      const at::Tensor& logits,     // [M, K] real
      const at::Tensor& key_scale,  // [K] real: 1/|k_j|
      const at::Tensor& rows,       // [kRowScalars, M]
      const at::Tensor& rescale,    // [M, 1] real, out; or [0, 1] for the only block
      int64_t own,                  // the own key of row i is in column own + i, if that is one of the K
      double temperature);

  // In place: attention holds sum_{j != i} exp(s_ij - max_i) k_j/|k_j| on entry and o on return, the same sum with
  // the positive subtracted and divided by the softmax denominator. Fills kPredAtt, kDiffAtt, kAttAtt.
  void (*row_dots)(
      const at::Tensor& pred,       // [M, D] real
      const at::Tensor& target,     // [M, D] real
      const at::Tensor& attention,  // [M, D] real
      const at::Tensor& rows,       // [kRowScalars, M]
      double temperature);

  // Sums the rows: the value of each term, the Gram matrix of the term gradients where `gram` has elements, metrics.
  void (*term_sums)(
      const at::Tensor& rows,     // [kRowScalars, N]
      const TermList& terms,
      int64_t dim,
      double temperature,
      const at::Tensor& values,   // [m] real, out
      const at::Tensor& gram,     // [m, m] real or [0, 0], out
      const at::Tensor& metrics); // [kMetrics] real, out

  // grad = a p + b d + c o with per-row a, b, c from the incoming gradients of the values; where the norms of p and t
  // are so different that d would lose the smaller vector, the cosine's part is given by p and t.
  void (*row_combine)(
      const at::Tensor& grad_values,  // [m] real
      const at::Tensor& pred,         // [M, D] real
      const at::Tensor& target,       // [M, D] real
      const at::Tensor& attention,    // [M, D] real, or [0, D] without infonce
      const at::Tensor& rows,         // [kRowScalars, M]
      const TermList& terms,
      int64_t total_rows,             // N
      double temperature,
      const at::Tensor& grad);        // [M, D] real, out

  // Weights from lambdas and running means, which are updated first: twin of python_ref/balance.py.
  void (*balance)(
      const at::Tensor& values,   // [m] real
      const at::Tensor& gram,     // [m, m] real, or [0, 0]: no gradients to observe
      const at::Tensor& mean,     // [m] float32, in place, as the next three
      const at::Tensor& updates,  // [m] int64
      const at::Tensor& calls,    // [] int64
      const at::Tensor& skipped,  // [m] int64
      const at::Tensor& lambdas,  // [m] float64
      const at::Tensor& most,     // [m] float32: the largest weight / lambda
      const BalanceOptions& options,
      const at::Tensor& weights);  // [m] real, out
};

namespace cpu {
extern const Primitives primitives;
void balance(
    const at::Tensor& values, const at::Tensor& gram, const at::Tensor& mean, const at::Tensor& updates,
    const at::Tensor& calls, const at::Tensor& skipped, const at::Tensor& lambdas, const at::Tensor& most,
    const BalanceOptions& options, const at::Tensor& weights);
const char* isa();  // the instruction set that run-time dispatch chose
}  // namespace cpu

}  // namespace amn
