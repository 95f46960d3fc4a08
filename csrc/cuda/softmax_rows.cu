// softmax_rows_: the plain softmax. Rows of up to 4,096 keys are read once, as each thread's pack stays in registers
// from the search for the maximum on; longer rows are read twice.
#include "logits.cuh"

namespace amn::cuda {
namespace {

// Weights may have 16 bits, in memory of their own; they are then |t_i| times as large, so that vectors of any one
// length leave them in range.
template <class L, bool kPairs>
__global__ void __launch_bounds__(kTeamLimit, !kPairs && L::kWhole && L::kBlocks == 2 ? 2 : 1) softmax_rows_kernel(
    Matrix logits, Matrix key_scale, Scalars rows, Matrix rescale, Matrix weights, Pairs pairs, int64_t own,
    Temperature temperature) {
  using Real = typename L::Real;
  constexpr bool kDouble = sizeof(Real) == 8;  // is never stored in 16 bits
  using Out = Layout<Real, kDouble ? Dtype::kDouble : Dtype::kAny, L::kWhole>;
  constexpr Real kLowest = -kInfinity, kMostOfHalf = 65504;
  AMN_TEAM_MEMORY(memory);
  for_rows(logits.groups * logits.rows, [&](int64_t i, bool is_row) {
    const auto s = Logits<L, kPairs>::of(logits, key_scale, rows, pairs, false, own, value_of(temperature), i, is_row);
    const Packs<L> packs(s.cols);
    const bool writes = is_row && threadIdx.x == 0;

    Pack<L> held{};
    Real lanes[1] = {writes ? static_cast<Real>(at(rows, kMax, i)) : kLowest};
    packs.each([&](int64_t k) {
      held = s.scaled(k);
#pragma unroll
      for (int e = 0; e < L::kPack; ++e) lanes[0] = Larger{}(lanes[0], held.x[e]);
    });
    double now[1];
    reduce_team(lanes, now, memory, Larger{});

    const bool is_scaled = !kDouble && size_of(weights.dtype) == 2;
    const bool is_half = is_scaled && weights.dtype == Dtype::kHalf;
    const Real shift = now[0], factor = is_scaled && is_row ? sqrt(at(rows, kTargetTarget, i)) : 1;
    const Row<Out> out = row_of<Out>(weights, is_row ? i : 0);
    Real sums[2] = {};  // exp(s - shift), keys
    const auto weigh = [&](int64_t k, const Pack<L>& x) {
      const Pack<L> norms = load(s.key_scale, k, s.cols);
      Pack<Out> w;
#pragma unroll
      for (int e = 0; e < L::kPack; ++e) {
        const Real value = exp_of(x.x[e], shift);
        sums[0] += value;
        sums[1] += x.x[e] == kLowest ? 0 : 1;
        w.x[e] = value * norms.x[e] * factor;
        if (is_half && w.x[e] > kMostOfHalf) w.x[e] = kMostOfHalf;
      }
      store(out, k, s.cols, w);
    };
    packs.each_but_last([&](int64_t k) { weigh(k, s.scaled(k)); });
    if (packs.any()) weigh(packs.last(), held);
    double totals[2];
    sum_team(sums, totals, memory);
    if (!writes) return;
    at(rows, kKeys, i) += totals[1];
    const double shrink = merge_softmax(rows, i, now[0], totals[0]);
    if (rescale.data != nullptr) static_cast<Real*>(rescale.data)[i] = shrink;
  });
}

}  // namespace

void softmax_rows_(
    const Matrix& logits, const Matrix& key_scale, const Scalars& rows, const Matrix& rescale, const Matrix& weights,
    const Pairs& pairs, int64_t own, const Temperature& temperature, cudaStream_t stream) {
  const auto launch = [&]<class L>() {
    const Teams teams = teams_for<L>(logits.groups * logits.rows, logits.cols);
    const auto with_pairs = [&]<bool kPairs>() {
      AMN_LAUNCH(
          (softmax_rows_kernel<L, kPairs>), teams.grid, teams.block, 0, stream, logits, key_scale, rows, rescale,
          weights, pairs, own, temperature);
    };
    pairs.row_ids != nullptr || pairs.guide.data != nullptr ? with_pairs.template operator()<true>()
                                                            : with_pairs.template operator()<false>();
  };
  dispatch_real(logits.dtype == Dtype::kDouble, launch, logits, key_scale, weights, pairs.guide);
}

}  // namespace amn::cuda
