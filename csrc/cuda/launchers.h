// The kernels as functions of the host, one for every primitive of primitives.h, where the arguments are documented.
// Free of torch: plain pointers, sizes and strides. A launcher only starts kernels on the stream; it reads nothing from
// the device. Symbols in shapes: primitives.h.
#pragma once

#include <cstdint>

#include "../types.h"
#include "launch.h"

namespace amn::cuda {

// A matrix [rows, cols], or `groups` of them as [G, rows, cols]; vectors are rows. Unit stride along cols; strides in
// elements.
struct Matrix {
  void* data;  // null: there is none
  Dtype dtype;
  int64_t groups, rows, cols;
  int64_t group_stride, row_stride;
};

// Whether rows of these two are computed in float64; float32 else.
inline bool is_double(const Matrix& a, const Matrix& b) {
  return a.dtype == Dtype::kDouble || b.dtype == Dtype::kDouble;
}

// Row scalars [kRowScalars, G M] float64; the rows of group g are the columns g M ... (g + 1) M.
struct Scalars {
  double* data;
  int64_t stride;
};

// A number, or where it is learned a 0-dim tensor, which is read on the device.
struct Temperature {
  double number;
  const void* learned;  // or null
  Dtype dtype;
};

// The gradients that reach the values: grad_loss weights + grad_values. [m] real, the first a single number; any of
// grad_loss and grad_values may be null, and terms that send nothing are not read.
struct Incoming {
  const void* grad_loss;
  const void* weights;
  const void* grad_values;
  TermList terms;
};

// The running state of balanced weights, [m] each but calls: see balance in primitives.h.
struct BalanceState {
  float* mean;
  int64_t* updates;
  int64_t* calls;
  int64_t* skipped;
  const double* lambdas;
  const float* most;
};

// Which keys a row leaves out or takes as positives: struct Pairs of primitives.h.
struct Pairs {
  const int64_t* row_ids;  // [G C], or null without ids
  const int64_t* key_ids;  // [G, id_keys]
  int64_t id_keys;
  int64_t id_stride;       // between groups
  Matrix guide;            // [G, C, K] real, or null without a margin
  double margin;
};

void row_stats(
    const Matrix& pred, const Matrix& target, const Scalars& rows, const Matrix& key_scale, double weight,
    const InfonceForm& form, cudaStream_t stream);

void softmax_rows_(
    const Matrix& logits, const Matrix& key_scale, const Scalars& rows, const Matrix& rescale, const Matrix& weights,
    const Pairs& pairs, int64_t own, const Temperature& temperature, cudaStream_t stream);

void softmax_stats_(
    const Matrix& logits, const Matrix& key_scale, const Scalars& rows, const Pairs& pairs, const InfonceForm& form,
    int64_t own, const Temperature& temperature, cudaStream_t stream);

void softmax_weights_(
    const Matrix& logits, const Matrix& key_scale, const Scalars& rows, const Matrix& col_max,
    const Matrix& col_factor, const Pairs& pairs, const InfonceForm& form, int64_t own, bool raw,
    const Temperature& temperature, cudaStream_t stream);

void softmax_cols(
    const Matrix& logits, const Scalars& key_rows, int64_t cols, const Pairs& pairs, const InfonceForm& form,
    cudaStream_t stream);

void col_factors(
    const Scalars& key_rows, int64_t keys, const Matrix& col_max, const Matrix& col_factor,
    const Temperature& temperature, cudaStream_t stream);

void row_dots(
    const Matrix& pred, const Matrix& target, const Matrix& attention, const Scalars& rows, Attention held,
    const InfonceForm& form, const Temperature& temperature, cudaStream_t stream);

void row_combine(
    const Incoming& incoming, const Matrix& pred, const Matrix& target, const Matrix& attention, const Matrix& columns,
    const Scalars& rows, const Temperature& temperature, const Matrix& grad, Dtype real, cudaStream_t stream);

// `partial` is scratch memory of col_stats_scratch(M, D) numbers of the dtype that is computed in.
int64_t col_stats_scratch(int64_t rows, int64_t dim);
void col_stats(
    const Matrix& pred, const Matrix& target, const Scalars& rows, double* moments, double* count, void* partial,
    cudaStream_t stream);

void col_terms(
    const double* moments, const double* count, double gamma, const Matrix& columns, double* values,
    cudaStream_t stream);

void col_dots(
    const Matrix& pred, const Matrix& target, const Matrix& attention, const Matrix& columns, const Scalars& rows,
    cudaStream_t stream);

// `partial` is scratch memory of term_sums_scratch(N) numbers. values, gram and metrics are real, as is loss, which is
// weights.values; gram and loss may be null.
int64_t term_sums_scratch(int64_t rows);
void term_sums(
    const Scalars& rows, int64_t count, const double* col_values, const TermList& terms, const InfonceForm& form,
    int64_t dim, const Temperature& temperature, Dtype real, double* partial, const void* weights, void* values,
    void* gram, void* metrics, void* loss, cudaStream_t stream);

void mirror_rows(const Scalars& rows, const Scalars& mirrored, int64_t count, cudaStream_t stream);
void mirror_columns(const Matrix& columns, const Matrix& mirrored, cudaStream_t stream);

void balance(
    const void* values, const void* gram, const BalanceState& state, int64_t terms, const BalanceOptions& options,
    Dtype real, void* weights, void* loss, cudaStream_t stream);

void temperature_grad(
    const Scalars& rows, int64_t count, const Incoming& incoming, const Temperature& temperature, Dtype real,
    void* grad, cudaStream_t stream);

}  // namespace amn::cuda
