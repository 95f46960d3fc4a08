// The primitives of primitives.h on CUDA devices: tensors to plain arguments, the tensors' device and the current
// stream, and a check of every launch.
#include <ATen/ATen.h>

#include "../primitives.h"
#include "launchers.h"

#ifndef AMN_SIMT
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace amn::cuda {
namespace {

using at::Tensor;

// Calls launch(stream) on the device of x.
template <class F>
void on_device_of(const Tensor& x, const F& launch) {
#ifdef AMN_SIMT
  launch(cudaStream_t{});
#else
  const c10::cuda::CUDAGuard guard(x.device());
  launch(c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

// [M, D], [G, M, D], or a vector [M] as one row; without elements there is none.
Matrix matrix(const Tensor& x) {
  if (!x.defined() || x.numel() == 0) return {nullptr, Dtype::kAny, 1, 0, 0, 0, 0};
  const int64_t dims = x.dim();
  TORCH_INTERNAL_ASSERT(x.size(-1) == 1 || x.stride(-1) == 1, "unit stride along the last dimension");
  return {x.data_ptr(),
          dtype_of(x),
          dims == 3 ? x.size(0) : 1,
          dims >= 2 ? x.size(-2) : 1,
          x.size(-1),
          dims == 3 ? x.stride(0) : 0,
          dims >= 2 ? x.stride(-2) : 0};
}

// A vector [M], or one per group as [G, M].
Matrix vectors(const Tensor& x) {
  return x.dim() == 2 ? matrix(x.unsqueeze(1)) : matrix(x);
}

Scalars scalars(const Tensor& rows) { return {rows.data_ptr<double>(), rows.stride(0)}; }

Temperature temperature_of(const amn::Temperature& temperature) {
  const Tensor& learned = temperature.learned;
  if (!learned.defined()) return {temperature.number, nullptr, Dtype::kAny};
  return {temperature.number, learned.const_data_ptr(), dtype_of(learned)};
}

Pairs pairs_of(const amn::Pairs& pairs) {
  Pairs out{nullptr, nullptr, 0, 0, matrix(pairs.guide), pairs.margin};
  if (pairs.key_ids.defined()) {
    out.row_ids = pairs.row_ids.const_data_ptr<int64_t>();
    out.key_ids = pairs.key_ids.const_data_ptr<int64_t>();
    out.id_keys = pairs.key_ids.size(-1);
    out.id_stride = pairs.key_ids.dim() == 2 ? pairs.key_ids.stride(0) : 0;
  }
  return out;
}

const void* data_of(const Tensor& x) { return x.defined() && x.numel() > 0 ? x.const_data_ptr() : nullptr; }
void* mutable_data_of(const Tensor& x) { return x.defined() && x.numel() > 0 ? x.data_ptr() : nullptr; }

Incoming incoming_of(const amn::Incoming& incoming, const TermList& terms) {
  return {data_of(incoming.grad_loss), data_of(incoming.weights), data_of(incoming.grad_values), terms};
}

// The dtype of what arrives at the values, which is the one that is computed in.
Dtype real_of(const amn::Incoming& incoming) {
  return dtype_of(incoming.grad_loss.defined() ? incoming.grad_loss : incoming.grad_values);
}

void prepare_memory(const Tensor&) {}

void row_stats_of(
    const Tensor& pred, const Tensor& target, const Tensor& rows, const Tensor& key_scale, double weight,
    const InfonceForm& form, const Tensor& pred_copy, const Tensor& target_copy) {
  TORCH_INTERNAL_ASSERT(!pred_copy.defined() && !target_copy.defined(), "rows are multiplied as they are");
  on_device_of(pred, [&](cudaStream_t stream) {
    row_stats(matrix(pred), matrix(target), scalars(rows), vectors(key_scale), weight, form, stream);
  });
}

void softmax_rows_of(
    const Tensor& logits, const Tensor& key_scale, const Tensor& rows, const Tensor& rescale, const Tensor& weights,
    const amn::Pairs& pairs, int64_t own, const amn::Temperature& temperature) {
  on_device_of(logits, [&](cudaStream_t stream) {
    softmax_rows_(
        matrix(logits), vectors(key_scale), scalars(rows), matrix(rescale), matrix(weights), pairs_of(pairs), own,
        temperature_of(temperature), stream);
  });
}

void softmax_stats_of(
    const Tensor& logits, const Tensor& key_scale, const Tensor& rows, const amn::Pairs& pairs,
    const InfonceForm& form, int64_t own, const amn::Temperature& temperature) {
  on_device_of(logits, [&](cudaStream_t stream) {
    softmax_stats_(
        matrix(logits), vectors(key_scale), scalars(rows), pairs_of(pairs), form, own, temperature_of(temperature),
        stream);
  });
}

void softmax_cols_of(
    const Tensor& logits, const Tensor& key_rows, const amn::Pairs& pairs, const InfonceForm& form) {
  on_device_of(logits, [&](cudaStream_t stream) {
    const Matrix s = matrix(logits);
    softmax_cols(s, scalars(key_rows), key_rows.size(1) / s.groups, pairs_of(pairs), form, stream);
  });
}

void col_factors_of(const Tensor& key_rows, const Tensor& cols, const amn::Temperature& temperature) {
  on_device_of(key_rows, [&](cudaStream_t stream) {
    col_factors(
        scalars(key_rows), key_rows.size(1), matrix(cols.select(0, 0)), matrix(cols.select(0, 1)),
        temperature_of(temperature), stream);
  });
}

void softmax_weights_of(
    const Tensor& logits, const Tensor& key_scale, const Tensor& rows, const Tensor& cols, const amn::Pairs& pairs,
    const InfonceForm& form, int64_t own, bool raw, const amn::Temperature& temperature) {
  on_device_of(logits, [&](cudaStream_t stream) {
    softmax_weights_(
        matrix(logits), vectors(key_scale), scalars(rows), vectors(cols.select(0, 0)), vectors(cols.select(0, 1)),
        pairs_of(pairs), form, own, raw, temperature_of(temperature), stream);
  });
}

void row_dots_of(
    const Tensor& pred, const Tensor& target, const Tensor& attention, const Tensor& rows, Attention held,
    const InfonceForm& form, const amn::Temperature& temperature) {
  on_device_of(pred, [&](cudaStream_t stream) {
    row_dots(
        matrix(pred), matrix(target), matrix(attention), scalars(rows), held, form, temperature_of(temperature),
        stream);
  });
}

void col_stats_of(
    const Tensor& pred, const Tensor& target, const Tensor& rows, const Tensor& moments, const Tensor& count) {
  const Matrix p = matrix(pred), t = matrix(target);
  const auto real = is_double(p, t) ? at::kDouble : at::kFloat;
  const Tensor partial = at::empty({col_stats_scratch(p.groups * p.rows, p.cols)}, pred.options().dtype(real));
  on_device_of(pred, [&](cudaStream_t stream) {
    col_stats(
        p, t, scalars(rows), moments.data_ptr<double>(), count.data_ptr<double>(), partial.data_ptr(), stream);
  });
}

void col_terms_of(
    const Tensor& moments, const Tensor& count, double gamma, const Tensor& columns, const Tensor& values) {
  on_device_of(moments, [&](cudaStream_t stream) {
    col_terms(
        moments.const_data_ptr<double>(), count.const_data_ptr<double>(), gamma, matrix(columns),
        values.data_ptr<double>(), stream);
  });
}

void col_dots_of(
    const Tensor& pred, const Tensor& target, const Tensor& attention, const Tensor& columns, const Tensor& rows) {
  on_device_of(pred, [&](cudaStream_t stream) {
    col_dots(matrix(pred), matrix(target), matrix(attention), matrix(columns), scalars(rows), stream);
  });
}

void term_sums_of(
    const Tensor& rows, const Tensor& col_values, const TermList& terms, const InfonceForm& form, int64_t dim,
    const amn::Temperature& temperature, const Tensor& weights, const Tensor& values, const Tensor& gram,
    const Tensor& metrics, const Tensor& loss) {
  const Tensor partial = at::empty({term_sums_scratch(rows.size(1))}, rows.options());
  on_device_of(rows, [&](cudaStream_t stream) {
    term_sums(
        scalars(rows), rows.size(1), static_cast<const double*>(data_of(col_values)), terms, form, dim,
        temperature_of(temperature), dtype_of(values), partial.data_ptr<double>(), data_of(weights), values.data_ptr(),
        mutable_data_of(gram), metrics.data_ptr(), mutable_data_of(loss), stream);
  });
}

void row_combine_of(
    const amn::Incoming& incoming, const Tensor& pred, const Tensor& target, const Tensor& attention,
    const Tensor& columns, const Tensor& rows, const TermList& terms, const amn::Temperature& temperature,
    const Tensor& grad) {
  on_device_of(pred, [&](cudaStream_t stream) {
    row_combine(
        incoming_of(incoming, terms), matrix(pred), matrix(target), matrix(attention), matrix(columns), scalars(rows),
        temperature_of(temperature), matrix(grad), real_of(incoming), stream);
  });
}

void temperature_grad_of(
    const amn::Incoming& incoming, const Tensor& rows, const TermList& terms, const amn::Temperature& temperature,
    const Tensor& grad) {
  on_device_of(rows, [&](cudaStream_t stream) {
    temperature_grad(
        scalars(rows), rows.size(1), incoming_of(incoming, terms), temperature_of(temperature), real_of(incoming),
        grad.data_ptr(), stream);
  });
}

void mirror_rows_of(const Tensor& rows, const Tensor& mirrored) {
  on_device_of(rows, [&](cudaStream_t stream) { mirror_rows(scalars(rows), scalars(mirrored), rows.size(1), stream); });
}

void mirror_columns_of(const Tensor& columns, const Tensor& mirrored) {
  on_device_of(columns, [&](cudaStream_t stream) { mirror_columns(matrix(columns), matrix(mirrored), stream); });
}

void balance_of(
    const Tensor& values, const Tensor& gram, const Tensor& mean, const Tensor& updates, const Tensor& calls,
    const Tensor& skipped, const Tensor& lambdas, const Tensor& most, const BalanceOptions& options,
    const Tensor& weights, const Tensor& loss) {
  const BalanceState state{
      mean.data_ptr<float>(),     updates.data_ptr<int64_t>(),      calls.data_ptr<int64_t>(),
      skipped.data_ptr<int64_t>(), lambdas.const_data_ptr<double>(), most.const_data_ptr<float>()};
  on_device_of(values, [&](cudaStream_t stream) {
    balance(
        values.const_data_ptr(), data_of(gram), state, values.numel(), options, dtype_of(values), weights.data_ptr(),
        loss.data_ptr(), stream);
  });
}

}  // namespace

const Primitives primitives = {
    /*reads_any_dtype=*/true, /*splits_memory=*/false, prepare_memory, row_stats_of, softmax_rows_of, softmax_stats_of,
    softmax_cols_of, col_factors_of, softmax_weights_of, row_dots_of, col_stats_of, col_terms_of, col_dots_of,
    term_sums_of, row_combine_of, temperature_grad_of, mirror_rows_of, mirror_columns_of, balance_of};

}  // namespace amn::cuda
