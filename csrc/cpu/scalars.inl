// What the scalars of a row say.

namespace amn::cpu {
namespace {

// Row i counts: it is not masked. NaN, which a weight never is, would count.
AMN_INLINE bool counts(const Scalars& rows, int64_t i) { return !(rows.at(kWeight, i) == 0); }

// Row i sends a gradient from cosine and InfoNCE.
AMN_INLINE bool sends(const Scalars& rows, int64_t i) {
  return counts(rows, i) && rows.at(kInvPred, i) != 0 && rows.at(kInvTarget, i) != 0;
}

AMN_INLINE double own_logit(const Scalars& rows, int64_t i, double temperature) {
  return (1 - rows.at(kOneMinusCos, i)) / temperature;
}

// Share of the others in a softmax: others / (others + own). Without any, max is -inf, own inf and the share 0.
AMN_INLINE double share_of_others(double max, double others, double own) {
  return others / (others + std::exp(own - max));
}

}  // namespace
}  // namespace amn::cpu
