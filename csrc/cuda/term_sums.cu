// term_sums: the sums over the rows that values, Gram matrix, metrics and loss are made of. In two stages of fixed
// order: each block sums its rows, then one block the blocks. A single block does both in one launch.
#include "row_math.cuh"

namespace amn::cuda {
namespace {

constexpr int kSumThreads = 256;
constexpr int64_t kRowsOfOneBlock = 2048, kRowsPerBlock = 512;

// Sums over the rows, each with its weight; the Gram matrix as its upper triangle, without the factors common to all
// rows.
enum Sum { kDiff, kOneMinusCosine, kInfonceValue, kWeights, kTop1, kChance, kPredNorm, kTargetNorm, kGram };
constexpr int kSums = kGram + kMaxTerms * (kMaxTerms + 1) / 2;

__host__ __device__ constexpr int gram_index(int i, int j) { return kGram + i * kMaxTerms - i * (i - 1) / 2 + j - i; }

// log(own + others) - own logit, written so that neither a dominating nor a vanishing own key loses digits.
__device__ double cross_entropy(double max, double others, double own_logit) {
  // No other key: 0, or NaN where the row is not finite.
  if (max == -kInfinity && others == 0) return 0 * own_logit;
  const double own = exp(own_logit - max);
  // Further below, the own key is nothing beside the others, and before it is 0 the quotient overflows.
  return own > 1e-200 ? log1p(others / own) : max - own_logit + log(others);
}

__device__ double infonce_of_row(const Scalars& rows, int64_t i, const InfonceForm& form, double own) {
  double value = cross_entropy(at(rows, kMax, i), at(rows, kOthers, i), own);
  if (form.both) value = (value + cross_entropy(at(rows, kColMax, i), at(rows, kColOthers, i), own)) / 2;
  if (!form.positives_by_id) return value;
  // log-sum - mean over the positives = (log-sum - own) + mean over the positives of (own - s).
  const double others = at(rows, kPositives, i), sum = at(rows, kPositiveSum, i);
  return value + (others * own - (form.both ? (sum + at(rows, kColPositiveSum, i)) / 2 : sum)) / (1 + others);
}

struct SumOptions {
  TermList terms;
  InfonceForm form;
  int64_t dim;
  bool has_infonce;
  bool has_gram, has_attention, has_columns;  // the Gram matrix, and its part from InfoNCE and from terms of columns
  double tie;  // cosines closer than this are equal: the rounding of a matrix product
};

// Adds row i to the sums of values and metrics.
__device__ void add_values(
    double (&sums)[kSums], const Scalars& rows, int64_t i, const SumOptions& options, double tau) {
  const double weight = at(rows, kWeight, i), one_minus_cos = at(rows, kOneMinusCos, i);
  sums[kWeights] += weight;
  sums[kDiff] += weight * at(rows, kDiffDiff, i);
  sums[kOneMinusCosine] += weight * one_minus_cos;
  sums[kPredNorm] += weight * sqrt(at(rows, kPredPred, i));
  sums[kTargetNorm] += weight * sqrt(at(rows, kTargetTarget, i));
  if (!options.has_infonce) return;
  const double own = (1 - one_minus_cos) / tau, max = at(rows, kMax, i);
  const double margin =
      options.form.positives_by_id ? (own > max ? own : max) - at(rows, kNegativeMax, i) : own - max;
  sums[kInfonceValue] += weight * infonce_of_row(rows, i, options.form, own);
  sums[kTop1] += margin * tau > options.tie ? weight : 0;
  sums[kChance] += weight * log1p(at(rows, kKeys, i));
}

// Adds row i to the sums of the Gram matrix.
__device__ void add_gram(double (&sums)[kSums], const Scalars& rows, int64_t i, const SumOptions& options) {
  const double weight = at(rows, kWeight, i), square = weight * weight;
  const double inv_pred = at(rows, kInvPred, i), inv_target = at(rows, kInvTarget, i);
  const double one_minus_cos = at(rows, kOneMinusCos, i), dd = at(rows, kDiffDiff, i);
  const bool has_attention = options.has_attention;
  const bool has_cosine = inv_pred != 0 && inv_target != 0;  // cosine sends no gradient into another row
  const double sin_square = one_minus_cos * (2 - one_minus_cos);
  sums[gram_index(kMse, kMse)] += square * dd;
  if (has_cosine) {
    sums[gram_index(kMse, kCosine)] += square * sqrt(at(rows, kTargetTarget, i)) * inv_pred * sin_square;
    sums[gram_index(kCosine, kCosine)] += square * inv_pred * inv_pred * sin_square;
  }
  // The InfoNCE gradient is (o - (p.o)/|p|^2 p)/|p|: orthogonal to p, so of the others only their part along d counts.
  const double along_pred = has_attention ? at(rows, kPredAtt, i) * inv_pred * inv_pred : 0;
  if (has_attention) {
    const double with_diff = inv_pred * (at(rows, kDiffAtt, i) - along_pred * at(rows, kPredDiff, i));
    sums[gram_index(kMse, kInfonce)] += square * with_diff;
    sums[gram_index(kCosine, kInfonce)] += square * inv_pred * inv_target * with_diff;
    sums[gram_index(kInfonce, kInfonce)] +=
        square * inv_pred * inv_pred * (at(rows, kAttAtt, i) - along_pred * at(rows, kPredAtt, i));
  }
  if (!options.has_columns) return;
  sums[gram_index(kMse, kMoment)] += weight * at(rows, kDiffMoment, i);
  sums[gram_index(kMse, kVariance)] += weight * at(rows, kDiffVariance, i);
  if (has_cosine) {
    const double along = inv_pred * inv_pred * (one_minus_cos + at(rows, kExcess, i));
    sums[gram_index(kCosine, kMoment)] +=
        weight * (inv_pred * inv_target * at(rows, kDiffMoment, i) - along * at(rows, kPredMoment, i));
    sums[gram_index(kCosine, kVariance)] += weight * inv_pred * inv_target * at(rows, kDiffVariance, i);
  }
  if (has_attention) {
    sums[gram_index(kInfonce, kMoment)] +=
        weight * inv_pred * (at(rows, kAttMoment, i) - along_pred * at(rows, kPredMoment, i));
    sums[gram_index(kInfonce, kVariance)] += weight * inv_pred * at(rows, kAttVariance, i);
  }
  sums[gram_index(kMoment, kMoment)] += at(rows, kMomentMoment, i);
  sums[gram_index(kMoment, kVariance)] += at(rows, kMomentVariance, i);
  sums[gram_index(kVariance, kVariance)] += at(rows, kVarianceVariance, i);
}

// Where the results go; real numbers.
struct Results {
  const double* col_values;  // [2], or null
  const void* weights;       // null without a loss
  void *values, *gram, *metrics, *loss;
};

// By one thread: a few numbers.
template <class Real>
__device__ void finish(const double* sums, const SumOptions& options, double tau, const Results& to) {
  const TermList& terms = options.terms;
  const auto value = [&](int64_t term) {
    if (term == kMse) return sums[kDiff] / options.dim;
    if (term == kCosine) return sums[kOneMinusCosine];
    if (term == kInfonce) return sums[kInfonceValue];
    return to.col_values[term == kMoment ? 0 : 1];
  };
  const auto factor = [&](int64_t term) { return term == kMse ? 2.0 / options.dim : term == kInfonce ? 1 / tau : 1.0; };
  double loss = 0;
#pragma unroll
  for (int i = 0; i < kMaxTerms; ++i) {
    if (i >= terms.size) continue;
    const Real rounded = value(terms.term[i]);
    static_cast<Real*>(to.values)[i] = rounded;
    if (to.loss != nullptr) loss += double{rounded} * static_cast<const Real*>(to.weights)[i];
#pragma unroll
    for (int j = 0; j < kMaxTerms; ++j) {
      if (!options.has_gram || j >= terms.size) continue;
      const int a = terms.term[i], b = terms.term[j];
      const bool wanted = terms.differentiable[i] && terms.differentiable[j];
      static_cast<Real*>(to.gram)[i * terms.size + j] =
          wanted ? factor(a) * factor(b) * sums[a < b ? gram_index(a, b) : gram_index(b, a)] : 0;
    }
  }
  Real* metrics = static_cast<Real*>(to.metrics);
  metrics[0] = sums[kWeights] - sums[kOneMinusCosine];
  metrics[1] = sums[kTop1];
  metrics[2] = sums[kChance];
  metrics[3] = sums[kPredNorm];
  metrics[4] = sums[kTargetNorm];
  if (to.loss != nullptr) *static_cast<Real*>(to.loss) = loss;
}

template <class Real>
__global__ void __launch_bounds__(kSumThreads) sum_rows_kernel(
    Scalars rows, int64_t count, SumOptions options, Temperature temperature, double* partial, Results to) {
  constexpr int kWarps = kSumThreads / 32;
  AMN_SHARED(double, of_warps, kWarps * kSums);
  AMN_SHARED(double, of_block, kSums);
  const double tau = value_of(temperature);
  const int64_t share = (count + gridDim.x - 1) / gridDim.x, first = blockIdx.x * share;
  const int64_t end = first + share < count ? first + share : count;
  double sums[kSums] = {};
  for (int64_t i = first + threadIdx.x; i < end; i += kSumThreads) {
    if (at(rows, kWeight, i) == 0) continue;  // masked
    add_values(sums, rows, i, options, tau);
    if (options.has_gram) add_gram(sums, rows, i, options);
  }
#pragma unroll
  for (int q = 0; q < kSums; ++q) {
    for (int offset = 16; offset > 0; offset /= 2) sums[q] += __shfl_xor_sync(0xffffffffu, sums[q], offset);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32 * kSums + q] = sums[q];
  }
  __syncthreads();
  if (threadIdx.x < kSums) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += of_warps[w * kSums + threadIdx.x];
    if (gridDim.x > 1) {
      partial[blockIdx.x * kSums + threadIdx.x] = sum;
    } else {
      of_block[threadIdx.x] = sum;
    }
  }
  if (gridDim.x > 1) return;
  __syncthreads();
  if (threadIdx.x == 0) finish<Real>(of_block, options, tau, to);
}

template <class Real>
__global__ void __launch_bounds__(32) sum_blocks_kernel(
    int64_t blocks, SumOptions options, Temperature temperature, const double* partial, Results to) {
  static_assert(kSums <= 32);
  AMN_SHARED(double, sums, 32);
  double sum = 0;
  for (int64_t block = 0; block < blocks && threadIdx.x < kSums; ++block) sum += partial[block * kSums + threadIdx.x];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) finish<Real>(sums, options, value_of(temperature), to);
}

int64_t blocks_for(int64_t rows) { return rows <= kRowsOfOneBlock ? 1 : (rows + kRowsPerBlock - 1) / kRowsPerBlock; }

}  // namespace

int64_t term_sums_scratch(int64_t rows) { return blocks_for(rows) > 1 ? blocks_for(rows) * kSums : 0; }

void term_sums(
    const Scalars& rows, int64_t count, const double* col_values, const TermList& terms, const InfonceForm& form,
    int64_t dim, const Temperature& temperature, Dtype real, double* partial, const void* weights, void* values,
    void* gram, void* metrics, void* loss, cudaStream_t stream) {
  const Results to{col_values, weights, values, gram, metrics, loss};
  const int64_t blocks = blocks_for(count);
  const auto launch = [&]<class Real>() {
    const double tie = 8 * double{std::numeric_limits<Real>::epsilon()};
    const SumOptions options{
        terms, form, dim, terms.has(kInfonce), gram != nullptr, terms.sends(kInfonce),
        terms.sends(kMoment) || terms.sends(kVariance), tie};
    AMN_LAUNCH(
        sum_rows_kernel<Real>, dim3(static_cast<unsigned>(blocks)), dim3(kSumThreads), 0, stream, rows, count, options,
        temperature, partial, to);
    if (blocks == 1) return;
    AMN_LAUNCH(
        sum_blocks_kernel<Real>, dim3(1), dim3(32), 0, stream, blocks, options, temperature, partial, to);
  };
  real == Dtype::kDouble ? launch.template operator()<double>() : launch.template operator()<float>();
}

}  // namespace amn::cuda
