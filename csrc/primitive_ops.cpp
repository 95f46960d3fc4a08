// The primitives of a tensor's device; and as ops, for the same algorithm in Python (amn_kernels/algorithm.py).
// Arguments: primitives.h.
#include <torch/library.h>

#include <string>

#include "primitives.h"

namespace amn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Temperature temperature_of(double number, const OptionalTensor& learned) {
  return {number, learned.value_or(Tensor())};
}

Pairs pairs_of(
    const OptionalTensor& row_ids, const OptionalTensor& key_ids, const OptionalTensor& guide, double margin) {
  return {row_ids.value_or(Tensor()), key_ids.value_or(Tensor()), guide.value_or(Tensor()), margin};
}

TermList term_list(at::IntArrayRef terms, at::IntArrayRef differentiable) {
  TermList list;
  for (size_t i = 0; i < terms.size(); ++i) {
    list.term[list.size] = terms[i];
    list.differentiable[list.size++] = differentiable[i] != 0;
  }
  return list;
}

void row_stats(
    const Tensor& pred, const Tensor& target, const Tensor& rows, const Tensor& key_scale, bool both,
    bool positives_by_id) {
  primitives_for(pred).row_stats(pred, target, rows, key_scale, /*weight=*/-1, {both, positives_by_id}, {}, {});
}

void softmax_rows_(
    const Tensor& logits, const Tensor& key_scale, const Tensor& rows, const Tensor& rescale,
    const OptionalTensor& row_ids, const OptionalTensor& key_ids, const OptionalTensor& guide, double margin,
    int64_t own, double temperature, const OptionalTensor& learned) {
  primitives_for(logits).softmax_rows_(
      logits, key_scale, rows, rescale, /*weights=*/logits, pairs_of(row_ids, key_ids, guide, margin), own,
      temperature_of(temperature, learned));
}

void softmax_stats_(
    const Tensor& logits, const Tensor& key_scale, const Tensor& rows, const OptionalTensor& row_ids,
    const OptionalTensor& key_ids, const OptionalTensor& guide, double margin, bool both, bool positives_by_id,
    int64_t own, double temperature, const OptionalTensor& learned) {
  primitives_for(logits).softmax_stats_(
      logits, key_scale, rows, pairs_of(row_ids, key_ids, guide, margin), {both, positives_by_id}, own,
      temperature_of(temperature, learned));
}

void softmax_cols(
    const Tensor& logits, const Tensor& key_rows, const OptionalTensor& row_ids, const OptionalTensor& key_ids,
    bool both, bool positives_by_id) {
  primitives_for(logits).softmax_cols(
      logits, key_rows, pairs_of(row_ids, key_ids, std::nullopt, -1), {both, positives_by_id});
}

void col_factors(const Tensor& key_rows, const Tensor& cols, double temperature, const OptionalTensor& learned) {
  primitives_for(key_rows).col_factors(key_rows, cols, temperature_of(temperature, learned));
}

void softmax_weights_(
    const Tensor& logits, const Tensor& key_scale, const Tensor& rows, const Tensor& cols,
    const OptionalTensor& row_ids, const OptionalTensor& key_ids, const OptionalTensor& guide, double margin,
    bool both, bool positives_by_id, int64_t own, bool raw, double temperature, const OptionalTensor& learned) {
  primitives_for(logits).softmax_weights_(
      logits, key_scale, rows, cols, pairs_of(row_ids, key_ids, guide, margin), {both, positives_by_id}, own, raw,
      temperature_of(temperature, learned));
}

void row_dots(
    const Tensor& pred, const Tensor& target, const Tensor& attention, const Tensor& rows, int64_t held, bool both,
    bool positives_by_id, double temperature, const OptionalTensor& learned) {
  primitives_for(pred).row_dots(
      pred, target, attention, rows, static_cast<Attention>(held), {both, positives_by_id},
      temperature_of(temperature, learned));
}

void term_sums(
    const Tensor& rows, const Tensor& col_values, at::IntArrayRef terms, at::IntArrayRef differentiable, bool both,
    bool positives_by_id, int64_t dim, double temperature, const OptionalTensor& learned, const Tensor& values,
    const Tensor& gram, const Tensor& metrics) {
  primitives_for(rows).term_sums(
      rows, col_values, term_list(terms, differentiable), {both, positives_by_id}, dim,
      temperature_of(temperature, learned), Tensor(), values, gram, metrics, Tensor());
}

void row_combine(
    const Tensor& grad_values, const Tensor& pred, const Tensor& target, const Tensor& attention,
    const Tensor& columns, const Tensor& rows, at::IntArrayRef terms, at::IntArrayRef differentiable,
    double temperature, const OptionalTensor& learned, const Tensor& grad) {
  primitives_for(pred).row_combine(
      {Tensor(), Tensor(), grad_values}, pred, target, attention, columns, rows, term_list(terms, differentiable),
      temperature_of(temperature, learned), grad);
}

TORCH_LIBRARY_FRAGMENT(amn_kernels, m) {
  m.def(
      "_row_stats(Tensor pred, Tensor target, Tensor(a!) rows, Tensor(b!) key_scale, bool both, bool positives_by_id)"
      " -> ()");
  m.def(
      "_softmax_rows_(Tensor(a!) logits, Tensor key_scale, Tensor(b!) rows, Tensor(c!) rescale, Tensor? row_ids,"
      " Tensor? key_ids, Tensor? guide, float margin, int own, float temperature, Tensor? learned) -> ()");
  m.def(
      "_softmax_stats_(Tensor(a!) logits, Tensor key_scale, Tensor(b!) rows, Tensor? row_ids, Tensor? key_ids,"
      " Tensor? guide, float margin, bool both, bool positives_by_id, int own, float temperature, Tensor? learned)"
      " -> ()");
  m.def(
      "_softmax_cols(Tensor logits, Tensor(a!) key_rows, Tensor? row_ids, Tensor? key_ids, bool both,"
      " bool positives_by_id) -> ()");
  m.def("_col_factors(Tensor key_rows, Tensor(a!) cols, float temperature, Tensor? learned) -> ()");
  m.def(
      "_softmax_weights_(Tensor(a!) logits, Tensor key_scale, Tensor rows, Tensor cols, Tensor? row_ids,"
      " Tensor? key_ids, Tensor? guide, float margin, bool both, bool positives_by_id, int own, bool raw,"
      " float temperature, Tensor? learned) -> ()");
  m.def(
      "_row_dots(Tensor pred, Tensor target, Tensor(a!) attention, Tensor(b!) rows, int held, bool both,"
      " bool positives_by_id, float temperature, Tensor? learned) -> ()");
  m.def("_col_stats(Tensor pred, Tensor target, Tensor rows, Tensor(a!) moments, Tensor(b!) count) -> ()");
  m.def("_col_terms(Tensor moments, Tensor count, float gamma, Tensor(a!) columns, Tensor(b!) values) -> ()");
  m.def("_col_dots(Tensor pred, Tensor target, Tensor attention, Tensor columns, Tensor(a!) rows) -> ()");
  m.def(
      "_term_sums(Tensor rows, Tensor col_values, int[] terms, int[] differentiable, bool both, bool positives_by_id,"
      " int dim, float temperature, Tensor? learned, Tensor(a!) values, Tensor(b!) gram, Tensor(c!) metrics) -> ()");
  m.def(
      "_row_combine(Tensor grad_values, Tensor pred, Tensor target, Tensor attention, Tensor columns, Tensor rows,"
      " int[] terms, int[] differentiable, float temperature, Tensor? learned, Tensor(a!) grad) -> ()");
  m.def("_mirror_rows(Tensor rows, Tensor(a!) mirrored) -> ()");
  m.def("_mirror_columns(Tensor columns, Tensor(a!) mirrored) -> ()");
}

void register_for(torch::Library& m, const Primitives& prim) {
  m.impl("_row_stats", row_stats);
  m.impl("_softmax_rows_", softmax_rows_);
  m.impl("_softmax_stats_", softmax_stats_);
  m.impl("_softmax_cols", softmax_cols);
  m.impl("_col_factors", col_factors);
  m.impl("_softmax_weights_", softmax_weights_);
  m.impl("_row_dots", row_dots);
  m.impl("_col_stats", prim.col_stats);
  m.impl("_col_terms", prim.col_terms);
  m.impl("_col_dots", prim.col_dots);
  m.impl("_term_sums", term_sums);
  m.impl("_row_combine", row_combine);
  m.impl("_mirror_rows", prim.mirror_rows);
  m.impl("_mirror_columns", prim.mirror_columns);
}

TORCH_LIBRARY_IMPL(amn_kernels, CPU, m) { register_for(m, cpu::primitives); }
#ifdef AMN_CUDA
TORCH_LIBRARY_IMPL(amn_kernels, CUDA, m) { register_for(m, cuda::primitives); }
#endif

TORCH_LIBRARY_IMPL(amn_kernels, CompositeImplicitAutograd, m) {
  m.impl("_cpu_isa", [] { return std::string(cpu::isa()); });
}

}  // namespace

const Primitives& primitives_for(const Tensor& x) {
#ifdef AMN_CUDA
  if (x.is_cuda()) return cuda::primitives;
#endif
  TORCH_CHECK(x.device().is_cpu(), "amn_kernels: no compiled primitives for device ", x.device());
  return cpu::primitives;
}

}  // namespace amn
