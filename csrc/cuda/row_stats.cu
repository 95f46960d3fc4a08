// row_stats: norms, distances and 1 - cos of every row. Reads pred and target once where a row has at most 4,096
// elements: the pack that a thread has of it stays in registers for the second pass. Longer rows are read again there.
#include "row_math.cuh"
#include "team.cuh"

namespace amn::cuda {
namespace {

template <class L>
__global__ void __launch_bounds__(kTeamLimit, L::kBlocks) row_stats_kernel(
    Matrix pred, Matrix target, Scalars rows, Matrix key_scale, double weight, InfonceForm form) {
  using Real = typename L::Real;
  AMN_TEAM_MEMORY(memory);
  for_rows(pred.groups * pred.rows, [&](int64_t i, bool is_row) {
    const bool reads = is_row && (weight > 0 || counts(rows, i));  // a masked row is zeros
    const int64_t cols = reads ? pred.cols : 0;
    const Row<L> p = row_of<L>(pred, is_row ? i : 0), t = row_of<L>(target, is_row ? i : 0);

    const Packs<L> packs(cols);

    Pair<L> held{};
    Real lanes[4] = {};  // p.p, t.t, d.d, p.d
    packs.each([&](int64_t k) {
      held = load_pair(p, t, k, cols);
#pragma unroll
      for (int e = 0; e < L::kPack; ++e) {
        const Real pk = held.p.x[e], tk = held.t.x[e], dk = pk - tk;
        lanes[0] += pk * pk;
        lanes[1] += tk * tk;
        lanes[2] += dk * dk;
        lanes[3] += pk * dk;
      }
    });
    double sums[4];
    sum_team(lanes, sums, memory);
    const double pp = sums[0], tt = sums[1], dd = sums[2], pd = sums[3];
    const double inv_pred = inverse_norm(pp), inv_target = inverse_norm(tt);
    // |p|^2 - |t|^2 = d.(p + t) = 2 p.d - d.d
    const double norms = sqrt(pp) + sqrt(tt);
    const double excess = norms == 0 ? 0 : (2 * pd - dd) / norms * inv_target;
    const bool has_cos = inv_pred != 0 && inv_target != 0;

    const bool writes = is_row && threadIdx.x == 0;
    if (writes) {
      if (weight > 0) at(rows, kWeight, i) = weight;
      at(rows, kInvPred, i) = inv_pred;
      at(rows, kInvTarget, i) = inv_target;
      at(rows, kExcess, i) = excess;
      at(rows, kPredPred, i) = pp;
      at(rows, kTargetTarget, i) = tt;
      at(rows, kDiffDiff, i) = dd;
      at(rows, kPredDiff, i) = pd;
      at(rows, kMax, i) = -kInfinity;
      for (const RowScalar zero : {kOthers, kKeys, kPredAtt, kDiffAtt, kAttAtt}) at(rows, zero, i) = 0;
      if (form.both) {
        at(rows, kColMax, i) = -kInfinity;
        at(rows, kColOthers, i) = 0;
      }
      if (form.positives_by_id) {
        for (const RowScalar zero : {kPositives, kPositiveSum, kColPositiveSum}) at(rows, zero, i) = 0;
        at(rows, kNegativeMax, i) = -kInfinity;
      }
      const int64_t group = pred.groups == 1 ? 0 : i / pred.rows;
      Real* scale = static_cast<Real*>(key_scale.data) + group * key_scale.group_stride;
      scale[i - group * pred.rows] = reads ? inv_target : -1.0;
    }

    // |p/|p| - t/|t||^2 / 2. For similar norms the difference is taken as (d - excess t)/|p|, in which nothing
    // cancels; d itself loses the smaller vector else.
    const bool similar = similar_norms(excess);
    const Real d_scale = similar ? inv_pred : 0, p_scale = similar ? 0 : inv_pred;
    const Real t_scale = similar ? inv_pred * excess : inv_target;
    Real square[1] = {};
    const auto add = [&](const Pair<L>& x) {
#pragma unroll
      for (int e = 0; e < L::kPack; ++e) {
        const Real pk = x.p.x[e], tk = x.t.x[e], ek = d_scale * (pk - tk) + p_scale * pk - t_scale * tk;
        square[0] += ek * ek;
      }
    };
    if (has_cos) {
      packs.each_but_last([&](int64_t k) { add(load_pair(p, t, k, cols)); });
      add(held);
    }
    double distance[1];
    sum_team(square, distance, memory);

    if (writes) at(rows, kOneMinusCos, i) = has_cos ? distance[0] / 2 : 1;
  });
}

}  // namespace

void row_stats(
    const Matrix& pred, const Matrix& target, const Scalars& rows, const Matrix& key_scale, double weight,
    const InfonceForm& form, cudaStream_t stream) {
  const auto launch = [&]<class L>() {
    const Teams teams = teams_for<L>(pred.groups * pred.rows, pred.cols);
    AMN_LAUNCH(
        row_stats_kernel<L>, teams.grid, teams.block, 0, stream, pred, target, rows, key_scale, weight, form);
  };
  dispatch_rows(is_double(pred, target), launch, pred, target);
}

}  // namespace amn::cuda
