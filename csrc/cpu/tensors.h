// What the CPU primitives have in common: tensors to pointers, and threads over rows.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#include "../primitives.h"
#include "row_kernels.h"

namespace amn::cpu {

using at::Tensor;

// The primitives with a file of their own: balance.cpp, col_stats.cpp, term_sums.cpp.
std::remove_pointer_t<decltype(Primitives::balance)> balance;
std::remove_pointer_t<decltype(Primitives::col_stats)> col_stats;
std::remove_pointer_t<decltype(Primitives::col_terms)> col_terms;
std::remove_pointer_t<decltype(Primitives::col_dots)> col_dots;
std::remove_pointer_t<decltype(Primitives::term_sums)> term_sums;
std::remove_pointer_t<decltype(Primitives::temperature_grad)> temperature_grad;

// A matrix [M, cols], or G of them as [G, M, cols].
template <class T>
struct Batch {
  Matrix<T> first;
  int64_t stride;  // between matrices
  int64_t groups, rows;

  Matrix<T> of(int64_t group) const { return {first.data + group * stride, first.stride, first.cols}; }
  bool empty() const { return rows == 0; }
};

template <class T>
Batch<T> batch_of(const Tensor& x, T* data) {
  const bool many = x.dim() == 3;
  return {{data, x.stride(-2), x.size(-1)}, many ? x.stride(0) : 0, many ? x.size(0) : 1, x.size(-2)};
}

template <class T>
Batch<T> batch(const Tensor& x) {
  return batch_of<T>(x, x.data_ptr<T>());
}

template <class T>
Batch<T> batch_or_none(const Tensor& x) {
  return x.defined() ? batch<T>(x) : Batch<T>{};
}

template <class T>
Batch<const T> const_batch(const Tensor& x) {
  return batch_of<const T>(x, x.const_data_ptr<T>());
}

// Bytes from group to group and from row to row of [M, D] or [G, M, D].
inline int64_t group_bytes(const Tensor& x) { return x.dim() == 3 ? x.stride(0) * x.itemsize() : 0; }
inline int64_t row_bytes(const Tensor& x) { return x.stride(-2) * x.itemsize(); }

// Rows as they are stored, [M, D] or [G, M, D].
struct AnyBatch {
  explicit AnyBatch(const Tensor& x)
      : first{static_cast<const char*>(x.const_data_ptr()), dtype_of(x), row_bytes(x), x.size(-1)},
        stride(group_bytes(x)), groups(x.dim() == 3 ? x.size(0) : 1), rows(x.size(-2)) {}

  AnyRows of(int64_t group) const {
    AnyRows x = first;
    x.data += group * stride;
    return x;
  }

  AnyRows first;
  int64_t stride;
  int64_t groups, rows;
};

// Whether the kernels read and write x as it is stored when they compute in `real`.
inline bool is_read_as_stored(const Tensor& x, at::ScalarType real) {
  return x.scalar_type() == real || (real == at::kFloat && x.itemsize() == 2);
}

// A vector [M], or one per group as [G, M].
template <class T>
struct Vectors {
  T* data;
  int64_t stride;
  T* of(int64_t group) const { return data + group * stride; }
};

template <class T>
Vectors<T> vectors_of(const Tensor& x, T* data) {
  return {data, x.dim() == 2 ? x.stride(0) : 0};
}

// Scalars of the rows from `first` on.
inline Scalars scalars(const Tensor& rows, int64_t first = 0) {
  return {rows.data_ptr<double>() + first, rows.stride(0)};
}

inline double value_of(const Temperature& temperature) {
  return temperature.learned.defined() ? temperature.learned.item<double>() : temperature.number;
}

// Calls f(group, begin, end) for the rows of every group, split over threads in parts of at least about 32 thousand
// elements, so that waking a thread is worth it.
template <class F>
void parallel_rows(int64_t groups, int64_t rows, int64_t cols, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cols));
  at::parallel_for(0, groups * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin / std::max<int64_t>(1, rows); begin < end; ++group) {
      const int64_t first = group * rows, last = std::min(end, first + rows);
      f(group, begin - first, last - first);
      begin = last;
    }
  });
}

// The same for the columns of matrices, in stripes of whole vectors.
template <class F>
void parallel_columns(int64_t groups, int64_t cols, int64_t rows, const F& f) {
  constexpr int64_t kStripe = 128;
  const int64_t stripes = (cols + kStripe - 1) / kStripe;
  parallel_rows(groups, stripes, kStripe * rows, [&](int64_t group, int64_t begin, int64_t end) {
    f(group, begin * kStripe, std::min(cols, end * kStripe));
  });
}

// What arrives at the value of a term; 0 for one that is absent or monitored.
template <class T>
double incoming_of(const Incoming& incoming, const TermList& terms, Term term) {
  if (!terms.sends(term)) return 0;
  const int64_t i = terms.find(term);
  T sum = 0;
  if (incoming.grad_loss.defined()) {
    sum = *incoming.grad_loss.const_data_ptr<T>() * incoming.weights.const_data_ptr<T>()[i];
  }
  if (incoming.grad_values.defined()) sum += incoming.grad_values.const_data_ptr<T>()[i];
  return sum;
}

}  // namespace amn::cpu
