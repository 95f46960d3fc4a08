// Moments of columns, and what the moment and the variance term need of them along a row.

namespace amn::cpu {
namespace {

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
        x[3] = rounded(x[0] * static_cast<T>(rows.at(kInvPred, i)));
        x[4] = rounded(x[1] * static_cast<T>(rows.at(kInvTarget, i)));
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

}  // namespace
}  // namespace amn::cpu
