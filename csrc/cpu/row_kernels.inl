// Body of row_kernels_{baseline,avx2,avx512}.cpp, which set the target and its register size, and name the function that
// exports it. Vectors, and the order of sums: vectors.inl.
#include "vectors.inl"

#include "convert.inl"

namespace amn::cpu {
namespace {

// Elements that are summed in T before the sum moves to double. With 1024, the InfoNCE of two rows, where nothing
// averages out, had five times the error of eager PyTorch.
constexpr int64_t kBlock = 256;

// Calls f(begin, end) for the blocks of [begin, end).
template <class F>
AMN_INLINE void for_blocks(int64_t begin, int64_t end, const F& f) {
  for (; begin < end; begin += kBlock) f(begin, begin + kBlock < end ? begin + kBlock : end);
}

// 0 for a zero vector; NaN for a norm that is not finite, so that it can't pass for a zero vector.
double inverse_norm(double square) {
  const double norm = std::sqrt(square);
  if (norm < kEps) return 0;
  return std::isfinite(norm) ? 1 / norm : std::numeric_limits<double>::quiet_NaN();
}

// Whether d = p - t keeps the digits of both vectors; `excess` is (|p| - |t|)/|t|.
bool similar_norms(double excess) { return std::abs(excess) < 0.5; }

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

template <class T>
void row_stats(
    AnyRows<T> pred, AnyRows<T> target, Scalars rows, T* key_scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const bool there = counts(rows, i);
    const T* p = read_row(pred, i, there);
    const T* t = read_row(target, i, there);
    // A masked row, which may hold NaN, has the scalars of zeros.
    const int64_t cols = there ? pred.cols : 0;
    double pp = 0, tt = 0, dd = 0, pd = 0;
    for_blocks(0, cols, [&](int64_t first, int64_t last) {
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
      for_blocks(0, cols, [&](int64_t first, int64_t last) {
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
    rows.at(kKeys, i) = 0;
    rows.at(kPredAtt, i) = 0;
    rows.at(kDiffAtt, i) = 0;
    rows.at(kAttAtt, i) = 0;
    key_scale[i] = static_cast<T>(there ? inv_target : -1.0);
  }
}

// s = p.k to cosine / temperature in place; -inf for the own key, for keys left out and all along a masked row.
template <class T>
AMN_INLINE void scale_logits(
    T* s, const T* key_scale, int64_t keys, const Scalars& rows, int64_t i, const KeyPairs<T>& pairs,
    bool positives_by_id, int64_t own_key, double temperature) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  if (!counts(rows, i)) {
    for (int64_t j = 0; j < keys; ++j) s[j] = kLowest;
    return;
  }
  const T scale = static_cast<T>(rows.at(kInvPred, i) / temperature);
  for_vectors<T>(0, keys, [&](int64_t j, auto access) {
    const Vector<T> norm = access.load(key_scale + j);
    const Vector<T> x = access.load(s + j) * norm * scale;
    access.store(s + j, where_negative(norm, Vector<T>{} + kLowest, x));
  });
  const int64_t id_keys = pairs.row_ids != nullptr ? pairs.id_keys : 0;
  const int64_t id = id_keys > 0 ? pairs.row_ids[i] : 0;
  if (pairs.guide.data != nullptr) {
    const T* guide = pairs.guide.row(i);
    const T inv_target = static_cast<T>(rows.at(kInvTarget, i));
    const int64_t can_be_positive = positives_by_id ? id_keys : 0;
    for (int64_t j = 0; j < keys; ++j) {
      const bool close = 1 - guide[j] * inv_target * key_scale[j] < pairs.margin;
      s[j] = close && !(j < can_be_positive && pairs.key_ids[j] == id) ? kLowest : s[j];
    }
  }
  if (!positives_by_id) {
    for (int64_t j = 0; j < id_keys; ++j) s[j] = pairs.key_ids[j] == id ? kLowest : s[j];
  }
  if (own_key >= 0 && own_key < keys) s[own_key] = kLowest;
}

// Largest of s, and how many are not -inf.
template <class T>
AMN_INLINE double largest(const T* s, int64_t keys) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  Vector<T> lanes = Vector<T>{} + kLowest;
  for_vectors<T>(0, keys, [&](int64_t j, auto access) {
    const Vector<T> x = access.or_else(access.load(s + j), kLowest);
    lanes = larger(x, lanes);
  });
  return maximum<T>(lanes);
}

template <class T>
AMN_INLINE int64_t count_keys(const T* s, int64_t keys) {
  int64_t count = 0;
  for (int64_t j = 0; j < keys; ++j) count += !(s[j] == -std::numeric_limits<T>::infinity());
  return count;
}

// exp(s - shift) for s <= shift, which may be -inf where all s are. Recomputed logits may exceed it in the last place.
template <class T>
AMN_INLINE Vector<T> exp_of(Vector<T> s, T shift) {
  const Vector<T> x = s - (shift == -std::numeric_limits<T>::infinity() ? T(0) : shift);
  return exp_nonpositive(at_most_zero(x));
}

// Sum of exp(s - shift) over [0, keys); `use` is called with each vector of them.
template <class T, class F>
AMN_INLINE double sum_exp(const T* s, int64_t keys, T shift, const F& use) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  double total = 0;
  for_blocks(0, keys, [&](int64_t first, int64_t last) {
    Vector<T> lanes{};
    for_vectors<T>(first, last, [&](int64_t j, auto access) {
      const Vector<T> e = exp_of<T>(access.or_else(access.load(s + j), kLowest), shift);
      lanes += e;
      use(j, access, e);
    });
    total += sum<T>(lanes);
  });
  return total;
}

// Merges `total`, a sum with the maximum `now`, into the running pair; returns the factor for the former sum.
AMN_INLINE double merge_softmax(double& max, double& others, double now, double total) {
  const double shrink = max == -std::numeric_limits<double>::infinity() ? 0.0 : std::exp(max - now);
  max = now;
  others = others * shrink + total;
  return shrink;
}

// Number of other keys in a block that has all of them unless some are masked or left out.
template <class T>
AMN_INLINE int64_t keys_of_row(const T* s, int64_t keys, bool has_own, bool plain) {
  return plain ? keys - has_own : count_keys(s, keys);
}

template <class T>
bool no_key_is_masked(const T* key_scale, int64_t keys) {
  bool none = true;
  for (int64_t j = 0; j < keys; ++j) none &= !(key_scale[j] < 0);
  return none;
}

template <class T>
void softmax_rows_(
    Matrix<T> logits, const T* key_scale, Scalars rows, T* rescale, KeyPairs<T> pairs, int64_t own, double temperature,
    int64_t begin, int64_t end) {
  const int64_t keys = logits.cols;
  const bool plain = pairs.row_ids == nullptr && pairs.guide.data == nullptr && no_key_is_masked(key_scale, keys);
  for (int64_t i = begin; i < end; ++i) {
    T* s = logits.row(i);
    const int64_t own_key = own + i;
    scale_logits(s, key_scale, keys, rows, i, pairs, /*positives_by_id=*/false, own_key, temperature);
    const double now = std::max(rows.at(kMax, i), largest(s, keys));
    rows.at(kKeys, i) += keys_of_row(s, keys, own_key >= 0 && own_key < keys, plain && counts(rows, i));
    const double total = sum_exp<T>(s, keys, static_cast<T>(now), [&](int64_t j, auto access, Vector<T> e) {
      access.store(s + j, e * access.load(key_scale + j));
    });
    const double shrink = merge_softmax(rows.at(kMax, i), rows.at(kOthers, i), now, total);
    if (rescale != nullptr) rescale[i] = static_cast<T>(shrink);
  }
}

template <class T>
void softmax_stats_(
    Matrix<T> logits, const T* key_scale, Scalars rows, KeyPairs<T> pairs, InfonceForm form, int64_t own,
    double temperature, int64_t begin, int64_t end) {
  const int64_t keys = logits.cols;
  const bool plain = pairs.row_ids == nullptr && pairs.guide.data == nullptr && no_key_is_masked(key_scale, keys);
  for (int64_t i = begin; i < end; ++i) {
    T* s = logits.row(i);
    const int64_t own_key = own + i;
    scale_logits(s, key_scale, keys, rows, i, pairs, form.positives_by_id, own_key, temperature);
    const double now = std::max(rows.at(kMax, i), largest(s, keys));
    rows.at(kKeys, i) += keys_of_row(s, keys, own_key >= 0 && own_key < keys, plain && counts(rows, i));
    const double total = sum_exp<T>(s, keys, static_cast<T>(now), [](int64_t, auto, Vector<T>) {});
    merge_softmax(rows.at(kMax, i), rows.at(kOthers, i), now, total);
    if (!form.positives_by_id) continue;
    double positives = 0, positive_sum = 0, negative_max = rows.at(kNegativeMax, i);
    for (int64_t j = 0; j < keys; ++j) {
      if (s[j] == -std::numeric_limits<T>::infinity()) continue;
      const bool positive = pairs.row_ids != nullptr && j < pairs.id_keys && pairs.key_ids[j] == pairs.row_ids[i];
      positives += positive;
      positive_sum += positive ? s[j] : 0;
      if (!positive && s[j] > negative_max) negative_max = s[j];
    }
    rows.at(kPositives, i) += positives;
    rows.at(kPositiveSum, i) += positive_sum;
    rows.at(kNegativeMax, i) = negative_max;
  }
}

// Columns in stripes and rows in blocks, so that the second pass over a block finds it in cache.
template <class T>
void softmax_cols(
    Matrix<const T> logits, Scalars key_rows, KeyPairs<T> pairs, InfonceForm form, int64_t begin, int64_t end,
    int64_t row_count) {
  constexpr int64_t kStripe = 128, kRows = 256;
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  for (int64_t first = begin; first < end; first += kStripe) {
    const int64_t width = std::min(kStripe, end - first);
    for (int64_t top = 0; top < row_count; top += kRows) {
      const int64_t bottom = std::min(row_count, top + kRows);
      T max[kStripe], shift[kStripe], total[kStripe] = {};
      for (int64_t j = 0; j < width; ++j) max[j] = kLowest;
      for (int64_t i = top; i < bottom; ++i) {
        const T* s = logits.row(i) + first;
        for_vectors<T>(0, width, [&](int64_t j, auto access) {
          const Vector<T> x = access.load(s + j), best = access.load(max + j);
          access.store(max + j, larger(x, best));
        });
      }
      for (int64_t j = 0; j < width; ++j) {
        max[j] = std::max(static_cast<T>(key_rows.at(kColMax, first + j)), max[j]);
        shift[j] = max[j] == kLowest ? T(0) : max[j];
      }
      for (int64_t i = top; i < bottom; ++i) {
        const T* s = logits.row(i) + first;
        for_vectors<T>(0, width, [&](int64_t j, auto access) {
          const Vector<T> x = access.load(s + j) - access.load(shift + j);
          access.store(total + j, access.load(total + j) + exp_nonpositive(at_most_zero(x)));
        });
      }
      for (int64_t j = 0; j < width; ++j) {
        merge_softmax(key_rows.at(kColMax, first + j), key_rows.at(kColOthers, first + j), max[j], total[j]);
      }
      if (!form.positives_by_id || pairs.row_ids == nullptr) continue;
      for (int64_t i = top; i < bottom; ++i) {
        const T* s = logits.row(i) + first;
        for (int64_t j = 0; j < std::min(width, pairs.id_keys - first); ++j) {
          const bool positive = s[j] > kLowest && pairs.key_ids[first + j] == pairs.row_ids[i];
          if (positive) key_rows.at(kColPositiveSum, first + j) += s[j];
        }
      }
    }
  }
}

template <class T>
void softmax_weights_(
    Matrix<T> logits, const T* key_scale, Scalars rows, const T* col_max, const T* col_factor, int64_t col_keys,
    KeyPairs<T> pairs, InfonceForm form, int64_t own, bool raw, double temperature, int64_t begin, int64_t end) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  const int64_t keys = logits.cols;
  const double direction = form.both ? 0.5 : 1;
  for (int64_t i = begin; i < end; ++i) {
    T* s = logits.row(i);
    const int64_t own_key = own + i;
    if (raw) scale_logits(s, key_scale, keys, rows, i, pairs, form.positives_by_id, own_key, temperature);
    const double max = rows.at(kMax, i), others = rows.at(kOthers, i);
    const bool row_sends = sends(rows, i);
    const T shift = static_cast<T>(max);
    const T factor =
        row_sends ? static_cast<T>(direction / (others + std::exp(own_logit(rows, i, temperature) - max))) : T(0);
    const auto weigh = [&](int64_t j, auto access) {
      const Vector<T> x = access.or_else(access.load(s + j), kLowest);
      return exp_of<T>(x, shift) * factor;
    };
    for_vectors<T>(0, col_keys, [&](int64_t j, auto access) {
      const Vector<T> x = access.or_else(access.load(s + j), kLowest) - access.load(col_max + j);
      const Vector<T> col = exp_nonpositive(at_most_zero(x)) * access.load(col_factor + j);
      access.store(s + j, (weigh(j, access) + col) * access.load(key_scale + j));
    });
    for_vectors<T>(col_keys, keys, [&](int64_t j, auto access) {
      access.store(s + j, weigh(j, access) * access.load(key_scale + j));
    });
    if (form.positives_by_id && pairs.row_ids != nullptr && counts(rows, i)) {
      const double share = direction / (1 + rows.at(kPositives, i));
      const T from_row = static_cast<T>(row_sends ? share : 0.0), from_col = static_cast<T>(share);
      for (int64_t j = 0; j < pairs.id_keys; ++j) {
        if (pairs.key_ids[j] != pairs.row_ids[i] || j == own_key || key_scale[j] < 0) continue;
        s[j] -= (from_row + (j < col_keys && col_factor[j] > 0 ? from_col : T(0))) * key_scale[j];
      }
    }
  }
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
    double po = 0, dq = 0, oo = 0;
    for_blocks(0, pred.cols, [&](int64_t first, int64_t last) {
      Vector<T> po_lanes{}, do_lanes{}, oo_lanes{};
      for_vectors<T>(first, last, [&](int64_t k, auto access) {
        const Vector<T> pk = access.load(p + k), tk = access.load(t + k);
        const Vector<T> ok = access.load(o + k) * share - tk * take;
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

// Moments of columns, block of rows by block. Sums of a block are shifted by its first row, so that a constant column
// has no deviation whatever its size.
template <class T>
void col_stats(
    Matrix<const T> pred, Matrix<const T> target, Scalars rows, Matrix<double> moments, double count, int64_t begin,
    int64_t end, int64_t row_count) {
  constexpr int64_t kStripe = 64, kRows = 64;
  int64_t in_block[kRows];
  for (int64_t first = begin; first < end; first += kStripe) {
    const int64_t width = std::min(kStripe, end - first);
    double n = count;
    for (int64_t top = 0; top < row_count; top += kRows) {
      int64_t block = 0;
      for (int64_t i = top; i < std::min(row_count, top + kRows); ++i) {
        if (counts(rows, i)) in_block[block++] = i;
      }
      if (block == 0) continue;
      T origin[5][kStripe], mean[5][kStripe] = {}, products[6][kStripe] = {};
      // x[0..4]: p, t, p - t, p/|p|, t/|t| at column j.
      const auto load = [&](int64_t i, int64_t j, auto access, Vector<T>* x) {
        x[0] = access.load(pred.row(i) + first + j);
        x[1] = access.load(target.row(i) + first + j);
        x[2] = x[0] - x[1];
        x[3] = x[0] * static_cast<T>(rows.at(kInvPred, i));
        x[4] = x[1] * static_cast<T>(rows.at(kInvTarget, i));
      };
      for_vectors<T>(0, width, [&](int64_t j, auto access) {
        Vector<T> x[5];
        load(in_block[0], j, access, x);
        for (int64_t q = 0; q < 5; ++q) access.store(origin[q] + j, x[q]);
      });
      for (int64_t r = 1; r < block; ++r) {
        for_vectors<T>(0, width, [&](int64_t j, auto access) {
          Vector<T> x[5];
          load(in_block[r], j, access, x);
          for (int64_t q = 0; q < 5; ++q) {
            access.store(mean[q] + j, access.load(mean[q] + j) + (x[q] - access.load(origin[q] + j)));
          }
        });
      }
      for (int64_t q = 0; q < 5; ++q) {
        for (int64_t j = 0; j < width; ++j) mean[q][j] = mean[q][j] / static_cast<T>(block) + origin[q][j];
      }
      for (int64_t r = 0; r < block; ++r) {
        for_vectors<T>(0, width, [&](int64_t j, auto access) {
          Vector<T> x[5];
          load(in_block[r], j, access, x);
          for (int64_t q = 0; q < 5; ++q) x[q] -= access.load(mean[q] + j);
          const Vector<T> product[6] = {x[0] * x[0], x[1] * x[1], x[2] * x[2], x[2] * x[0], x[3] * x[3], x[4] * x[4]};
          for (int64_t q = 0; q < 6; ++q) access.store(products[q] + j, access.load(products[q] + j) + product[q]);
        });
      }
      // Chan, Golub & LeVeque 1983: means and sums of products of two sets of rows make those of their union.
      const double share = block / (n + block), both = n * share;
      for (int64_t j = 0; j < width; ++j) {
        const int64_t k = first + j;
        double delta[5];
        for (int64_t q = 0; q < 5; ++q) {
          double& running = moments.row(kMeanPred + q)[k];
          delta[q] = mean[q][j] - running;
          running += delta[q] * share;
        }
        const double product[6] = {delta[0] * delta[0], delta[1] * delta[1], delta[2] * delta[2],
                                   delta[2] * delta[0], delta[3] * delta[3], delta[4] * delta[4]};
        for (int64_t q = 0; q < 6; ++q) moments.row(kPredPredS + q)[k] += products[q][j] + product[q] * both;
      }
      n += block;
    }
  }
}

// The row gradients h of the moment term and, but for what the normalisation takes out, u of the variance term.
template <class T>
AMN_INLINE Vector<T> moment_at(const Matrix<const T>& columns, int64_t k, Vector<T> p, auto access) {
  return access.load(columns.row(kMomentA) + k) +
         access.load(columns.row(kMomentC) + k) * (p - access.load(columns.row(kMomentPred) + k));
}
template <class T>
AMN_INLINE Vector<T> spread_at(const Matrix<const T>& columns, int64_t k, Vector<T> unit, auto access) {
  return access.load(columns.row(kVarianceV) + k) * (unit - access.load(columns.row(kVarianceUnit) + k));
}

template <class T>
void col_dots(
    Matrix<const T> pred, Matrix<const T> target, Matrix<const T> attention, Matrix<const T> columns, Scalars rows,
    int64_t begin, int64_t end) {
  constexpr int64_t kDots = kVarianceVariance - kPredMoment + 1;
  for (int64_t i = begin; i < end; ++i) {
    double dots[kDots] = {}, spread = 0;
    if (counts(rows, i)) {
      const T* p = pred.row(i);
      const T* t = target.row(i);
      const T* o = attention.data != nullptr ? attention.row(i) : nullptr;
      const T inv_pred = static_cast<T>(rows.at(kInvPred, i));
      for_blocks(0, pred.cols, [&](int64_t first, int64_t last) {
        Vector<T> lanes{};
        for_vectors<T>(first, last, [&](int64_t k, auto access) {
          const Vector<T> unit = access.load(p + k) * inv_pred;
          lanes += spread_at(columns, k, unit, access) * unit;
        });
        spread += sum<T>(lanes);
      });
      const T out = static_cast<T>(spread);
      for_blocks(0, pred.cols, [&](int64_t first, int64_t last) {
        Vector<T> lanes[kDots] = {};
        for_vectors<T>(first, last, [&](int64_t k, auto access) {
          const Vector<T> pk = access.load(p + k), dk = pk - access.load(t + k), unit = pk * inv_pred;
          const Vector<T> ok = o != nullptr ? access.load(o + k) : Vector<T>{};
          const Vector<T> hk = moment_at(columns, k, pk, access);
          const Vector<T> vk = (spread_at(columns, k, unit, access) - unit * out) * inv_pred;
          const Vector<T> product[kDots] = {pk * hk, dk * hk, ok * hk, hk * hk, dk * vk, ok * vk, hk * vk, vk * vk};
          for (int64_t q = 0; q < kDots; ++q) lanes[q] += product[q];
        });
        for (int64_t q = 0; q < kDots; ++q) dots[q] += sum<T>(lanes[q]);
      });
    }
    rows.at(kPredSpread, i) = spread;
    for (int64_t q = 0; q < kDots; ++q) rows.at(kPredMoment + q, i) = dots[q];
  }
}

template <class T>
void row_combine(
    AnyRows<T> pred, AnyRows<T> target, Matrix<const T> attention, Matrix<const T> columns, Scalars rows,
    Coefficients weights, AnyGrad<T> grad, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    char* const out = grad.data + i * grad.stride;
    if (!counts(rows, i)) {
      std::memset(out, 0, pred.cols * size_of(grad.dtype));
      continue;
    }
    T* const g = grad.row != nullptr ? grad.row : reinterpret_cast<T*>(out);
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
    const T* p = read_row(pred, i, true);
    const T* t = read_row(target, i, true);
    if (weights.variance != 0) a -= weights.variance * inv_pred * inv_pred * rows.at(kPredSpread, i);
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
    if (weights.moment != 0 || weights.variance != 0) {
      const T moment = static_cast<T>(weights.moment), spread = static_cast<T>(weights.variance * inv_pred);
      const T unit = static_cast<T>(inv_pred);
      for_vectors<T>(0, pred.cols, [&](int64_t k, auto access) {
        const Vector<T> pk = access.load(p + k);
        const Vector<T> part = moment * moment_at(columns, k, pk, access) +
                               spread * spread_at(columns, k, pk * unit, access);
        access.store(g + k, access.load(g + k) + part);
      });
    }
    if (grad.row != nullptr) narrow(out, grad.dtype, g, pred.cols);
  }
}

#undef AMN_INLINE

}  // namespace

template <class T>
RowKernels<T> AMN_KERNELS() {
  return {row_stats<T>,        softmax_rows_<T>, softmax_stats_<T>, softmax_cols<T>, softmax_weights_<T>,
          row_dots<T>, col_stats<T>,     col_dots<T>,       row_combine<T>};
}
template RowKernels<float> AMN_KERNELS();
template RowKernels<double> AMN_KERNELS();

}  // namespace amn::cpu
