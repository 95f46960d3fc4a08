// Body of row_kernels_{baseline,avx2,avx512}.cpp, which set the target and its register size, and name the function
// that exports it. Vectors, and the order of sums: vectors.inl. Each part uses those before it.
#include "vectors.inl"
#include "convert.inl"
#include "access.inl"
#include "scalars.inl"
#include "softmax.inl"
#include "columns.inl"
#include "rows.inl"

#undef AMN_INLINE

namespace amn::cpu {

template <class T>
RowKernels<T> AMN_KERNELS() {
  return {row_stats<T>,        softmax_rows_<T>, softmax_stats_<T>, softmax_cols<T>, softmax_weights_<T>,
          row_dots<T>, col_stats<T>,     col_dots<T>,       row_combine<T>};
}
template RowKernels<float> AMN_KERNELS();
template RowKernels<double> AMN_KERNELS();

}  // namespace amn::cpu
