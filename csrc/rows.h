// Rows of pred and target by group and in chunks, their products, and scratch memory: what the algorithm moves.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>

#include "seq_loss.h"

namespace amn {

using at::Tensor;

// Rows of a chunk on the CPU; on a GPU at least so many. Measured at D = 768 on two cores, N = 2,048 to 8,192: chunks
// of 256 rows took 6-18% longer, as the keys are packed anew for every product; 2,048 gained nothing beyond noise.
constexpr int64_t kChunkRows = 1024;

// x[begin : begin + count] along `dim`, without the cost of a view where that is all of x.
inline Tensor part(const Tensor& x, int64_t dim, int64_t begin, int64_t count) {
  return count == x.size(dim) ? x : x.narrow(dim, begin, count);
}

// Rows [begin, begin + count) of the groups [group, group + groups): several groups are always whole.
struct Chunk {
  int64_t group, groups, begin, count;
};

// [M, ...] or, of several groups, [G, M, ...]
inline Tensor rows_of(const Tensor& x, const Chunk& chunk) {
  if (chunk.groups > 1) return part(x, 0, chunk.group, chunk.groups);
  return part(x.dim() == 3 ? x.select(0, chunk.group) : x, 0, chunk.begin, chunk.count);
}

// Rows of a chunk in a tensor [N, D] whose rows are numbered group after group, [M, D] or [G, M, D].
inline Tensor view_rows(const Tensor& x, const Chunk& chunk, int64_t group_size) {
  const Tensor flat = part(x, 0, chunk.group * group_size + chunk.begin, chunk.groups * chunk.count);
  return chunk.groups > 1 ? flat.view({chunk.groups, chunk.count, x.size(1)}) : flat;
}

// The same of row scalars [R, N].
inline Tensor scalars_of(const Tensor& rows, const Chunk& chunk, int64_t group_size) {
  return part(rows, 1, chunk.group * group_size + chunk.begin, chunk.groups * chunk.count);
}

// The rows of [N, D] or [B, T, D], with unit stride along D, by group, read chunk by chunk in one dtype.
class Rows {
 public:
  Rows(const Tensor& x, int64_t negatives, at::ScalarType dtype, const Tensor& mask = {})
      : x_(grouped(x, negatives)), dtype_(dtype), mask_(mask.defined() ? mask.unsqueeze(-1) : mask) {}

  int64_t groups() const { return x_.dim() == 3 ? x_.size(0) : 1; }
  int64_t group_size() const { return x_.size(-2); }
  int64_t size() const { return groups() * group_size(); }
  int64_t dim() const { return x_.size(-1); }
  at::ScalarType dtype() const { return dtype_; }

  // True if chunks are views: nothing has to be widened or zeroed.
  bool direct() const { return !mask_.defined() && x_.scalar_type() == dtype_; }

  // All rows as they were given, [M, D] or [G, M, D]. Masked ones may hold NaN.
  const Tensor& given() const { return x_; }

  // From now on, rows come from a copy of the sizes of `given`, in the dtype, with masked rows zeroed.
  void keep(const Tensor& copy) {
    x_ = copy;
    mask_.reset();
  }

  Tensor chunk(const Chunk& chunk) const {  // [M, D] or [G, M, D]
    const Tensor view = rows_of(x_, chunk);
    if (direct()) return view;
    const Tensor rows = with_unit_stride(view.to(dtype_));
    // Masked rows may hold NaN, and 0 * NaN poisons a matrix product.
    return mask_.defined() ? rows.masked_fill(rows_of(mask_, chunk).logical_not(), 0) : rows;
  }

  Tensor all() const { return chunk({0, groups(), 0, group_size()}); }

  // [N, ...] or [B, T, ...] -> [N, ...] if all rows are one group, else [G, M, ...].
  static Tensor grouped(const Tensor& x, int64_t negatives, int64_t row_dims) {
    if (row_dims == 1) return x;
    if (negatives == kAll) return x.flatten(0, 1);
    const Tensor groups = negatives == kStep ? x.transpose(0, 1) : x;
    return groups.size(0) == 1 ? groups.select(0, 0) : groups;
  }

 private:
  static Tensor grouped(const Tensor& x, int64_t negatives) { return grouped(x, negatives, x.dim() - 1); }

  Tensor x_;  // [M, D] or [G, M, D]
  at::ScalarType dtype_;
  Tensor mask_;  // [M, 1] or [G, M, 1] bool, or undefined
};

// Calls f for chunks of at most `rows` rows, at least one; several groups at a time where they fit.
template <class F>
void for_chunks(int64_t groups, int64_t group_size, int64_t rows, const F& f) {
  const int64_t together = std::clamp<int64_t>(rows / std::max<int64_t>(1, group_size), 1, groups);
  for (int64_t group = 0; group < groups; group += together) {
    const int64_t count = std::min(together, groups - group);
    const int64_t step = count > 1 ? group_size : std::min(rows, group_size);
    for (int64_t begin = 0; begin < group_size; begin += step) {
      f(Chunk{group, count, begin, std::min(step, group_size - begin)});
    }
  }
}

template <class F>
void for_chunks(const Rows& rows, bool direct, const F& f) {
  for_chunks(rows.groups(), rows.group_size(), direct ? rows.size() : kChunkRows, f);
}

// out = a b, or out += a b; of matrices or batches of them. Operands of 16 bits are summed in float32.
inline void multiply(const Tensor& out_, const Tensor& a, const Tensor& b, bool accumulate) {
  Tensor out = out_;
  if (a.scalar_type() != out.scalar_type()) {
    const at::ScalarType wide = out.scalar_type();
    if (out.dim() == 2) {
      // As a batch of one where it is added to: addmm takes no float32 beside 16 bits before torch 2.10.
      Tensor batch = out.unsqueeze(0);
      accumulate ? at::baddbmm_out(batch, batch, a.unsqueeze(0), b.unsqueeze(0), wide) : at::mm_out(out, a, b, wide);
    } else {
      accumulate ? at::baddbmm_out(out, out, a, b, wide) : at::bmm_out(out, a, b, wide);
    }
  } else if (out.dim() == 2) {
    accumulate ? at::addmm_out(out, out, a, b) : at::mm_out(out, a, b);
  } else {
    accumulate ? at::baddbmm_out(out, out, a, b) : at::bmm_out(out, a, b);
  }
}

// Scratch memory that is taken in one size or another; none for 0.
class Scratch {
 public:
  Scratch(int64_t numel, const at::TensorOptions& options)
      : memory_(numel > 0 ? at::empty({numel}, options) : Tensor()) {}
  const Tensor& memory() const { return memory_; }
  // The numbers from `begin` on.
  Tensor take(at::IntArrayRef sizes, int64_t begin = 0) const {
    return part(memory_, 0, begin, c10::multiply_integers(sizes)).view(sizes);
  }

 private:
  Tensor memory_;
};

}  // namespace amn
