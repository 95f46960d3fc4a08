// The primitive `balance` on the CPU: a few numbers, so plain loops.
#include <ATen/Dispatch.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "tensors.h"

namespace amn::cpu {
namespace {

struct State {
  float* mean;
  int64_t* updates;
  double decay;

  float corrected(int64_t i) const {
    return static_cast<float>(mean[i] / (1 - std::pow(decay, static_cast<double>(std::max<int64_t>(updates[i], 1)))));
  }
};

}  // namespace

void balance(
    const at::Tensor& values, const at::Tensor& gram, const at::Tensor& mean, const at::Tensor& updates,
    const at::Tensor& calls, const at::Tensor& skipped, const at::Tensor& lambdas, const at::Tensor& most,
    const BalanceOptions& options, const at::Tensor& weights, const at::Tensor& loss) {
  const int64_t m = values.numel();
  const State state{mean.data_ptr<float>(), updates.data_ptr<int64_t>(), options.decay};
  const double* lambda = lambdas.const_data_ptr<double>();
  const bool observes = options.by_value || gram.numel() > 0;
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "balance", [&] {
    const auto* value = values.const_data_ptr<scalar_t>();
    const auto* entry = gram.const_data_ptr<scalar_t>();
    const auto observed = [&](int64_t i) { return static_cast<float>(options.by_value ? value[i] : entry[i * m + i]); };

    if (observes && options.update) {
      const bool due = *calls.data_ptr<int64_t>() % options.update_every == 0;
      ++*calls.data_ptr<int64_t>();
      for (int64_t i = 0; due && i < m; ++i) {
        if (lambda[i] <= 0) continue;  // monitored
        const float x = observed(i);
        if (!std::isfinite(x) || x <= 0) {
          ++skipped.data_ptr<int64_t>()[i];
          continue;
        }
        const float limit = state.updates[i] >= kSpikeAfter ? kSpike * state.corrected(i)
                                                            : std::numeric_limits<float>::infinity();
        state.mean[i] += static_cast<float>(1 - options.decay) * (std::min(x, limit) - state.mean[i]);
        ++state.updates[i];
      }
    }
    const float anchor = state.corrected(options.anchor);
    double sum = 0;
    for (int64_t i = 0; i < m; ++i) {
      float ratio = 1;
      if (i != options.anchor && state.updates[i] > 0 && state.updates[options.anchor] > 0) {
        const float known = state.corrected(i);
        if (options.by_value) {
          ratio = anchor / known;
        } else {
          const float current = observes ? observed(i) : 0;  // a NaN loses the comparison
          ratio = std::sqrt(anchor) / std::sqrt(current > known ? current : known);
        }
        ratio = std::min(std::max(ratio, kLeastRatio), most.const_data_ptr<float>()[i]);
      }
      const auto weight = static_cast<scalar_t>(lambda[i] * ratio);
      weights.data_ptr<scalar_t>()[i] = weight;
      sum += double{weight} * value[i];
    }
    *loss.data_ptr<scalar_t>() = static_cast<scalar_t>(sum);
  });
}

}  // namespace amn::cpu
