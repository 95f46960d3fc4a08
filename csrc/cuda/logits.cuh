// A row of logits: similarities to s_ij, and which keys the row has.
#pragma once

#include "row_math.cuh"
#include "team.cuh"

namespace amn::cuda {

// The logits of one row, and what says which keys it has.
template <class L, bool kPairsT>
struct Logits {
  static constexpr bool kPairs = kPairsT;  // whether ids or a margin may leave keys out
  using Real = typename L::Real;
  Row<L> data, key_scale, guide;
  int64_t cols, own_key, id_keys, id;
  const int64_t* key_ids;
  bool counts, has_guide, positives_by_id;
  Real scale, inv_target, margin;

  __device__ static Logits of(
      const Matrix& logits, const Matrix& key_scale, const Scalars& rows, const Pairs& pairs, bool positives_by_id,
      int64_t own, double temperature, int64_t i, bool is_row) {
    const int64_t row = is_row ? i : 0, group = logits.groups == 1 ? 0 : row / logits.rows;
    Logits s;
    s.data = row_of<L>(logits, row);
    s.key_scale = row_of<L>(key_scale, group);
    s.cols = is_row ? logits.cols : 0;
    s.own_key = own + row - group * logits.rows;
    s.counts = is_row && amn::cuda::counts(rows, row);
    s.scale = at(rows, kInvPred, row) / temperature;
    if constexpr (kPairs) {
      s.guide = row_of<L>(pairs.guide, row);
      s.has_guide = pairs.guide.data != nullptr;
      s.id_keys = pairs.row_ids != nullptr ? pairs.id_keys : 0;
      s.id = s.id_keys > 0 ? pairs.row_ids[row] : 0;
      s.key_ids = pairs.key_ids + group * pairs.id_stride;
      s.positives_by_id = positives_by_id;
      s.inv_target = at(rows, kInvTarget, row);
      s.margin = pairs.margin;
    }
    return s;
  }

  // Number of the key at element e of the pack with first element k.
  __device__ static int64_t key(int64_t k, int e) { return k + int64_t{e} * (L::kWhole ? 1 : blockDim.x); }

  __device__ bool has_id(int64_t j) const { return kPairs && j < id_keys && key_ids[j] == id; }

  // s as it was left in place; -inf past the end.
  __device__ Pack<L> scaled_before(int64_t k) const {
    Pack<L> s = load(data, k, cols);
#pragma unroll
    for (int e = 0; e < L::kPack; ++e) s.x[e] = key(k, e) < cols ? s.x[e] : static_cast<Real>(-kInfinity);
    return s;
  }

  // s = p.k to cosine / temperature; -inf for the own key, for keys left out and all along a masked row.
  __device__ Pack<L> scaled(int64_t k) const {
    const Raw raw = fetch(data, k, cols);
    const Pack<L> norms = load(key_scale, k, cols);
    Pack<L> s = unpack(raw, data), guides{};
    if constexpr (kPairs) {
      if (has_guide) guides = load(guide, k, cols);
    }
#pragma unroll
    for (int e = 0; e < L::kPack; ++e) {
      const int64_t j = key(k, e);
      bool out = !counts || norms.x[e] < 0 || j == own_key || (!L::kWhole && j >= cols);
      if constexpr (kPairs) {
        const bool same = has_id(j), close = has_guide && 1 - guides.x[e] * inv_target * norms.x[e] < margin;
        out = out || (close && !(positives_by_id && same)) || (same && !positives_by_id);
      }
      s.x[e] = out ? static_cast<Real>(-kInfinity) : s.x[e] * norms.x[e] * scale;
    }
    return s;
  }
};

// exp(s - shift) for s <= shift, which may be -inf where all s are. Recomputed logits may exceed it in the last place.
template <class Real>
__device__ inline Real exp_of(Real s, Real shift) {
  const Real x = s - (shift == static_cast<Real>(-kInfinity) ? Real{0} : shift);
  return exp(x > 0 ? Real{0} : x);
}

// Merges `total`, a sum with the maximum `now`, into the running pair of row i; returns the factor for the former sum.
__device__ inline double merge_softmax(const Scalars& rows, int64_t i, double now, double total) {
  const double max = at(rows, kMax, i), shrink = max == -kInfinity ? 0 : exp(max - now);
  at(rows, kMax, i) = now;
  at(rows, kOthers, i) = at(rows, kOthers, i) * shrink + total;
  return shrink;
}

}  // namespace amn::cuda
