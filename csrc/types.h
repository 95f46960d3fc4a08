// What the primitives share with their kernels: the numbers per row and per column, the terms, and options. Free of
// torch.
#pragma once

#include <cstdint>

namespace amn {

constexpr double kEps = 1e-8;  // a norm below this counts as zero

// How numbers are stored. kAny: of no matrix, any of them.
enum class Dtype : int32_t { kFloat, kDouble, kHalf, kBfloat16, kAny };

// Per-row scalars, float64 [kRowScalars, N]: a few numbers a row, so their precision is free. Those of an option that
// is off are neither written nor read. "Sends" is said of a row whose pred and target both count and are not zero.
enum RowScalar : int64_t {
  kWeight,       // 1/n for a row that counts, 0 for a masked one; n = number of rows that count
  kInvPred,      // 1/|p|, or 0 for a zero vector
  kInvTarget,    // 1/|t|, or 0
  kExcess,       // (|p| - |t|)/|t|, summed from d: does not cancel for p near t
  kOneMinusCos,  // |p/|p| - t/|t||^2 / 2, or 1 where either is a zero vector
  kPredPred,     // p.p
  kTargetTarget, // t.t
  kDiffDiff,     // d.d
  kPredDiff,     // p.d
  kMax,          // max over the other keys of s_ij = cos(p_i, k_j) / temperature; -inf without any
  kOthers,       // sum over the other keys of exp(s_ij - max)
  kKeys,         // number of the other keys
  kPredAtt,      // p.o
  kDiffAtt,      // d.o
  kAttAtt,       // o.o
  kPlainRowScalars,  // those of plain options, so that the others are not even allocated
  // Direction "both": row i as a key, over the other queries of its column.
  kColMax = kPlainRowScalars,  // max of s_ji
  kColOthers,    // sum of exp(s_ji - max)
  // Positives by id.
  kPositives,      // number of the other positives
  kPositiveSum,    // sum of s_ij over them
  kColPositiveSum, // sum of s_ji over them
  kNegativeMax,    // max of s_ij over the keys that are no positives
  // Terms of columns: h is the row's moment gradient, v its variance gradient, both without the factor of the term.
  kPredSpread,       // u.p/|p| with u = V (p/|p| - mean): what the normalisation takes out of u
  kPredMoment,       // p.h
  kDiffMoment,       // d.h
  kAttMoment,        // o.h
  kMomentMoment,     // h.h
  kDiffVariance,     // d.v     (p.v = 0)
  kAttVariance,      // o.v
  kMomentVariance,   // h.v
  kVarianceVariance, // v.v
  kRowScalars,
};

// Running moments per column over the rows that count, float64 [kMoments, D]; S(x, y) = sum (x - mean x)(y - mean y).
enum Moment : int64_t {
  kMeanPred,
  kMeanTarget,
  kMeanDiff,
  kMeanUnitPred,    // of p/|p|
  kMeanUnitTarget,  // of t/|t|
  kPredPredS,
  kTargetTargetS,
  kDiffDiffS,
  kDiffPredS,
  kUnitPredS,
  kUnitTargetS,
  kMoments,
};

// What follows from the moments per column, in the dtype that is computed in, [kColumns, D]. Row gradients of moment:
// h = A + C (p - mean p), and -A - C' (t - mean t) for the target; of variance: v = (u - (u.q) q)/|p|, q = p/|p|,
// u = V (q - mean q).
enum Column : int64_t {
  kMomentA,        // 2/(nD) (mean p - mean t)
  kMomentC,        // 2/D (sd p - sd t) / ((n - 1) sd p)
  kMomentPred,     // mean p
  kMomentCTarget,  // 2/D (sd p - sd t) / ((n - 1) sd t)
  kMomentTarget,   // mean t
  kVarianceV,      // -1/D / ((n - 1) sd q) where sd q < gamma, else 0
  kVarianceUnit,   // mean q
  kColumns,
};

// Terms, numbered as in amn_kernels/options.py.
enum Term : int64_t { kMse = 0, kCosine = 1, kInfonce = 2, kMoment = 3, kVariance = 4 };

constexpr int64_t kMaxTerms = 5;
constexpr int64_t kMetrics = 5;  // cosine_similarity, top1, chance, pred_norm, target_norm

// What is computed, in the order of the caller's terms.
struct TermList {
  int64_t size = 0;
  int64_t term[kMaxTerms] = {};
  bool differentiable[kMaxTerms] = {};  // false: a monitored term, value only

  int64_t find(Term wanted) const {
    for (int64_t i = 0; i < size; ++i) {
      if (term[i] == wanted) return i;
    }
    return -1;
  }
  bool has(Term wanted) const { return find(wanted) >= 0; }
  bool sends(Term wanted) const { return has(wanted) && differentiable[find(wanted)]; }
};

// What is said of InfoNCE besides its temperature.
struct InfonceForm {
  bool both;              // the mean of row and column softmax, else the row softmax
  bool positives_by_id;   // rows with one id are positives, else they are not each other's negatives
};

// How the attention output is held before row_dots.
enum class Attention : int64_t {
  kUnnormalised,  // sum_{j != i} exp(s_ij - max_i) k_j/|k_j|
  kNormalised,    // sum_{j != i} v_ij k_j/|k_j|, v as softmax_weights_ has it
  kByKey,         // for a row that is a key: 1/|t_j| sum_{i != j} v_ij p_i/|p_i|
  // |t_i| sum_{j != i} exp(s_ij - max_i) k_j/|k_j|: weights of 16 bits stay in their range. A weight above 65,504, the
  // largest float16, is cut to that: of a float16 key that is so many times shorter than t_i.
  kScaled,
};

// How balanced weights are formed.
struct BalanceOptions {
  int64_t anchor;
  double decay;
  int64_t update_every;
  bool by_value;  // balance values, else norms of gradients
  bool update;    // false: the state stays as it is
};

// Its constants, explained in python_ref/balance.py.
constexpr float kSpike = 9, kLeastRatio = 1e-6f;
constexpr int64_t kSpikeAfter = 10;

}  // namespace amn
