// Schemas of the ops, and the empty Python module that loads them. Implementations: seq_loss.cpp.
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(amn_kernels, m) {
  // loss [] = weights.values and the values [m] of the terms, both differentiable in pred; gram [m, m] of the gradients
  // of the terms, [0, 0] where none was asked for; metrics [5].
  m.def(
      "seq_loss(Tensor pred, Tensor target, Tensor weights, int[] terms, int[] monitored, float temperature,"
      " int chunk_bytes) -> (Tensor loss, Tensor values, Tensor gram, Tensor metrics)");
  // The same with what the backward needs: row scalars [R, N] and the attention output o [N, D].
  m.def(
      "_seq_loss_forward(Tensor pred, Tensor target, int[] terms, int[] monitored, float temperature,"
      " int chunk_bytes, bool with_gradient)"
      " -> (Tensor values, Tensor gram, Tensor metrics, Tensor rows, Tensor attention)");
  m.def(
      "_seq_loss_backward(Tensor grad_values, Tensor pred, Tensor target, Tensor rows, Tensor attention, int[] terms,"
      " int[] monitored, float temperature) -> Tensor");
  // Weights [m] in the dtype of the values; updates the running state in place. gram may be [0, 0]: nothing to observe.
  m.def(
      "_balance(Tensor values, Tensor gram, Tensor(a!) mean, Tensor(b!) updates, Tensor(c!) calls,"
      " Tensor(d!) skipped, Tensor lambdas, Tensor most, int anchor, float decay, int update_every, bool by_value,"
      " bool update) -> Tensor");
  m.def("_cpu_isa() -> str");
}

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
