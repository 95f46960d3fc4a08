// The arithmetic of the CPU primitives on plain pointers, compiled once per instruction set (row_kernels_*.cpp) and
// chosen at run time. Every function works on the rows [begin, end) of its arguments; threads split the rows.
#pragma once

#include <cstdint>

#include "../types.h"

namespace amn::cpu {

template <class T>
struct Matrix {  // [rows, cols], unit stride along cols
  T* data;
  int64_t stride;
  int64_t cols;
  T* row(int64_t i) const { return data + i * stride; }
};

// Numbers of 16 bits as they are in memory.
struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

// Rows as they lie in memory: in T, the type that is computed in, or in 16 bits where T is float32. Unit stride along
// cols.
struct AnyRows {
  const char* data;
  Dtype dtype;
  int64_t stride;  // bytes
  int64_t cols;

  template <class S>
  Matrix<const S> of() const {
    return {reinterpret_cast<const S*>(data), stride / int64_t{sizeof(S)}, cols};
  }
};

// Row scalars [kRowScalars, M]: see RowScalar in types.h.
struct Scalars {
  double* data;
  int64_t stride;
  double& at(int64_t scalar, int64_t row) const { return data[scalar * stride + row]; }
};

// Which keys a row leaves out or takes as positives: struct Pairs of primitives.h, for one group.
template <class T>
struct KeyPairs {
  const int64_t* row_ids;  // [M], or null without ids
  const int64_t* key_ids;  // [id_keys]
  int64_t id_keys;
  Matrix<const T> guide;   // [M, K]; data is null without a margin
  T margin;
};

// Weight of each term's gradient, with what is common to all rows multiplied in; 0 for a term that is absent.
struct Coefficients {
  double mse;      // g 2/D
  double cosine;   // g
  double infonce;  // g / temperature
  double moment;   // g
  double variance; // g
};

template <class T>
struct RowKernels {
  void (*row_stats)(  // data of a copy may be null
      AnyRows pred, AnyRows target, Matrix<T> pred_copy, Matrix<T> target_copy, Scalars rows, T* key_scale,
      int64_t begin, int64_t end);
  void (*softmax_rows_)(  // rescale may be null
      Matrix<T> logits, const T* key_scale, Scalars rows, T* rescale, KeyPairs<T> pairs, int64_t own,
      double temperature, int64_t begin, int64_t end);
  void (*softmax_stats_)(
      Matrix<T> logits, const T* key_scale, Scalars rows, KeyPairs<T> pairs, InfonceForm form, int64_t own,
      double temperature, int64_t begin, int64_t end);
  // Columns [begin, end) over all rows of the logits.
  void (*softmax_cols)(
      Matrix<const T> logits, Scalars key_rows, KeyPairs<T> pairs, InfonceForm form, int64_t begin, int64_t end,
      int64_t row_count);
  void (*softmax_weights_)(  // cols may be null: one direction
      Matrix<T> logits, const T* key_scale, Scalars rows, const T* col_max, const T* col_factor, int64_t col_keys,
      KeyPairs<T> pairs, InfonceForm form, int64_t own, bool raw, double temperature, int64_t begin, int64_t end);
  void (*row_dots)(
      Matrix<const T> pred, Matrix<const T> target, Matrix<T> attention, Scalars rows, Attention held,
      InfonceForm form, double temperature, int64_t begin, int64_t end);
  // Columns [begin, end) over all rows; count is that before these rows.
  void (*col_stats)(
      Matrix<const T> pred, Matrix<const T> target, Scalars rows, Matrix<double> moments, double count, int64_t begin,
      int64_t end, int64_t row_count);
  void (*col_dots)(
      Matrix<const T> pred, Matrix<const T> target, Matrix<const T> attention, Matrix<const T> columns, Scalars rows,
      int64_t begin, int64_t end);
  void (*row_combine)(  // grad: in the dtype of pred, its stride in bytes; may be the attention itself
      AnyRows pred, AnyRows target, Matrix<const T> attention, Matrix<const T> columns, Scalars rows,
      Coefficients weights, Matrix<char> grad, int64_t begin, int64_t end);
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

// The set that serves this machine.
template <class T>
const RowKernels<T>& kernels();

}  // namespace amn::cpu
