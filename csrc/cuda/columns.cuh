// What the moment and the variance term say of the columns of a pack: see enum Column.
#pragma once

#include "pack.cuh"

namespace amn::cuda {

template <class L>
struct Columns {
  using Real = typename L::Real;
  using C = RealLayout<L>;
  Pack<C> a, c, pred, v, unit;

  __device__ Columns(const Matrix& columns, int64_t k) {
    const auto of = [&](Column column) { return load(row_of<C>(columns, column), k, columns.cols); };
    a = of(kMomentA);
    c = of(kMomentC);
    pred = of(kMomentPred);
    v = of(kVarianceV);
    unit = of(kVarianceUnit);
  }

  // The row gradient h of the moment term, and, but for what the normalisation takes out, u of the variance term.
  __device__ Real moment(int e, Real p) const { return a.x[e] + c.x[e] * (p - pred.x[e]); }
  __device__ Real spread(int e, Real q) const { return v.x[e] * (q - unit.x[e]); }
};

}  // namespace amn::cuda
