// The primitives that a device provides; seq_loss.cpp and amn_kernels/algorithm.py are the algorithm over them.
//
// Symbols: N rows in all; G groups of M rows each that are each other's negatives, numbered group after group; C rows
// of a chunk in each of G groups; D dimensions; K keys of a block; m terms; p and t are a row of pred and of target,
// d = p - t, c = cos(p, t), s_ij = cos(p_i, k_j) / temperature. A matrix [M, D] may come as [G, M, D]; its rows are
// then those of group 0, of group 1, and so on. Matrices have unit stride along D; `real` is the dtype that is
// computed in, float32 or float64.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "types.h"

namespace amn {

// A number, or a 0-dim tensor on the device where it is learned: the host must not read it there.
struct Temperature {
  double number;
  at::Tensor learned;  // undefined for a fixed one
};

// Which keys of a block a row must leave out or take as positives, besides masked ones. All may be undefined.
struct Pairs {
  at::Tensor row_ids;  // [G C] int64
  at::Tensor key_ids;  // [G, K'] int64, K' <= K: further keys have no id
  at::Tensor guide;    // [G, C, K] real: t_i.k_j; with it, keys with 1 - cos(t_i, k_j) < margin are left out
  double margin;
};

// The gradients that reach the values of the terms: grad_loss weights + grad_values. Either may be undefined.
struct Incoming {
  at::Tensor grad_loss;    // [] real
  at::Tensor weights;      // [m] real, with grad_loss
  at::Tensor grad_values;  // [m] real
};

struct Primitives {
  // true: every primitive reads pred and target in any floating dtype, and matrix products take 16-bit rows as they
  // are. false: only row_stats and row_combine do; all else gets rows in `real`.
  bool reads_any_dtype;

  // Whether a part of a tensor may be handed out as a tensor that keeps the memory of the whole. A GPU's allocator would
  // not see which streams use it.
  bool splits_memory;

  // Called with a fresh tensor that is about to be written whole.
  void (*prepare)(const at::Tensor& fresh);

  // Fills kInvPred ... kPredDiff from kWeight, and kMax, kOthers, kKeys and all that is p.o ... o.o as for an empty
  // set of keys; of the options that are on also kColMax, kColOthers, kPositives ... kNegativeMax. Those of masked rows
  // are those of a row of zeros; such rows may hold NaN and are not read. Unless `reads_any_dtype`, copies may be asked
  // for, which can be multiplied.
  void (*row_stats)(
      const at::Tensor& pred,        // [M, D] any floating dtype
      const at::Tensor& target,      // [M, D] the same
      const at::Tensor& rows,        // [kRowScalars, M]
      const at::Tensor& key_scale,   // [M] real, out: 1/|t|, or -1 for a masked row: no key
      double weight,                 // > 0: kWeight of every row, filled too; else kWeight is given
      const InfonceForm& form,
      const at::Tensor& pred_copy,     // [M, D] real, out: the rows of pred, masked ones 0; or undefined
      const at::Tensor& target_copy);  // [M, D] real, the same of target

  // The plain softmax, of which blocks merge. In place: logits hold p_i.k_j on entry and exp(s_ij - max_i)/|k_j| on
  // return, 0 for the own key and for keys left out. Merges the block into kMax, kOthers, kKeys; what was summed with
  // the former maximum must be multiplied by `rescale`. What the logits would hold on return may go to `weights` of
  // 16 bits instead, multiplied by |t_i|: Attention::kScaled.
  void (*softmax_rows_)(
      const at::Tensor& logits,     // [G, C, K] real
      const at::Tensor& key_scale,  // [G, K] real: 1/|k_j|, negative for no key
      const at::Tensor& rows,       // [kRowScalars, G C]
      const at::Tensor& rescale,    // [G C, 1] real, out; or [0, 1] for the only block
      const at::Tensor& weights,    // the logits themselves, or [G, C, K] of 16 bits, out
      const Pairs& pairs,           // no positives by id here
      int64_t own,                  // the own key of row i of a group is in column own + i, if that is one of the K
      const Temperature& temperature);

  // The general softmax, first half. In place: logits hold p_i.k_j on entry and s_ij on return, -inf for the own key,
  // for keys left out and all along masked rows. Merges the block into kMax, kOthers, kKeys, and with positives by id
  // into kPositives, kPositiveSum, kNegativeMax.
  void (*softmax_stats_)(
      const at::Tensor& logits,     // [G, C, K] real
      const at::Tensor& key_scale,  // [G, K] real
      const at::Tensor& rows,       // [kRowScalars, G C]
      const Pairs& pairs,
      const InfonceForm& form,
      int64_t own,
      const Temperature& temperature);

  // Merges the rows of a chunk into kColMax, kColOthers and, with positives by id, kColPositiveSum of their keys.
  void (*softmax_cols)(
      const at::Tensor& logits,    // [G, C, K] real: s_ij as softmax_stats_ leaves it
      const at::Tensor& key_rows,  // [kRowScalars, G K'], K' <= K: further keys have no column
      const Pairs& pairs,
      const InfonceForm& form);

  // What softmax_weights_ needs of the columns: cols[0] = the largest s of the column with the own one, cols[1] =
  // 1/2 / sum of exp(s - that), 0 for a row that does not send.
  void (*col_factors)(
      const at::Tensor& key_rows,  // [kRowScalars, G K]
      const at::Tensor& cols,      // [2, G K] real, out
      const Temperature& temperature);

  // The general softmax, second half. In place: logits hold s_ij, or p_i.k_j if `raw`, and on return v_ij/|k_j|, 0 for
  // the own key and for keys left out, where
  //   v_ij = f (softmax over j)_ij [i sends] + (softmax over i)_ij [j sends] / 2 - pi_ij
  // with f = 1 and without the second for one direction, f = 1/2 for both; pi_ij = 1/(number of positives of i) for
  // positives by id, times f for each of i and j that sends; else 0.
  void (*softmax_weights_)(
      const at::Tensor& logits,     // [G, C, K] real
      const at::Tensor& key_scale,  // [G, K] real
      const at::Tensor& rows,       // [kRowScalars, G C], complete
      const at::Tensor& cols,       // [2, G, K'] real, K' <= K: further keys have no column; or [2, G, 0]: one direction
      const Pairs& pairs,
      const InfonceForm& form,
      int64_t own,
      bool raw,
      const Temperature& temperature);

  // In place: attention holds on entry what `held` says and on return o, the same sum with the positive added. Fills
  // kPredAtt, kDiffAtt, kAttAtt. o = 0 for a row whose attention is kUnnormalised and that does not send.
  void (*row_dots)(
      const at::Tensor& pred,       // [M, D] real
      const at::Tensor& target,     // [M, D] real
      const at::Tensor& attention,  // [M, D] real
      const at::Tensor& rows,       // [kRowScalars, M]
      Attention held,
      const InfonceForm& form,
      const Temperature& temperature);

  // Merges rows into the running moments; `count` is the number of rows that count so far.
  void (*col_stats)(
      const at::Tensor& pred,     // [M, D] real
      const at::Tensor& target,   // [M, D] real
      const at::Tensor& rows,     // [kRowScalars, M]: kWeight, kInvPred, kInvTarget
      const at::Tensor& moments,  // [kMoments, D] float64, in place
      const at::Tensor& count);   // [1] float64, in place

  // The columns from the moments, and the values of the moment and the variance term, 0 where no row counts.
  void (*col_terms)(
      const at::Tensor& moments,  // [kMoments, D] float64
      const at::Tensor& count,    // [1] float64
      double gamma,               // the variance term's target for every column; < 0: the targets' own
      const at::Tensor& columns,  // [kColumns, D] real, out
      const at::Tensor& values);  // [2] float64, out

  // Fills kPredSpread ... kVarianceVariance.
  void (*col_dots)(
      const at::Tensor& pred,       // [M, D] real
      const at::Tensor& target,     // [M, D] real
      const at::Tensor& attention,  // [M, D] real: o; or [0, D]
      const at::Tensor& columns,    // [kColumns, D] real
      const at::Tensor& rows);      // [kRowScalars, M]

  // Sums the rows: the value of each term, the Gram matrix of the term gradients where `gram` has elements, metrics.
  void (*term_sums)(
      const at::Tensor& rows,        // [kRowScalars, N]
      const at::Tensor& col_values,  // [2] float64 from col_terms, or [0]
      const TermList& terms,
      const InfonceForm& form,
      int64_t dim,
      const Temperature& temperature,
      const at::Tensor& weights,     // [m] real; undefined without a loss
      const at::Tensor& values,      // [m] real, out
      const at::Tensor& gram,        // [m, m] real or [0, 0], out
      const at::Tensor& metrics,     // [kMetrics] real, out
      const at::Tensor& loss);       // [] real, out: weights.values; or undefined

  // grad = a p + b d + c o with per-row a, b, c from the incoming gradients of the values, and the columns' part;
  // where the norms of p and t are so different that d would lose the smaller vector, the cosine's part is given by p
  // and t. 0 for a masked row, which is not read. `grad` may be the attention itself.
  void (*row_combine)(
      const Incoming& incoming,
      const at::Tensor& pred,         // [M, D] any floating dtype
      const at::Tensor& target,       // [M, D] the same
      const at::Tensor& attention,    // [M, D] real, or [0, D] without infonce
      const at::Tensor& columns,      // [kColumns, D] real, or [0, D] without terms of columns
      const at::Tensor& rows,         // [kRowScalars, M]
      const TermList& terms,
      const Temperature& temperature,
      const at::Tensor& grad);        // [M, D] any floating dtype, out

  // grad = -sum over the rows of weight/|p| p.o / temperature^2, times what arrives at InfoNCE.
  void (*temperature_grad)(
      const Incoming& incoming,
      const at::Tensor& rows,         // [kRowScalars, N]
      const TermList& terms,
      const Temperature& temperature,
      const at::Tensor& grad);        // [] in the dtype of the temperature, out

  // The rows with pred and target exchanged, so that row_dots and row_combine give the gradient of the target.
  void (*mirror_rows)(
      const at::Tensor& rows,       // [kRowScalars, N]
      const at::Tensor& mirrored);  // [kRowScalars, N], out: kWeight ... kOthers and kColMax, kColOthers, kPositives

  // The same for columns, with h of the target in place of that of pred, and no variance.
  void (*mirror_columns)(
      const at::Tensor& columns,    // [kColumns, D] real
      const at::Tensor& mirrored);  // [kColumns, D] real, out

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
      const at::Tensor& weights,  // [m] real, out
      const at::Tensor& loss);    // [] real, out: weights.values
};

inline Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    case at::kHalf:
      return Dtype::kHalf;
    case at::kBFloat16:
      return Dtype::kBfloat16;
    default:
      TORCH_CHECK(false, "amn_kernels: no kernels for dtype ", x.scalar_type());
  }
}

// x with unit stride along D. Rows that overlap lose it where they are converted: Tensor::to sorts their strides anew.
inline at::Tensor with_unit_stride(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

// Those of the device of x; an error without any.
const Primitives& primitives_for(const at::Tensor& x);

namespace cpu {
extern const Primitives primitives;
const char* isa();  // the instruction set that run-time dispatch chose
}  // namespace cpu

namespace cuda {
extern const Primitives primitives;  // where csrc/cuda was compiled: AMN_CUDA is defined
}  // namespace cuda

}  // namespace amn
