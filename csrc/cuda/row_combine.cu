// row_combine: the gradient of a row, a p + b d + c o and the columns' part, times what arrives at the values. One
// pass; the gradient is rounded to the dtype of its tensor once, at the end. Also temperature_grad, a sum over the rows.
#include "columns.cuh"
#include "row_math.cuh"
#include "team.cuh"

namespace amn::cuda {
namespace {

// The gradient that reaches the value of a term; 0 for a term that is absent or monitored.
template <class Real>
__device__ double incoming_of(const Incoming& incoming, Term term) {
  double gradient = 0;
#pragma unroll
  for (int64_t i = 0; i < kMaxTerms; ++i) {
    if (i >= incoming.terms.size || incoming.terms.term[i] != term || !incoming.terms.differentiable[i]) continue;
    Real sum = 0;
    if (incoming.grad_loss != nullptr) {
      sum = *static_cast<const Real*>(incoming.grad_loss) * static_cast<const Real*>(incoming.weights)[i];
    }
    if (incoming.grad_values != nullptr) sum += static_cast<const Real*>(incoming.grad_values)[i];
    gradient = sum;
  }
  return gradient;
}

// grad = a p + b d + c o + e t
template <class Real>
struct RowFactors {
  Real a, b, c, e;
  Real moment, spread, unit;  // of the columns' part
};

template <class Real>
__device__ RowFactors<Real> factors_of(
    const Incoming& incoming, const Scalars& rows, int64_t i, int64_t dim, double temperature) {
  const double weight = at(rows, kWeight, i), inv_pred = at(rows, kInvPred, i), inv_target = at(rows, kInvTarget, i);
  const double excess = at(rows, kExcess, i), one_minus_cos = at(rows, kOneMinusCos, i);
  const double cosine = incoming_of<Real>(incoming, kCosine) * weight;
  const double infonce = incoming_of<Real>(incoming, kInfonce) / temperature * weight;
  const double variance = incoming_of<Real>(incoming, kVariance);
  double a = 0, b = incoming_of<Real>(incoming, kMse) * 2 / dim * weight, c = 0, e = 0;
  if (cosine != 0 && inv_pred != 0 && inv_target != 0) {
    // d loses the smaller vector where the norms are very different.
    if (similar_norms(excess)) {
      a -= cosine * inv_pred * inv_pred * (one_minus_cos + excess);
      b += cosine * inv_pred * inv_target;
    } else {
      a += cosine * inv_pred * inv_pred * (1 - one_minus_cos);
      e -= cosine * inv_pred * inv_target;
    }
  }
  if (infonce != 0 && inv_pred != 0) {
    a -= infonce * inv_pred * inv_pred * inv_pred * at(rows, kPredAtt, i);
    c = infonce * inv_pred;
  }
  if (variance != 0) a -= variance * inv_pred * inv_pred * at(rows, kPredSpread, i);
  return {static_cast<Real>(a), static_cast<Real>(b), static_cast<Real>(c), static_cast<Real>(e),
          static_cast<Real>(incoming_of<Real>(incoming, kMoment)), static_cast<Real>(variance * inv_pred),
          static_cast<Real>(inv_pred)};
}

template <class L, bool kColumnsT>
__global__ void __launch_bounds__(kTeamLimit, kColumnsT ? 1 : L::kBlocks) row_combine_kernel(
    Incoming incoming, Matrix pred, Matrix target, Matrix attention, Matrix columns, Scalars rows,
    Temperature temperature, Matrix grad) {
  using Real = typename L::Real;
  using O = RealLayout<L>;
  for_rows(pred.groups * pred.rows, [&](int64_t i, bool is_row) {
    if (!is_row) return;
    const bool reads = counts(rows, i);  // a masked row may hold NaN
    const Row<L> p = row_of<L>(pred, i), t = row_of<L>(target, i), g = row_of<L>(grad, i);
    const Row<O> o = row_of<O>(attention, i);
    const auto x = factors_of<Real>(incoming, rows, i, pred.cols, value_of(temperature));
    Packs<L>(pred.cols).each([&](int64_t k) {
      Pack<L> gk{};
      if (reads) {
        const Raw raw_p = fetch(p, k, pred.cols), raw_t = fetch(t, k, pred.cols);
        Pack<O> ok{};
        if (x.c != 0) ok = load(o, k, pred.cols);
        const Pack<L> pk = unpack(raw_p, p), tk = unpack(raw_t, t);
#pragma unroll
        for (int e = 0; e < L::kPack; ++e) {
          gk.x[e] = x.a * pk.x[e] + x.b * (pk.x[e] - tk.x[e]) + x.e * tk.x[e] + x.c * ok.x[e];
        }
        if constexpr (kColumnsT) {
          const Columns<L> at_k(columns, k);
#pragma unroll
          for (int e = 0; e < L::kPack; ++e) {
            gk.x[e] += x.moment * at_k.moment(e, pk.x[e]) + x.spread * at_k.spread(e, pk.x[e] * x.unit);
          }
        }
      }
      store(g, k, pred.cols, gk);
    });
  });
}

// -sum_i weight/|p| p.o / temperature^2, times what arrives at InfoNCE.
template <class Real>
__global__ void __launch_bounds__(kThreads) temperature_grad_kernel(
    Scalars rows, int64_t count, Incoming incoming, Temperature temperature, void* grad) {
  AMN_SHARED(double, sums, kThreads);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += at(rows, kWeight, i) * at(rows, kInvPred, i) * at(rows, kPredAtt, i);
  }
  sums[threadIdx.x] = sum;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
  }
  if (threadIdx.x != 0) return;
  const double tau = value_of(temperature), gradient = -sums[0] / (tau * tau) * incoming_of<Real>(incoming, kInfonce);
  if (temperature.dtype == Dtype::kDouble) {
    *static_cast<double*>(grad) = gradient;
  } else {
    *static_cast<float*>(grad) = gradient;
  }
}

}  // namespace

void row_combine(
    const Incoming& incoming, const Matrix& pred, const Matrix& target, const Matrix& attention, const Matrix& columns,
    const Scalars& rows, const Temperature& temperature, const Matrix& grad, Dtype real, cudaStream_t stream) {
  const auto launch = [&]<class L>() {
    const Teams teams = teams_for<L>(pred.groups * pred.rows, pred.cols);
    const auto with_columns = [&]<bool kColumnsT>() {
      AMN_LAUNCH(
          (row_combine_kernel<L, kColumnsT>), teams.grid, teams.block, 0, stream, incoming, pred, target, attention,
          columns, rows, temperature, grad);
    };
    columns.data != nullptr ? with_columns.template operator()<true>() : with_columns.template operator()<false>();
  };
  dispatch_rows(real == Dtype::kDouble, launch, pred, target, attention, columns, grad);
}

void temperature_grad(
    const Scalars& rows, int64_t count, const Incoming& incoming, const Temperature& temperature, Dtype real,
    void* grad, cudaStream_t stream) {
  if (real == Dtype::kDouble) {
    AMN_LAUNCH(
        temperature_grad_kernel<double>, dim3(1), dim3(kThreads), 0, stream, rows, count, incoming, temperature,
        grad);
  } else {
    AMN_LAUNCH(
        temperature_grad_kernel<float>, dim3(1), dim3(kThreads), 0, stream, rows, count, incoming, temperature,
        grad);
  }
}

}  // namespace amn::cuda
