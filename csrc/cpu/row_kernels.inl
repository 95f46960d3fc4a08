// Body of row_kernels_{baseline,avx2,avx512}.cpp, which set the target and name the function that exports it.
//
// Written with the vector extension of gcc and clang: one vector is 64 bytes on every instruction set, so the order of
// summation, and with it the result up to fused multiply-adds, does not depend on the machine.

namespace amn::cpu {
namespace {

#define AMN_INLINE inline __attribute__((always_inline))

constexpr int64_t kVectorBytes = 64;

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef uint32_t integers __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);

// Elements that are summed in T before the sum moves to double. With 1024, the InfoNCE of two rows, where nothing
// averages out, had five times the error of eager PyTorch.
constexpr int64_t kBlock = 256;

// Access to a whole vector, or to its first lanes at the end of a row.
template <class T>
struct Whole {
  AMN_INLINE Vector<T> load(const T* x) const { return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(x); }
  AMN_INLINE Vector<T> or_else(Vector<T> v, T) const { return v; }
  AMN_INLINE void store(T* x, Vector<T> v) const { *reinterpret_cast<typename VectorOf<T>::unaligned*>(x) = v; }
};
template <class T>
struct First {
  int64_t lanes;
  AMN_INLINE Vector<T> load(const T* x) const {  // 0 in the lanes past the end
    Vector<T> v{};
    std::memcpy(&v, x, lanes * sizeof(T));
    return v;
  }
  AMN_INLINE Vector<T> or_else(Vector<T> v, T fill) const {  // v, and fill past the end
    Vector<T> filled = Vector<T>{} + fill;
    std::memcpy(&filled, &v, lanes * sizeof(T));
    return filled;
  }
  AMN_INLINE void store(T* x, Vector<T> v) const { std::memcpy(x, &v, lanes * sizeof(T)); }
};

// Calls f(i, access) for every vector of [begin, end).
template <class T, class F>
AMN_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kLanes<T> <= end; i += kLanes<T>) f(i, Whole<T>{});
  if (i < end) f(i, First<T>{end - i});
}

// Calls f(begin, end) for the blocks of [begin, end).
template <class F>
AMN_INLINE void for_blocks(int64_t begin, int64_t end, const F& f) {
  for (; begin < end; begin += kBlock) f(begin, begin + kBlock < end ? begin + kBlock : end);
}

template <class T>
AMN_INLINE T sum(Vector<T> v) {
  T lanes[kLanes<T>];
  std::memcpy(lanes, &v, sizeof v);
  for (int64_t width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <class T>
AMN_INLINE T maximum(Vector<T> v) {
  T best = v[0];
  for (int64_t i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// exp for x <= 0, and 0 where that is below the smallest normal number. Range reduction and polynomial: Cephes expf
// (S. Moshier), error about one unit in the last place. A NaN stays one.
AMN_INLINE Vector<float> exp_nonpositive(Vector<float> x) {
  typedef VectorOf<float>::integers Integers;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vector<float> shifted = x * 1.44269504088896341f + kRound;
  const Vector<float> n = shifted - kRound;
  const Vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vector<float> y = 1.9875691500e-4f * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  const Integers power_of_two = ((Integers)shifted << 23) + 0x3f800000;
  return x < -87.f ? Vector<float>{} : y * (Vector<float>)power_of_two;
}

AMN_INLINE Vector<double> exp_nonpositive(Vector<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// 0 for a zero vector; NaN for a norm that is not finite, so that it can't pass for a zero vector.
double inverse_norm(double square) {
  const double norm = std::sqrt(square);
  if (norm < kEps) return 0;
  return std::isfinite(norm) ? 1 / norm : std::numeric_limits<double>::quiet_NaN();
}

// Whether d = p - t keeps the digits of both vectors; `excess` is (|p| - |t|)/|t|.
bool similar_norms(double excess) { return std::abs(excess) < 0.5; }

template <class T>
void row_stats(
    Matrix<const T> pred, Matrix<const T> target, Scalars rows, T* key_scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* p = pred.row(i);
    const T* t = target.row(i);
    double pp = 0, tt = 0, dd = 0, pd = 0;
    for_blocks(0, pred.cols, [&](int64_t first, int64_t last) {
      Vector<T> pp_lanes{}, tt_lanes{}, dd_lanes{}, pd_lanes{};
      for_vectors<T>(first, last, [&](int64_t k, auto access) {
        const Vector<T> pk = access.load(p + k), tk = access.load(t + k), dk = pk - tk;
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
    const double excess = (2 * pd - dd) / (std::sqrt(pp) + std::sqrt(tt)) * inv_target;
    double one_minus_cos = 1;
    if (inv_pred != 0 && inv_target != 0) {
      // |p/|p| - t/|t||^2 / 2. The row is in cache, so the second pass costs no memory traffic. For similar norms the
      // difference is taken as (d - excess t)/|p|, in which nothing cancels; d itself loses the smaller vector else.
      const bool similar = similar_norms(excess);
      const T d_scale = static_cast<T>(similar ? inv_pred : 0), p_scale = static_cast<T>(similar ? 0 : inv_pred);
      const T t_scale = static_cast<T>(similar ? inv_pred * excess : inv_target);
      double square = 0;
      for_blocks(0, pred.cols, [&](int64_t first, int64_t last) {
        Vector<T> lanes{};
        for_vectors<T>(first, last, [&](int64_t k, auto access) {
          const Vector<T> pk = access.load(p + k), tk = access.load(t + k);
          const Vector<T> ek = d_scale * (pk - tk) + p_scale * pk - t_scale * tk;
          lanes += ek * ek;
        });
        square += sum<T>(lanes);
      });
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
    rows.at(kPredAtt, i) = 0;
    rows.at(kDiffAtt, i) = 0;
    rows.at(kAttAtt, i) = 0;
    key_scale[i] = static_cast<T>(inv_target);
  }
}

template <class T>
void softmax_rows_(
    Matrix<T> logits, const T* key_scale, Scalars rows, T* rescale, int64_t own, double temperature, int64_t begin,
    int64_t end) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const int64_t keys = logits.cols;
  for (int64_t i = begin; i < end; ++i) {
    T* s = logits.row(i);
    const T scale = static_cast<T>(rows.at(kInvPred, i) / temperature);
    // The own key splits the block in two ranges; outside the block one of them is empty.
    const int64_t own_key = own + i;
    const bool has_own = own_key >= 0 && own_key < keys;
    const int64_t left = has_own ? own_key : keys, right = has_own ? own_key + 1 : keys;

    constexpr T kLowest = -std::numeric_limits<T>::infinity();
    Vector<T> max_lanes = Vector<T>{} + kLowest;
    const auto track_max = [&](int64_t j, auto access) {
      const Vector<T> x = access.or_else(access.load(s + j) * access.load(key_scale + j) * scale, kLowest);
      max_lanes = x > max_lanes ? x : max_lanes;
    };
    for_vectors<T>(0, left, track_max);
    for_vectors<T>(right, keys, track_max);
    const double former = rows.at(kMax, i);
    const double now = std::max(former, static_cast<double>(maximum<T>(max_lanes)));

    const T shift = static_cast<T>(now);
    double total = 0;
    const auto exponentials = [&](int64_t first, int64_t last) {
      Vector<T> lanes{};
      for_vectors<T>(first, last, [&](int64_t j, auto access) {
        const Vector<T> norm = access.load(key_scale + j);
        const Vector<T> x = access.load(s + j) * norm * scale - shift;
        // The maximum was rounded on another path (fused multiply-add), so that x may exceed it in the last place.
        const Vector<T> e = exp_nonpositive(access.or_else(x > 0 ? Vector<T>{} : x, kLowest));
        lanes += e;
        access.store(s + j, e * norm);
      });
      total += sum<T>(lanes);
    };
    for_blocks(0, left, exponentials);
    for_blocks(right, keys, exponentials);
    if (has_own) s[own_key] = 0;

    const double shrink = former == -kInf ? 0.0 : std::exp(former - now);
    rows.at(kMax, i) = now;
    rows.at(kOthers, i) = rows.at(kOthers, i) * shrink + total;
    if (rescale != nullptr) rescale[i] = static_cast<T>(shrink);
  }
}

template <class T>
void row_dots(
    Matrix<const T> pred, Matrix<const T> target, Matrix<T> attention, Scalars rows, double temperature, int64_t begin,
    int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* p = pred.row(i);
    const T* t = target.row(i);
    T* o = attention.row(i);
    const double others = rows.at(kOthers, i);
    // A row without other keys has max = -inf, own = inf and so o = 0.
    const double own = std::exp((1 - rows.at(kOneMinusCos, i)) / temperature - rows.at(kMax, i));
    const T share = static_cast<T>(1 / (others + own));
    const T positive = static_cast<T>(others / (others + own) * rows.at(kInvTarget, i));
    double po = 0, dq = 0, oo = 0;
    for_blocks(0, pred.cols, [&](int64_t first, int64_t last) {
      Vector<T> po_lanes{}, do_lanes{}, oo_lanes{};
      for_vectors<T>(first, last, [&](int64_t k, auto access) {
        const Vector<T> pk = access.load(p + k), tk = access.load(t + k);
        const Vector<T> ok = access.load(o + k) * share - tk * positive;
        po_lanes += pk * ok;
        do_lanes += (pk - tk) * ok;
        oo_lanes += ok * ok;
        access.store(o + k, ok);
      });
      po += sum<T>(po_lanes);
      dq += sum<T>(do_lanes);
      oo += sum<T>(oo_lanes);
    });
    rows.at(kPredAtt, i) = po;
    rows.at(kDiffAtt, i) = dq;
    rows.at(kAttAtt, i) = oo;
  }
}

template <class T>
void row_combine(
    Matrix<const T> pred, Matrix<const T> target, Matrix<const T> attention, Scalars rows, Coefficients weights,
    Matrix<T> grad, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const double inv_pred = rows.at(kInvPred, i), inv_target = rows.at(kInvTarget, i);
    const double excess = rows.at(kExcess, i), one_minus_cos = rows.at(kOneMinusCos, i);
    double a = 0, b = weights.mse, c = 0, e = 0;
    if (inv_pred != 0 && inv_target != 0) {
      if (weights.cosine != 0 && similar_norms(excess)) {
        a -= weights.cosine * inv_pred * inv_pred * (one_minus_cos + excess);
        b += weights.cosine * inv_pred * inv_target;
      } else if (weights.cosine != 0) {
        a += weights.cosine * inv_pred * inv_pred * (1 - one_minus_cos);
        e -= weights.cosine * inv_pred * inv_target;
      }
      if (weights.infonce != 0) {
        a -= weights.infonce * inv_pred * inv_pred * inv_pred * rows.at(kPredAtt, i);
        c = weights.infonce * inv_pred;
      }
    }
    const T* p = pred.row(i);
    const T* t = target.row(i);
    T* g = grad.row(i);
    const T ai = static_cast<T>(a), bi = static_cast<T>(b), ci = static_cast<T>(c), ei = static_cast<T>(e);
    if (c != 0) {
      const T* o = attention.row(i);
      for_vectors<T>(0, pred.cols, [&](int64_t k, auto access) {
        const Vector<T> pk = access.load(p + k), tk = access.load(t + k);
        access.store(g + k, ai * pk + bi * (pk - tk) + ei * tk + ci * access.load(o + k));
      });
    } else {
      for_vectors<T>(0, pred.cols, [&](int64_t k, auto access) {
        const Vector<T> pk = access.load(p + k), tk = access.load(t + k);
        access.store(g + k, ai * pk + bi * (pk - tk) + ei * tk);
      });
    }
  }
}

#undef AMN_INLINE

}  // namespace

template <class T>
RowKernels<T> AMN_KERNELS() {
  return {row_stats<T>, softmax_rows_<T>, row_dots<T>, row_combine<T>};
}
template RowKernels<float> AMN_KERNELS();
template RowKernels<double> AMN_KERNELS();

}  // namespace amn::cpu
