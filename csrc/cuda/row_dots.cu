// row_dots: the attention output becomes o in place, and its products with p, d and itself. One pass.
#include "row_math.cuh"
#include "team.cuh"

namespace amn::cuda {
namespace {

// o = share (the attention as it is held) - take t.
struct Shares {
  double share, take;
};

__device__ Shares shares_of(
    const Scalars& rows, int64_t i, Attention held, const InfonceForm& form, double temperature) {
  const double own = own_logit(rows, i, temperature), max = at(rows, kMax, i), others = at(rows, kOthers, i);
  const double inv_target = at(rows, kInvTarget, i);
  double share = 1, positive = 0;
  if (held == Attention::kByKey) share = at(rows, kInvPred, i) != 0 ? sqrt(at(rows, kPredPred, i)) : 0;
  if (held == Attention::kUnnormalised || held == Attention::kScaled) {
    share = sends(rows, i) ? 1 / (others + exp(own - max)) : 0;
    if (held == Attention::kScaled) share *= inv_target;
  }
  if (sends(rows, i)) {
    positive = share_of_others(max, others, own);
    if (form.both) positive = (positive + share_of_others(at(rows, kColMax, i), at(rows, kColOthers, i), own)) / 2;
    if (form.positives_by_id) positive -= at(rows, kPositives, i) / (1 + at(rows, kPositives, i));
  }
  return {share, positive * inv_target};
}

template <class L>
__global__ void __launch_bounds__(kTeamLimit, L::kBlocks) row_dots_kernel(
    Matrix pred, Matrix target, Matrix attention, Scalars rows, Attention held, InfonceForm form,
    Temperature temperature) {
  using Real = typename L::Real;
  using O = RealLayout<L>;
  AMN_TEAM_MEMORY(memory);
  for_rows(pred.groups * pred.rows, [&](int64_t i, bool is_row) {
    const int64_t row = is_row ? i : 0, cols = is_row ? pred.cols : 0;
    const Row<L> p = row_of<L>(pred, row), t = row_of<L>(target, row);
    const Row<O> o = row_of<O>(attention, row);
    const Shares shares = shares_of(rows, row, held, form, value_of(temperature));
    const Real share = shares.share, take = shares.take;
    Real lanes[3] = {};  // p.o, d.o, o.o
    Packs<L>(cols).each([&](int64_t k) {
      const Raw raw_p = fetch(p, k, cols), raw_t = fetch(t, k, cols);
      Pack<O> ok = load(o, k, cols);
      const Pack<L> pk = unpack(raw_p, p), tk = unpack(raw_t, t);
#pragma unroll
      for (int e = 0; e < L::kPack; ++e) {
        ok.x[e] = ok.x[e] * share - tk.x[e] * take;
        lanes[0] += pk.x[e] * ok.x[e];
        lanes[1] += (pk.x[e] - tk.x[e]) * ok.x[e];
        lanes[2] += ok.x[e] * ok.x[e];
      }
      store(o, k, cols, ok);
    });
    double sums[3];
    sum_team(lanes, sums, memory);
    if (!is_row || threadIdx.x != 0) return;
    at(rows, kPredAtt, i) = sums[0];
    at(rows, kDiffAtt, i) = sums[1];
    at(rows, kAttAtt, i) = sums[2];
  });
}

}  // namespace

void row_dots(
    const Matrix& pred, const Matrix& target, const Matrix& attention, const Scalars& rows, Attention held,
    const InfonceForm& form, const Temperature& temperature, cudaStream_t stream) {
  const auto launch = [&]<class L>() {
    const Teams teams = teams_for<L>(pred.groups * pred.rows, pred.cols);
    AMN_LAUNCH(
        row_dots_kernel<L>, teams.grid, teams.block, 0, stream, pred, target, attention, rows, held, form, temperature);
  };
  dispatch_rows(attention.dtype == Dtype::kDouble, launch, pred, target, attention);
}

}  // namespace amn::cuda
