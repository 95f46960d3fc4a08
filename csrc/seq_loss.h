// The two halves of the loss, below autograd: seq_loss.cpp has the algorithm, autograd.cpp the ops over it.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "primitives.h"

namespace amn {

// Which rows of [B, T, D] are each other's negatives, numbered as in amn_kernels/ops.py.
enum Negatives : int64_t { kAll = 0, kStep = 1, kSequence = 2 };

// What needs a gradient, as a sum of these.
enum Needs : int64_t { kNeedsPred = 1, kNeedsTarget = 2, kNeedsExtra = 4, kNeedsTemperature = 8 };

// Everything that says what is computed, besides the tensors of rows.
struct Options {
  TermList terms;
  Temperature temperature;
  InfonceForm form;
  int64_t negatives;
  double margin;           // < 0: none
  double variance_target;  // < 0: none
};

// Loss [] (or [0] without weights), values [m], Gram matrix [m, m] or [0, 0], metrics; and for the backward row
// scalars, attention and columns: see csrc/ops.cpp.
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// weights [m] are those of the loss; undefined without one. ids, mask and extra_negatives may be undefined.
Forward forward(
    const Options& options, const at::Tensor& pred, const at::Tensor& target, const at::Tensor& weights,
    const at::Tensor& mask, const at::Tensor& ids, const at::Tensor& extra_negatives, int64_t chunk_bytes,
    int64_t needs);

// The gradients that `needs` names, in the order of enum Needs. With `reuses_attention` they may take
// the place of the attention, which is not needed afterwards.
std::vector<at::Tensor> backward(
    const Options& options, const Incoming& incoming, const at::Tensor& pred, const at::Tensor& target,
    const at::Tensor& extra_negatives, const at::Tensor& all_rows, const at::Tensor& attention,
    const at::Tensor& columns, int64_t needs, bool reuses_attention);

}  // namespace amn
