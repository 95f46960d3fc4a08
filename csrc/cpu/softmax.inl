// Softmax over a block of similarities, by rows and by columns. In place: logits become softmax weights.

namespace amn::cpu {
namespace {

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

// The largest of s; -inf where all are.
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

// How many of s are not -inf: the keys that the row has.
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

// How many keys of a block the row has. Where none can be left out (plain), all but its own.
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

}  // namespace
}  // namespace amn::cpu
