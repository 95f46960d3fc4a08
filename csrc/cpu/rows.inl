// Along a row: norms and distances, dots with the attention, and the gradient.

namespace amn::cpu {
namespace {

// 0 for a zero vector; NaN for a norm that is not finite, so that it can't pass for a zero vector.
double inverse_norm(double square) {
  const double norm = std::sqrt(square);
  if (norm < kEps) return 0;
  return std::isfinite(norm) ? 1 / norm : std::numeric_limits<double>::quiet_NaN();
}

// Whether d = p - t keeps the digits of both vectors; `excess` is (|p| - |t|)/|t|.
bool similar_norms(double excess) { return std::abs(excess) < 0.5; }

// Calls f with the rows of x, or of both, as what they are stored in: T or, where that is float32, 16 bits.
template <class T, class F>
AMN_INLINE void as_stored(const AnyRows& x, const F& f) {
  if constexpr (std::is_same_v<T, float>) {
    if (x.dtype == Dtype::kHalf) return f(x.of<Float16>());
    if (x.dtype == Dtype::kBfloat16) return f(x.of<Bfloat16>());
  }
  f(x.of<T>());
}
template <class T, class F>
AMN_INLINE void as_stored(const AnyRows& x, const AnyRows& y, const F& f) {
  as_stored<T>(x, [&](auto stored) {
    as_stored<T>(y, [&](auto other) { f(stored, other); });
  });
}

template <class T, class P, class Q>
void row_stats_of(
    Matrix<const P> pred, Matrix<const Q> target, Matrix<T> pred_copy, Matrix<T> target_copy, Scalars rows,
    T* key_scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const bool reads = counts(rows, i);
    const P* p = pred.row(i);
    const Q* t = target.row(i);
    T* const p_copy = pred_copy.data != nullptr ? pred_copy.row(i) : nullptr;
    T* const t_copy = target_copy.data != nullptr ? target_copy.row(i) : nullptr;
    if (!reads) {
      if (p_copy != nullptr) std::memset(p_copy, 0, pred.cols * sizeof(T));
      if (t_copy != nullptr) std::memset(t_copy, 0, pred.cols * sizeof(T));
    }
    // A masked row, which may hold NaN, has the scalars of zeros.
    const int64_t cols = reads ? pred.cols : 0;
    double pp = 0, tt = 0, dd = 0, pd = 0;
    for_blocks(0, cols, [&](int64_t first, int64_t last) {
      Vector<T> pp_lanes{}, tt_lanes{}, dd_lanes{}, pd_lanes{};
      for_vectors<T>(first, last, [&](int64_t k, auto access) {
        const Vector<T> pk = access.load(p + k), tk = access.load(t + k), dk = pk - tk;
        if (p_copy != nullptr) access.store(p_copy + k, pk);
        if (t_copy != nullptr) access.store(t_copy + k, tk);
        pp_lanes += pk * pk;
        tt_lanes += tk * tk;
        dd_lanes += dk * dk;
        pd_lanes += pk * dk;
      });
      pp += sum<T>(pp_lanes);
      tt += sum<T>(tt_lanes);
      dd += sum<T>(dd_lanes);
      pd += sum<T>(pd_lanes);
    });
    const double inv_pred = inverse_norm(pp), inv_target = inverse_norm(tt);
    // |p|^2 - |t|^2 = d.(p + t) = 2 p.d - d.d
    const double norms = std::sqrt(pp) + std::sqrt(tt);
    const double excess = norms > 0 || std::isnan(norms) ? (2 * pd - dd) / norms * inv_target : 0;
    double one_minus_cos = 1;
    if (inv_pred != 0 && inv_target != 0) {
      // |p/|p| - t/|t||^2 / 2. The row is in cache, so the second pass costs no memory traffic. For similar norms the
      // difference is taken as (d - excess t)/|p|, in which nothing cancels; d itself loses the smaller vector else.
      const bool similar = similar_norms(excess);
      const T d_scale = static_cast<T>(similar ? inv_pred : 0), p_scale = static_cast<T>(similar ? 0 : inv_pred);
      const T t_scale = static_cast<T>(similar ? inv_pred * excess : inv_target);
      double square = 0;
      const auto sum_squares = [&](const auto* from_p, const auto* from_t) __attribute__((always_inline)) {
        for_blocks(0, cols, [&](int64_t first, int64_t last) {
          Vector<T> lanes{};
          for_vectors<T>(first, last, [&](int64_t k, auto access) {
            const Vector<T> pk = access.load(from_p + k), tk = access.load(from_t + k);
            const Vector<T> ek = d_scale * (pk - tk) + p_scale * pk - t_scale * tk;
            lanes += ek * ek;
          });
          square += sum<T>(lanes);
        });
      };
      // What has been converted is not converted again.
      p_copy != nullptr && t_copy != nullptr ? sum_squares(p_copy, t_copy) : sum_squares(p, t);
      one_minus_cos = square / 2;
    }
    rows.at(kInvPred, i) = inv_pred;
    rows.at(kInvTarget, i) = inv_target;
    rows.at(kExcess, i) = excess;
    rows.at(kOneMinusCos, i) = one_minus_cos;
    rows.at(kPredPred, i) = pp;
    rows.at(kTargetTarget, i) = tt;
    rows.at(kDiffDiff, i) = dd;
    rows.at(kPredDiff, i) = pd;
    rows.at(kMax, i) = -std::numeric_limits<double>::infinity();
    rows.at(kOthers, i) = 0;
    rows.at(kKeys, i) = 0;
    rows.at(kPredAtt, i) = 0;
    rows.at(kDiffAtt, i) = 0;
    rows.at(kAttAtt, i) = 0;
    key_scale[i] = static_cast<T>(reads ? inv_target : -1.0);
  }
}

template <class T>
void row_stats(
    AnyRows pred, AnyRows target, Matrix<T> pred_copy, Matrix<T> target_copy, Scalars rows, T* key_scale,
    int64_t begin, int64_t end) {
  as_stored<T>(pred, target, [&](auto p, auto t) {
    row_stats_of(p, t, pred_copy, target_copy, rows, key_scale, begin, end);
  });
}

template <class T>
void row_dots(
    Matrix<const T> pred, Matrix<const T> target, Matrix<T> attention, Scalars rows, Attention held, InfonceForm form,
    double temperature, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* p = pred.row(i);
    const T* t = target.row(i);
    T* o = attention.row(i);
    const double own = own_logit(rows, i, temperature), max = rows.at(kMax, i), others = rows.at(kOthers, i);
    double factor = 1, positive = 0;
    if (held == Attention::kByKey) factor = rows.at(kInvPred, i) != 0 ? std::sqrt(rows.at(kPredPred, i)) : 0;
    if (held == Attention::kUnnormalised) factor = sends(rows, i) ? 1 / (others + std::exp(own - max)) : 0;
    if (sends(rows, i)) {
      positive = share_of_others(max, others, own);
      if (form.both) positive = (positive + share_of_others(rows.at(kColMax, i), rows.at(kColOthers, i), own)) / 2;
      if (form.positives_by_id) positive -= rows.at(kPositives, i) / (1 + rows.at(kPositives, i));
    }
    const T share = static_cast<T>(factor), take = static_cast<T>(positive * rows.at(kInvTarget, i));
    double p_o = 0, d_o = 0, o_o = 0;
    for_blocks(0, pred.cols, [&](int64_t first, int64_t last) {
      Vector<T> p_o_lanes{}, d_o_lanes{}, o_o_lanes{};
      for_vectors<T>(first, last, [&](int64_t k, auto access) {
        const Vector<T> pk = access.load(p + k), tk = access.load(t + k);
        const Vector<T> ok = access.load(o + k) * share - tk * take;
        p_o_lanes += pk * ok;
        d_o_lanes += (pk - tk) * ok;
        o_o_lanes += ok * ok;
        access.store(o + k, ok);
      });
      p_o += sum<T>(p_o_lanes);
      d_o += sum<T>(d_o_lanes);
      o_o += sum<T>(o_o_lanes);
    });
    rows.at(kPredAtt, i) = p_o;
    rows.at(kDiffAtt, i) = d_o;
    rows.at(kAttAtt, i) = o_o;
  }
}

template <class T, class P, class Q>
void row_combine_of(
    Matrix<const P> pred, Matrix<const Q> target, Matrix<const T> attention, Matrix<const T> columns, Scalars rows,
    Coefficients weights, Matrix<P> grad, int64_t begin, int64_t end) {
  const bool has_columns = weights.moment != 0 || weights.variance != 0;
  for (int64_t i = begin; i < end; ++i) {
    P* const g = grad.row(i);
    if (!counts(rows, i)) {
      std::memset(g, 0, pred.cols * sizeof(P));
      continue;
    }
    const double weight = rows.at(kWeight, i);
    const double inv_pred = rows.at(kInvPred, i), inv_target = rows.at(kInvTarget, i);
    const double excess = rows.at(kExcess, i), one_minus_cos = rows.at(kOneMinusCos, i);
    const double cosine = weights.cosine * weight, infonce = weights.infonce * weight;
    double a = 0, b = weights.mse * weight, c = 0, e = 0;
    if (cosine != 0 && inv_pred != 0 && inv_target != 0) {
      if (similar_norms(excess)) {
        a -= cosine * inv_pred * inv_pred * (one_minus_cos + excess);
        b += cosine * inv_pred * inv_target;
      } else {
        a += cosine * inv_pred * inv_pred * (1 - one_minus_cos);
        e -= cosine * inv_pred * inv_target;
      }
    }
    if (infonce != 0 && inv_pred != 0) {
      a -= infonce * inv_pred * inv_pred * inv_pred * rows.at(kPredAtt, i);
      c = infonce * inv_pred;
    }
    if (weights.variance != 0) a -= weights.variance * inv_pred * inv_pred * rows.at(kPredSpread, i);
    const T ai = static_cast<T>(a), bi = static_cast<T>(b), ci = static_cast<T>(c), ei = static_cast<T>(e);
    const T moment = static_cast<T>(weights.moment), spread = static_cast<T>(weights.variance * inv_pred);
    const T unit = static_cast<T>(inv_pred);
    const P* p = pred.row(i);
    const Q* t = target.row(i);
    const T* o = c != 0 ? attention.row(i) : nullptr;
    for_vectors<T>(0, pred.cols, [&](int64_t k, auto access) {
      const Vector<T> pk = access.load(p + k), tk = access.load(t + k);
      Vector<T> gk = ai * pk + bi * (pk - tk) + ei * tk;
      if (o != nullptr) gk += ci * access.load(o + k);
      if (has_columns) {
        gk += moment * moment_at(columns, k, pk, access) + spread * spread_at(columns, k, pk * unit, access);
      }
      access.store(g + k, gk);
    });
  }
}

template <class T>
void row_combine(
    AnyRows pred, AnyRows target, Matrix<const T> attention, Matrix<const T> columns, Scalars rows,
    Coefficients weights, Matrix<char> grad, int64_t begin, int64_t end) {
  as_stored<T>(pred, target, [&]<class P>(Matrix<const P> p, auto t) {
    const Matrix<P> g{reinterpret_cast<P*>(grad.data), grad.stride / int64_t{sizeof(P)}, grad.cols};
    row_combine_of(p, t, attention, columns, rows, weights, g, begin, end);
  });
}

}  // namespace
}  // namespace amn::cpu
