// Loading and storing of rows of any dtype. A thread moves a pack of elements at a time.
#pragma once

#include "convert.cuh"
#include "launchers.h"

namespace amn::cuda {

// How a kernel reaches the rows of pred, target and gradient.
template <class RealT, Dtype kDtypeT, bool kWholeT>
struct Layout {
  using Real = RealT;  // computed in
  // The dtype of all of them in memory, or kAny: then it is a value that branches, the same for a whole warp.
  static constexpr Dtype kDtype = kDtypeT;
  // All rows are aligned and consist of whole packs: a pack is consecutive elements, moved 128 bits at a time. Else its
  // elements are as many apart as the team has threads, so that the threads of a warp read side by side.
  static constexpr bool kWhole = kWholeT;
  // Elements of a pack: 128 bits of a 16-bit dtype, 256 bits of Real.
  static constexpr int kPack = 32 / sizeof(Real);
  // Blocks of the largest size that a multiprocessor must hold: at half of its threads there are 64 registers for each.
  // float64 and the branches on the dtype take more.
  static constexpr int kBlocks = kDtype == Dtype::kAny || sizeof(Real) == 8 ? 1 : 2;
};

// Other matrices, such as the attention: in the dtype that is computed in.
template <class L>
using RealLayout =
    Layout<typename L::Real, sizeof(typename L::Real) == 8 ? Dtype::kDouble : Dtype::kFloat, L::kWhole>;

template <class L>
struct Pack {
  typename L::Real x[L::kPack];
};

__host__ __device__ constexpr int size_of(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

// One row of a matrix.
template <class L>
struct Row {
  char* data;
  Dtype stored;

  __device__ Dtype dtype() const { return L::kDtype == Dtype::kAny ? stored : L::kDtype; }
};

// Row i, counted over all groups; the first one's place where there is no memory.
template <class L>
__device__ inline Row<L> row_of(const Matrix& x, int64_t i) {
  const int64_t group = x.groups == 1 ? 0 : i / x.rows;
  const int64_t offset = group * x.group_stride + (i - group * x.rows) * x.row_stride;
  return {static_cast<char*>(x.data) + offset * size_of(x.dtype), x.dtype};
}

// Where the packs of a row are that this thread has: first, first + step, ... below cols.
template <class L>
struct Packs {
  int64_t first, step, cols;

  __device__ explicit Packs(int64_t cols)
      : first(int64_t{threadIdx.x} * (L::kWhole ? L::kPack : 1)), step(int64_t{blockDim.x} * L::kPack), cols(cols) {}

  __device__ bool any() const { return first < cols; }
  __device__ int64_t last() const { return first + (cols - 1 - first) / step * step; }

  // Calls f(k) for each, in order.
  template <class F>
  __device__ void each(const F& f) const {
#pragma unroll 1
    for (int64_t k = first; k < cols; k += step) f(k);
  }

  // The same without the last one, which the caller still holds in registers.
  template <class F>
  __device__ void each_but_last(const F& f) const {
#pragma unroll 1
    for (int64_t k = first; k + step < cols; k += step) f(k);
  }
};

// A pack as it lies in memory; of scattered elements each in words of its own. It is fetched as it is and converted
// later, so that the loads of several operands are under way together.
struct Raw {
  uint32_t words[8];
};

// The pack with first element k < cols; zeros past the end.
template <class L>
__device__ inline Raw fetch(const Row<L>& row, int64_t k, int64_t cols) {
  Raw raw{};
  const int size = size_of(row.dtype());
  const char* from = row.data + k * size;
  if constexpr (L::kWhole) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      if (q * 16 >= L::kPack * size) continue;
      const uint4 quad = *reinterpret_cast<const uint4*>(from + q * 16);
      raw.words[4 * q] = quad.x;
      raw.words[4 * q + 1] = quad.y;
      raw.words[4 * q + 2] = quad.z;
      raw.words[4 * q + 3] = quad.w;
    }
  } else {
#pragma unroll
    for (int e = 0; e < L::kPack; ++e) {
      if (k + e * blockDim.x >= cols) continue;
      const char* element = from + int64_t{e} * blockDim.x * size;
      if (size == 2) {
        raw.words[e] = *reinterpret_cast<const uint16_t*>(element);
      } else if (size == 4) {
        raw.words[e] = *reinterpret_cast<const uint32_t*>(element);
      } else if constexpr (sizeof(typename L::Real) == 8) {
        const uint2 bits = *reinterpret_cast<const uint2*>(element);
        raw.words[e] = bits.x;
        raw.words[e + 4] = bits.y;
      }
    }
  }
  return raw;
}

template <class L>
__device__ inline Pack<L> unpack(const Raw& raw, const Row<L>& row) {
  Pack<L> pack;
#pragma unroll
  for (int e = 0; e < L::kPack; ++e) {
    const uint32_t half = L::kWhole ? raw.words[e / 2] >> (e % 2 * 16) & 0xffff : raw.words[e];
    if (row.dtype() == Dtype::kFloat) {
      pack.x[e] = float_of_bits(raw.words[e]);
    } else if (row.dtype() == Dtype::kBfloat16) {
      pack.x[e] = float_of_bits(half << 16);
    } else if (row.dtype() == Dtype::kHalf) {
      pack.x[e] = float_of_half(static_cast<uint16_t>(half));
    } else if constexpr (sizeof(typename L::Real) == 8) {
      pack.x[e] = L::kWhole ? double_of_bits(raw.words[2 * e], raw.words[2 * e + 1])
                            : double_of_bits(raw.words[e], raw.words[e + 4]);
    }
  }
  return pack;
}

template <class L>
__device__ inline Pack<L> load(const Row<L>& row, int64_t k, int64_t cols) {
  return unpack(fetch(row, k, cols), row);
}

// The packs with first element k of a row of pred and of target.
template <class L>
struct Pair {
  Pack<L> p, t;
};
template <class L>
__device__ inline Pair<L> load_pair(const Row<L>& p, const Row<L>& t, int64_t k, int64_t cols) {
  const Raw raw_p = fetch(p, k, cols), raw_t = fetch(t, k, cols);
  return {unpack(raw_p, p), unpack(raw_t, t)};
}

// Writes the pack with first element k, as far as the row has it, rounded to the row's dtype.
template <class L>
__device__ inline void store(const Row<L>& row, int64_t k, int64_t cols, const Pack<L>& pack) {
  const int size = size_of(row.dtype());
  char* to = row.data + k * size;
  uint32_t words[8] = {};
#pragma unroll
  for (int e = 0; e < L::kPack; ++e) {
    const int word = L::kWhole ? e / 2 : e, shift = L::kWhole ? e % 2 * 16 : 0;
    if (row.dtype() == Dtype::kFloat) {
      words[e] = bits_of(static_cast<float>(pack.x[e]));
    } else if (row.dtype() == Dtype::kBfloat16) {
      words[word] |= uint32_t{bfloat16_of(static_cast<float>(pack.x[e]))} << shift;
    } else if (row.dtype() == Dtype::kHalf) {
      words[word] |= uint32_t{half_of(static_cast<float>(pack.x[e]))} << shift;
    } else if constexpr (sizeof(typename L::Real) == 8) {
      const uint2 bits = bits_of(pack.x[e]);
      words[L::kWhole ? 2 * e : e] = bits.x;
      words[L::kWhole ? 2 * e + 1 : e + 4] = bits.y;
    }
  }
  if constexpr (L::kWhole) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      if (q * 16 >= L::kPack * size) continue;
      *reinterpret_cast<uint4*>(to + q * 16) =
          make_uint4(words[4 * q], words[4 * q + 1], words[4 * q + 2], words[4 * q + 3]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < L::kPack; ++e) {
      if (k + e * blockDim.x >= cols) continue;
      char* element = to + int64_t{e} * blockDim.x * size;
      if (size == 2) {
        *reinterpret_cast<uint16_t*>(element) = static_cast<uint16_t>(words[e]);
      } else if (size == 4) {
        *reinterpret_cast<uint32_t*>(element) = words[e];
      } else if constexpr (sizeof(typename L::Real) == 8) {
        *reinterpret_cast<uint2*>(element) = make_uint2(words[e], words[e + 4]);
      }
    }
  }
}

// Whether all rows of x are aligned and consist of whole packs that are moved 128 bits at a time.
template <class Real>
bool is_whole(const Matrix& x) {
  const int64_t size = size_of(x.dtype), pack = 32 / sizeof(Real);
  const auto aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  return x.data == nullptr ||
         (x.cols % pack == 0 && aligned(pack * size) && aligned(reinterpret_cast<intptr_t>(x.data)) &&
          aligned(x.row_stride * size) && aligned(x.groups > 1 ? x.group_stride * size : 0));
}

// Calls f.template operator()<Layout>() for rows of these matrices, of which `others` have the dtype that is computed
// in. The usual case, whole packs of one dtype, has kernels of its own.
template <class F, class... Matrices>
void dispatch_rows(bool is_double, const F& f, const Matrix& pred, const Matrix& target, const Matrices&... others) {
  const bool whole = is_double ? is_whole<double>(pred) && is_whole<double>(target) && (is_whole<double>(others) && ...)
                               : is_whole<float>(pred) && is_whole<float>(target) && (is_whole<float>(others) && ...);
  if (is_double) {
    return whole ? f.template operator()<Layout<double, Dtype::kAny, true>>()
                 : f.template operator()<Layout<double, Dtype::kAny, false>>();
  }
  if (!whole) return f.template operator()<Layout<float, Dtype::kAny, false>>();
  if (pred.dtype != target.dtype) return f.template operator()<Layout<float, Dtype::kAny, true>>();
  if (pred.dtype == Dtype::kFloat) return f.template operator()<Layout<float, Dtype::kFloat, true>>();
  if (pred.dtype == Dtype::kHalf) return f.template operator()<Layout<float, Dtype::kHalf, true>>();
  return f.template operator()<Layout<float, Dtype::kBfloat16, true>>();
}

// The same for matrices that all have the dtype that is computed in.
template <class F, class... Matrices>
void dispatch_real(bool is_double, const F& f, const Matrices&... matrices) {
  if (is_double) {
    return (is_whole<double>(matrices) && ...) ? f.template operator()<Layout<double, Dtype::kDouble, true>>()
                                               : f.template operator()<Layout<double, Dtype::kDouble, false>>();
  }
  return (is_whole<float>(matrices) && ...) ? f.template operator()<Layout<float, Dtype::kFloat, true>>()
                                            : f.template operator()<Layout<float, Dtype::kFloat, false>>();
}

}  // namespace amn::cuda
