// balance: weights from lambdas and running means, and the loss with these weights. A few numbers: one thread.
#include "row_math.cuh"

namespace amn::cuda {
namespace {

__device__ float corrected(const BalanceState& state, int64_t i, double decay) {
  const double updates = state.updates[i] > 1 ? state.updates[i] : 1;
  return static_cast<float>(state.mean[i] / (1 - pow(decay, updates)));
}

template <class Real>
__global__ void balance_kernel(
    const Real* values, const Real* gram, BalanceState state, int64_t m, BalanceOptions options, Real* weights,
    Real* loss) {
  const bool observes = options.by_value || gram != nullptr;
  const auto observed = [&](int64_t i) { return static_cast<float>(options.by_value ? values[i] : gram[i * m + i]); };

  if (observes && options.update) {
    const bool due = *state.calls % options.update_every == 0;
    ++*state.calls;
    for (int64_t i = 0; due && i < m; ++i) {
      if (state.lambdas[i] <= 0) continue;  // monitored
      const float x = observed(i);
      if (!(x > 0 && x < kInfinity)) {
        ++state.skipped[i];
        continue;
      }
      const float limit = state.updates[i] >= kSpikeAfter ? kSpike * corrected(state, i, options.decay) : kInfinity;
      state.mean[i] += static_cast<float>(1 - options.decay) * ((x < limit ? x : limit) - state.mean[i]);
      ++state.updates[i];
    }
  }
  const float anchor = corrected(state, options.anchor, options.decay);
  double sum = 0;
  for (int64_t i = 0; i < m; ++i) {
    float ratio = 1;
    if (i != options.anchor && state.updates[i] > 0 && state.updates[options.anchor] > 0) {
      const float known = corrected(state, i, options.decay);
      if (options.by_value) {
        ratio = anchor / known;
      } else {
        const float current = observes ? observed(i) : 0;  // a NaN loses the comparison
        ratio = sqrtf(anchor) / sqrtf(current > known ? current : known);
      }
      ratio = ratio > kLeastRatio ? ratio : kLeastRatio;
      ratio = ratio < state.most[i] ? ratio : state.most[i];
    }
    weights[i] = static_cast<Real>(state.lambdas[i] * ratio);
    sum += double{weights[i]} * values[i];
  }
  *loss = static_cast<Real>(sum);
}

}  // namespace

void balance(
    const void* values, const void* gram, const BalanceState& state, int64_t terms, const BalanceOptions& options,
    Dtype real, void* weights, void* loss, cudaStream_t stream) {
  const auto launch = [&]<class Real>() {
    AMN_LAUNCH(
        balance_kernel<Real>, dim3(1), dim3(1), 0, stream, static_cast<const Real*>(values),
        static_cast<const Real*>(gram), state, terms, options, static_cast<Real*>(weights), static_cast<Real*>(loss));
  };
  real == Dtype::kDouble ? launch.template operator()<double>() : launch.template operator()<float>();
}

}  // namespace amn::cuda
