// The kernels as functions of the host, one for every primitive of primitives.h, where the arguments are documented.
// Free of torch: plain pointers, sizes and strides. A launcher only starts kernels on the stream; it reads nothing from
// the device. Symbols in shapes: primitives.h.
#pragma once

#include <cstdint>

#include "../row_scalars.h"
#include "launch.h"

namespace amn::cuda {

enum class Dtype : int32_t { kFloat, kDouble, kHalf, kBfloat16, kAny };  // kAny: of no matrix, any of them

// A matrix [rows, cols], or `groups` of them as [G, rows, cols]. Unit stride along cols; strides in elements.
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

// A vector [M] real, or one per group as [G, M].
struct Vectors {
  void* data;
  int64_t group_stride;
};

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
    const Matrix& pred, const Matrix& target, const Scalars& rows, const Vectors& key_scale, double weight,
    const InfonceForm& form, cudaStream_t stream);

}  // namespace amn::cuda
