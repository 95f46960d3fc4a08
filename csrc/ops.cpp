// Schemas of the ops, and the empty Python module that loads them. Implementations: autograd.cpp.
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(amn_kernels, m) {
  // loss [] = weights.values and the values [m] of the terms, both differentiable in pred, target, extra_negatives and
  // learned_temperature; gram [m, m] of the gradients of the terms with respect to pred, [0, 0] where none was asked
  // for; metrics [5]. Enumerations: csrc/seq_loss.h. A negative false_negative_margin or variance_target is none.
  m.def(
      "seq_loss_fixed(Tensor pred, Tensor target, Tensor weights, Tensor? mask, Tensor? ids, Tensor? extra_negatives,"
      " Tensor? learned_temperature, int[] terms, int[] monitored, float temperature, bool both, int negatives,"
      " bool positives_by_id, float false_negative_margin, float variance_target, int chunk_bytes)"
      " -> (Tensor loss, Tensor values, Tensor gram, Tensor metrics)");
  // The same with balanced weights, which are returned last; the running state is updated in place: see _balance.
  m.def(
      "seq_loss_balanced(Tensor pred, Tensor target, Tensor(a!) mean, Tensor(b!) updates, Tensor(c!) calls,"
      " Tensor(d!) skipped, Tensor lambdas, Tensor most, int anchor, float decay, int update_every, bool by_value,"
      " bool update, Tensor? mask, Tensor? ids, Tensor? extra_negatives, Tensor? learned_temperature, int[] terms,"
      " int[] monitored, float temperature, bool both, int negatives, bool positives_by_id,"
      " float false_negative_margin, float variance_target, int chunk_bytes)"
      " -> (Tensor loss, Tensor values, Tensor gram, Tensor metrics, Tensor weights)");
  // The forward half, with what the backward needs, in sections for pred, target and extra_negatives as far as they
  // need a gradient: row scalars [kRowScalars or kPlainRowScalars, N + N + K] and attention outputs [N + N + K, D];
  // columns [kColumns, D] or [0, D]. Without weights the loss is empty, [0].
  m.def(
      "_seq_loss_forward(Tensor pred, Tensor target, Tensor? weights, Tensor? mask, Tensor? ids,"
      " Tensor? extra_negatives, Tensor? learned_temperature, int[] terms, int[] monitored, float temperature,"
      " bool both, int negatives, bool positives_by_id, float false_negative_margin, float variance_target,"
      " int chunk_bytes, int needs)"
      " -> (Tensor loss, Tensor values, Tensor gram, Tensor metrics, Tensor rows, Tensor attention, Tensor columns)");
  // Gradients of pred, target, extra_negatives, learned_temperature: those that `needs` names, in this order. What
  // arrives at the values is grad_loss weights + grad_values.
  m.def(
      "_seq_loss_backward(Tensor? grad_loss, Tensor? weights, Tensor? grad_values, Tensor pred, Tensor target,"
      " Tensor? mask, Tensor? ids, Tensor? extra_negatives, Tensor? learned_temperature, Tensor rows,"
      " Tensor attention, Tensor columns, int[] terms, int[] monitored, float temperature, bool both, int negatives,"
      " bool positives_by_id, float false_negative_margin, float variance_target, int needs) -> Tensor[]");
  // Weights [m] in the dtype of the values, and the loss [] = weights.values; updates the running state in place. gram
  // may be [0, 0]: nothing to observe.
  m.def(
      "_balance(Tensor values, Tensor gram, Tensor(a!) mean, Tensor(b!) updates, Tensor(c!) calls,"
      " Tensor(d!) skipped, Tensor lambdas, Tensor most, int anchor, float decay, int update_every, bool by_value,"
      " bool update) -> (Tensor weights, Tensor loss)");
  m.def("_cpu_isa() -> str");
}

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
