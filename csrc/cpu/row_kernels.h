// The arithmetic of the CPU primitives on plain pointers, compiled once per instruction set (row_kernels_*.cpp) and
// chosen at run time. Every function works on the rows [begin, end) of its arguments; threads split the rows.
#pragma once

#include <cstdint>

namespace amn::cpu {

template <class T>
struct Matrix {  // [rows, cols], unit stride along cols
  T* data;
  int64_t stride;
  int64_t cols;
  T* row(int64_t i) const { return data + i * stride; }
};

// Row scalars [kRowScalars, M]: see RowScalar in primitives.h.
struct Scalars {
  double* data;
  int64_t stride;
  double& at(int64_t scalar, int64_t row) const { return data[scalar * stride + row]; }
};

// Weight of each term's gradient, with what is common to all rows multiplied in; 0 for a term that is absent.
struct Coefficients {
  double mse;      // g 2/(N D)
  double cosine;   // g / N
  double infonce;  // g / (N temperature)
};

template <class T>
struct RowKernels {
  void (*row_stats)(
      Matrix<const T> pred, Matrix<const T> target, Scalars rows, T* key_scale, int64_t begin, int64_t end);
  void (*softmax_rows_)(  // rescale may be null
      Matrix<T> logits, const T* key_scale, Scalars rows, T* rescale, int64_t own, double temperature, int64_t begin,
      int64_t end);
  void (*row_dots)(
      Matrix<const T> pred, Matrix<const T> target, Matrix<T> attention, Scalars rows, double temperature,
      int64_t begin, int64_t end);
  void (*row_combine)(
      Matrix<const T> pred, Matrix<const T> target, Matrix<const T> attention, Scalars rows, Coefficients weights,
      Matrix<T> grad, int64_t begin, int64_t end);
};

// One set per instruction set; x86-64 has all three, other machines the baseline only.
template <class T>
RowKernels<T> baseline_kernels();
#if defined(__x86_64__)
template <class T>
RowKernels<T> avx2_kernels();
template <class T>
RowKernels<T> avx512_kernels();
#endif

}  // namespace amn::cpu
