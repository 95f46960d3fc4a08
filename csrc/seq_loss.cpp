// The algorithm, device-agnostic: vendor matrix products plus the primitives of primitives.h.
//
//   forward   row_stats                      norms, distances, 1 - cos of every row
//             plain InfoNCE, per chunk of rows and block of keys:
//               S = P K^T                    vendor GEMM
//               softmax_rows_(S)             in place
//               O = rescale O + S K          vendor GEMM, with gradients only
//             general InfoNCE (both directions, several positives, or gradients for keys), per chunk of rows:
//               S = P K^T                    all keys of the rows
//               softmax_stats_, softmax_cols row and column sums; both directions must see all rows first: what fits
//                                            chunk_bytes of S is kept, the rest is computed twice
//               softmax_weights_(S)          in place: normalised, both directions in one
//               O = S K, Q += S^T P          vendor GEMM; Q for keys that need a gradient
//             row_dots(O), row_dots(Q)       o, and the scalars for norms and angles of the term gradients
//             col_stats, col_terms, col_dots moment and variance term
//             term_sums                      values, Gram matrix, metrics
//   backward  row_combine                    grad = a p + b d + c o
//
// S exists one chunk at a time, within chunk_bytes, and no normalised copy does: norms are folded into the softmax.
// pred and target are read, and gradients written, in their own dtype. On a GPU the products of the plain form take
// 16-bit rows as they are and sum in float32; on the CPU, and in the general form, they take float32: on the CPU
// row_stats leaves a copy of the rows as it reads them.
// Rows are numbered group after group, whatever the memory layout of the input.
#include "seq_loss.h"

#include "infonce.h"

namespace amn {
namespace {

// How many of n rows of pred have an o: all, or none where only keys need a gradient.
int64_t attending_rows(int64_t n, int64_t needs) { return needs & (kNeedsPred | kNeedsTemperature) ? n : 0; }

}  // namespace

Forward forward(
    const Options& options, const Tensor& pred, const Tensor& target, const Tensor& weights, const Tensor& mask,
    const Tensor& ids, const Tensor& extra_negatives, int64_t chunk_bytes, int64_t needs) {
  const Primitives& prim = primitives_for(pred);
  const bool wide = pred.scalar_type() == at::kDouble || target.scalar_type() == at::kDouble;
  const at::ScalarType dtype = wide ? at::kDouble : at::kFloat;
  const auto real = pred.options().dtype(dtype), doubles = pred.options().dtype(at::kDouble);
  const auto by_group = [&](const Tensor& x) {
    return x.defined() ? Rows::grouped(x, options.negatives, pred.dim() - 1) : x;
  };
  const Tensor group_mask = by_group(mask);
  // Rows that a device reads as they are: masked ones, which may hold NaN, are zeroed once and not chunk by chunk.
  const auto rows_in = [&](const Tensor& x, at::ScalarType read_as) {
    if (!prim.reads_any_dtype) return Rows(with_unit_stride(x), options.negatives, read_as, group_mask);
    const bool multiplies = mask.defined() && options.terms.has(kInfonce);
    const Tensor clean = multiplies ? x.masked_fill(mask.logical_not().unsqueeze(-1), 0) : x;
    return Rows(with_unit_stride(clean), options.negatives, read_as);
  };
  const auto as_it_is = [&](const Tensor& x) { return prim.reads_any_dtype ? x.scalar_type() : dtype; };
  Rows p = rows_in(pred, as_it_is(pred)), t = rows_in(target, as_it_is(target));
  const int64_t n = p.size(), dim = p.dim(), size = p.group_size();
  const bool has_infonce = options.terms.has(kInfonce), attends = needs != 0 && options.terms.sends(kInfonce);
  const bool plain = !options.form.both && !options.form.positives_by_id &&
                     !(attends && (needs & (kNeedsTarget | kNeedsExtra)));
  const bool narrow = prim.reads_any_dtype && plain && p.dtype() == t.dtype() && options.margin < 0 &&
                      (!extra_negatives.defined() || extra_negatives.scalar_type() == p.dtype());
  const at::ScalarType product_dtype = narrow ? p.dtype() : dtype;
  const Tensor extra = extra_negatives.defined() ? extra_negatives.to(product_dtype).contiguous() : extra_negatives;
  const int64_t extra_keys = extra.defined() ? extra.size(0) : 0;

  const int64_t pred_section = attends ? attending_rows(n, needs) : 0;
  const int64_t target_section = needs & kNeedsTarget ? n : 0;
  const int64_t extra_section = attends && (needs & kNeedsExtra) ? extra_keys : 0;
  const bool has_columns = options.terms.has(kMoment) || options.terms.has(kVariance);
  const int64_t all_sections = n + target_section + extra_section;
  const Tensor all_rows = options.form.both || options.form.positives_by_id || has_columns || target_section
                              ? at::zeros({kRowScalars, all_sections}, doubles)
                              : at::empty({kPlainRowScalars, all_sections}, doubles);
  const Tensor rows = part(all_rows, 1, 0, n);
  double weight = 1.0 / n;
  if (mask.defined()) {
    weight = -1;
    const Tensor counts = group_mask.to(at::kDouble).flatten();
    rows.select(0, kWeight).copy_(counts / counts.sum().clamp_min(1));
  }
  // Scale of the keys of every group: its rows, then the extra negatives.
  const Tensor key_scale =
      p.groups() > 1 ? at::empty({p.groups(), size + extra_keys}, real) : at::empty({size + extra_keys}, real);
  // Widened copies. Of pred only if it is a single chunk, else it is widened chunk by chunk; of target also with
  // InfoNCE, where every chunk needs all of it.
  const auto copy_of = [&](const Rows& x, bool wanted) {
    return wanted && !x.direct() ? at::empty(x.given().sizes(), real) : Tensor();
  };
  const Tensor pred_copy = copy_of(p, n <= kChunkRows), target_copy = copy_of(t, n <= kChunkRows || has_infonce);
  prim.row_stats(
      p.given(), t.given(), rows, part(key_scale, -1, 0, size), weight, options.form, pred_copy, target_copy);
  if (pred_copy.defined()) p.keep(pred_copy);
  if (target_copy.defined()) t.keep(target_copy);
  const bool direct = p.direct() && t.direct();

  Tensor extra_rows;
  if (extra_keys > 0 && has_infonce) {
    extra_rows = extra_section ? all_rows.narrow(1, n + target_section, extra_keys)
                               : at::empty({all_rows.size(0), extra_keys}, doubles);
    const Tensor scale = p.groups() > 1 ? at::empty({extra_keys}, real) : part(key_scale, -1, size, extra_keys);
    prim.row_stats(extra, extra, extra_rows, scale, /*weight=*/1.0 / n, options.form, {}, {});
    if (mask.defined()) extra_rows.select(0, kWeight).copy_(rows.select(0, kWeight).amax());  // of a row that counts
    if (p.groups() > 1) part(key_scale, -1, size, extra_keys).copy_(scale);
  }

  const Tensor attention = at::empty({attends ? pred_section + target_section + extra_section : 0, dim}, real);
  prim.prepare(attention);
  const Tensor o = part(attention, 0, 0, pred_section);
  if (has_infonce) {
    const Tensor group_ids = ids.defined() ? by_group(ids).to(at::kLong).contiguous() : ids;
    const bool same = p.dtype() == product_dtype && t.dtype() == product_dtype;
    const Rows queries = same ? p : rows_in(pred, product_dtype), keys = same ? t : rows_in(target, product_dtype);
    const Infonce infonce(prim, options, queries, keys, extra, group_ids, rows, key_scale, chunk_bytes);
    if (plain) {
      infonce.plain(o);
    } else {
      const auto section = [&](int64_t begin, int64_t count) {
        return attends ? attention.narrow(0, begin, count) : attention;
      };
      infonce.general(
          o, section(pred_section, target_section), section(pred_section + target_section, extra_section));
    }
    if (extra_section) {
      prim.row_dots(
          extra, extra, attention.narrow(0, pred_section + target_section, extra_section), extra_rows,
          Attention::kByKey, options.form, options.temperature);
    }
  }
  if (target_section) {
    const Tensor mirrored = all_rows.narrow(1, n, n);
    prim.mirror_rows(rows, mirrored);
    if (attends) {
      const Tensor q = attention.narrow(0, pred_section, n);
      for_chunks(p, direct, [&](const Chunk& chunk) {
        prim.row_dots(
            t.chunk(chunk), p.chunk(chunk), view_rows(q, chunk, size),
            scalars_of(mirrored, chunk, size), Attention::kByKey, options.form, options.temperature);
      });
    }
  }

  const Tensor columns = at::empty({has_columns ? kColumns : 0, dim}, real);
  const Tensor col_values = at::empty({has_columns ? 2 : 0}, doubles);
  if (has_columns) {
    const Tensor moments = at::zeros({kMoments, dim}, doubles), count = at::zeros({1}, doubles);
    for_chunks(p, direct, [&](const Chunk& chunk) {
      prim.col_stats(p.chunk(chunk), t.chunk(chunk), scalars_of(rows, chunk, size), moments, count);
    });
    prim.col_terms(moments, count, options.variance_target, columns, col_values);
    if (needs) {
      for_chunks(p, direct, [&](const Chunk& chunk) {
        prim.col_dots(
            p.chunk(chunk), t.chunk(chunk), pred_section ? view_rows(o, chunk, size) : o, columns,
            scalars_of(rows, chunk, size));
      });
    }
  }
  const int64_t m = options.terms.size, gram_size = needs & kNeedsPred ? m : 0;
  const Tensor values = at::empty({m}, real), gram = at::empty({gram_size, gram_size}, real);
  const Tensor metrics = at::empty({kMetrics}, real);
  const Tensor loss = weights.defined() ? at::empty({}, real) : Tensor();
  prim.term_sums(
      rows, col_values, options.terms, options.form, dim, options.temperature, weights, values, gram, metrics, loss);
  return {loss.defined() ? loss : at::empty({0}, real), values, gram, metrics, all_rows, attention, columns};
}

std::vector<Tensor> backward(
    const Options& options, const Incoming& incoming, const Tensor& pred, const Tensor& target,
    const Tensor& extra_negatives, const Tensor& all_rows, const Tensor& attention, const Tensor& columns,
    int64_t needs, bool reuses_attention) {
  const Primitives& prim = primitives_for(pred);
  const auto rows_in = [&](const Tensor& x, int64_t negatives) {
    return Rows(with_unit_stride(x), negatives, x.scalar_type());
  };
  const Rows p = rows_in(pred, options.negatives), t = rows_in(target, options.negatives);
  const int64_t n = p.size();
  const bool attends = attention.size(0) > 0;
  std::vector<Tensor> gradients;
  // Whether pred and target each get a half of the attention. Each half keeps the memory of both, which they give up at
  // about the same time; of other sections a small gradient could keep a large rest.
  const auto fits = [&](const Tensor& x) { return x.scalar_type() == attention.scalar_type(); };
  const bool halves = prim.splits_memory && (needs & kNeedsPred) && (needs & kNeedsTarget) && fits(pred) &&
                      fits(target) && attention.size(0) == 2 * n;

  // The gradient of x, where y is its partner: pred and target, or target and pred.
  const auto combine = [&](const Tensor& like, const Rows& x, const Rows& y, const Tensor& rows, const Tensor& o,
                           const Tensor& c, const TermList& terms) {
    // The gradient in place of the attention, where that has its dtype and the rows in its order.
    const bool in_place = reuses_attention && o.size(0) > 0 && like.scalar_type() == o.scalar_type() &&
                          (like.dim() == 2 || options.negatives != kStep);
    Tensor grad;
    if (in_place && o.size(0) == attention.size(0)) {
      grad = o.view(like.sizes());
    } else if (in_place && halves) {
      grad = at::from_blob(o.data_ptr(), like.sizes(), [attention](void*) {}, o.options());
    } else {
      grad = at::empty(like.sizes(), like.options().memory_format(at::MemoryFormat::Contiguous));
      prim.prepare(grad);
    }
    const Chunk all{0, x.groups(), 0, x.group_size()};
    prim.row_combine(
        incoming, x.given(), y.given(), o.size(0) ? view_rows(o, all, x.group_size()) : o, c, rows, terms,
        options.temperature, Rows::grouped(grad, options.negatives, like.dim() - 1));
    return grad;
  };

  const int64_t pred_section = attends ? attending_rows(n, needs) : 0;
  const Tensor rows = part(all_rows, 1, 0, n), o = part(attention, 0, 0, pred_section);
  if (needs & kNeedsPred) gradients.push_back(combine(pred, p, t, rows, o, columns, options.terms));
  const int64_t target_section = needs & kNeedsTarget ? n : 0;
  if (needs & kNeedsTarget) {
    const Tensor mirrored = columns.size(0) ? at::empty_like(columns) : columns;
    if (columns.size(0)) prim.mirror_columns(columns, mirrored);
    gradients.push_back(combine(
        target, t, p, all_rows.narrow(1, n, n), attends ? attention.narrow(0, pred_section, n) : attention, mirrored,
        options.terms));
  }
  if (needs & kNeedsExtra) {
    if (attends) {
      TermList infonce = options.terms;
      for (int64_t i = 0; i < infonce.size; ++i) infonce.differentiable[i] &= infonce.term[i] == kInfonce;
      // Beside pred and target in less, float64 is read in what is computed in.
      const Tensor given =
          extra_negatives.scalar_type() == at::kDouble ? extra_negatives.to(attention.scalar_type()) : extra_negatives;
      const Rows e = rows_in(given, kAll);
      const Tensor grad = combine(
          given, e, e, all_rows.narrow(1, n + target_section, e.size()),
          attention.narrow(0, pred_section + target_section, e.size()), at::empty({0, p.dim()}, attention.options()),
          infonce);
      gradients.push_back(grad.to(extra_negatives.scalar_type()));
    } else {
      gradients.push_back(at::zeros(extra_negatives.sizes(), extra_negatives.options()));
    }
  }
  if (needs & kNeedsTemperature) {
    const Tensor& tau = options.temperature.learned;
    gradients.push_back(attends ? at::empty_like(tau) : at::zeros_like(tau));
    if (attends) prim.temperature_grad(incoming, rows, options.terms, options.temperature, gradients.back());
  }
  return gradients;
}

}  // namespace amn
