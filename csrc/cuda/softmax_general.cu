// softmax_stats_ and softmax_weights_: the two halves of the general softmax. Rows of up to 4,096 keys are read once by
// each; longer rows are read twice by the first.
#include "logits.cuh"

namespace amn::cuda {
namespace {

template <class L>
__global__ void __launch_bounds__(kTeamLimit) softmax_stats_kernel(
    Matrix logits, Matrix key_scale, Scalars rows, Pairs pairs, InfonceForm form, int64_t own,
    Temperature temperature) {
  using Real = typename L::Real;
  constexpr Real kLowest = -kInfinity;
  AMN_TEAM_MEMORY(memory);
  for_rows(logits.groups * logits.rows, [&](int64_t i, bool is_row) {
    const auto s = Logits<L, true>::of(
        logits, key_scale, rows, pairs, form.positives_by_id, own, value_of(temperature), i, is_row);
    const Packs<L> packs(s.cols);
    const bool writes = is_row && threadIdx.x == 0;

    Pack<L> held{};
    Real largest[2] = {kLowest, kLowest};  // of all keys, of the negatives
    Real sums[4] = {};                     // keys, positives, their s, exp(s - max)
    if (writes) {
      largest[0] = at(rows, kMax, i);
      if (form.positives_by_id) largest[1] = at(rows, kNegativeMax, i);
    }
    packs.each([&](int64_t k) {
      held = s.scaled(k);
      store(s.data, k, s.cols, held);
#pragma unroll
      for (int e = 0; e < L::kPack; ++e) {
        const Real x = held.x[e];
        if (x == kLowest) continue;
        const bool positive = form.positives_by_id && s.has_id(Logits<L, true>::key(k, e));
        largest[0] = Larger{}(largest[0], x);
        largest[1] = positive ? largest[1] : Larger{}(largest[1], x);
        sums[0] += 1;
        sums[1] += positive ? 1 : 0;
        sums[2] += positive ? x : 0;
      }
    });
    double now[2], totals[4];
    reduce_team(largest, now, memory, Larger{});
    const Real shift = now[0];
    const auto add = [&](const Pack<L>& x) {
#pragma unroll
      for (int e = 0; e < L::kPack; ++e) sums[3] += exp_of(x.x[e], shift);
    };
    packs.each_but_last([&](int64_t k) { add(s.scaled_before(k)); });
    if (packs.any()) add(held);
    sum_team(sums, totals, memory);
    if (!writes) return;
    at(rows, kKeys, i) += totals[0];
    merge_softmax(rows, i, now[0], totals[3]);
    if (!form.positives_by_id) return;
    at(rows, kPositives, i) += totals[1];
    at(rows, kPositiveSum, i) += totals[2];
    at(rows, kNegativeMax, i) = now[1];
  });
}

template <class L>
__global__ void __launch_bounds__(kTeamLimit) softmax_weights_kernel(
    Matrix logits, Matrix key_scale, Scalars rows, Matrix col_max, Matrix col_factor, Pairs pairs, InfonceForm form,
    int64_t own, bool raw, Temperature temperature) {
  using Real = typename L::Real;
  for_rows(logits.groups * logits.rows, [&](int64_t i, bool is_row) {
    if (!is_row) return;
    const double tau = value_of(temperature);
    const auto s = Logits<L, true>::of(logits, key_scale, rows, pairs, form.positives_by_id, own, tau, i, is_row);
    const int64_t group = logits.groups == 1 ? 0 : i / logits.rows, col_keys = col_max.cols;
    const Real* max_of = static_cast<const Real*>(col_max.data) + group * col_max.group_stride;
    const Real* factor_of = static_cast<const Real*>(col_factor.data) + group * col_factor.group_stride;

    const double direction = form.both ? 0.5 : 1, max = at(rows, kMax, i);
    const bool row_sends = sends(rows, i);
    const Real shift = max;
    const Real factor = row_sends ? direction / (at(rows, kOthers, i) + exp(own_logit(rows, i, tau) - max)) : 0;
    const bool has_positives = form.positives_by_id && s.id_keys > 0 && s.counts;
    const double share = has_positives ? direction / (1 + at(rows, kPositives, i)) : 0;
    const Real from_row = row_sends ? share : 0, from_col = share;
    Packs<L>(s.cols).each([&](int64_t k) {
      const Pack<L> x = raw ? s.scaled(k) : s.scaled_before(k), norms = load(s.key_scale, k, s.cols);
      Pack<L> w;
#pragma unroll
      for (int e = 0; e < L::kPack; ++e) {
        const int64_t j = Logits<L, true>::key(k, e);
        const bool has_col = j < col_keys;
        const Real col = has_col ? factor_of[j] : 0;
        w.x[e] = exp_of(x.x[e], shift) * factor + (has_col ? exp_of(x.x[e], max_of[j]) * col : 0);
        if (has_positives && s.has_id(j) && j != s.own_key && !(norms.x[e] < 0)) {
          w.x[e] -= from_row + (col > 0 ? from_col : 0);
        }
        w.x[e] *= norms.x[e];
      }
      store(s.data, k, s.cols, w);
    });
  });
}

}  // namespace

void softmax_stats_(
    const Matrix& logits, const Matrix& key_scale, const Scalars& rows, const Pairs& pairs, const InfonceForm& form,
    int64_t own, const Temperature& temperature, cudaStream_t stream) {
  const auto launch = [&]<class L>() {
    const Teams teams = teams_for<L>(logits.groups * logits.rows, logits.cols);
    AMN_LAUNCH(
        softmax_stats_kernel<L>, teams.grid, teams.block, 0, stream, logits, key_scale, rows, pairs, form, own,
        temperature);
  };
  dispatch_real(logits.dtype == Dtype::kDouble, launch, logits, key_scale, pairs.guide);
}

void softmax_weights_(
    const Matrix& logits, const Matrix& key_scale, const Scalars& rows, const Matrix& col_max,
    const Matrix& col_factor, const Pairs& pairs, const InfonceForm& form, int64_t own, bool raw,
    const Temperature& temperature, cudaStream_t stream) {
  const auto launch = [&]<class L>() {
    const Teams teams = teams_for<L>(logits.groups * logits.rows, logits.cols);
    AMN_LAUNCH(
        softmax_weights_kernel<L>, teams.grid, teams.block, 0, stream, logits, key_scale, rows, col_max, col_factor,
        pairs, form, own, raw, temperature);
  };
  dispatch_real(logits.dtype == Dtype::kDouble, launch, logits, key_scale, pairs.guide);
}

}  // namespace amn::cuda
