// The algorithm, device-agnostic: vendor matrix products plus the primitives of primitives.h.
//
//   forward   row_stats                      norms, distances, 1 - cos of every row
//             plain InfoNCE, per chunk of rows and block of keys:
//               S = P K^T                    vendor GEMM
//               softmax_rows_(S)             in place
//               O = rescale O + S K          vendor GEMM, with gradients only
//             general InfoNCE (both directions, several positives, or gradients for keys), per chunk of rows:
//               S = P K^T                    all keys of the rows
//               softmax_stats_, softmax_cols row and column sums; both directions must see all rows first, so that S is
//                                            kept if it fits chunk_bytes, else computed twice
//               softmax_weights_(S)          in place: normalised, both directions in one
//               O = S K, Q += S^T P          vendor GEMM; Q for keys that need a gradient
//             row_dots(O), row_dots(Q)       o, and the scalars for norms and angles of the term gradients
//             col_stats, col_terms, col_dots moment and variance term
//             term_sums                      values, Gram matrix, metrics
//   backward  row_combine                    grad = a p + b d + c o
//
// S exists one chunk at a time, within chunk_bytes, and no normalised copy does: norms are folded into the softmax.
// Rows are numbered group after group, whatever the memory layout of the input.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "primitives.h"

namespace amn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Which rows of [B, T, D] are each other's negatives, numbered as in amn_kernels/ops.py.
enum Negatives : int64_t { kAll = 0, kStep = 1, kSequence = 2 };

// What needs a gradient, as a sum of these.
enum Needs : int64_t { kNeedsPred = 1, kNeedsTarget = 2, kNeedsExtra = 4, kNeedsTemperature = 8 };

// Rows of a chunk. Measured at D = 768 on two cores, N = 2,048 to 8,192: chunks of 256 rows took 6-18% longer, as the keys
// are packed anew for every product; 2,048 gained nothing beyond noise.
constexpr int64_t kChunkRows = 1024;
constexpr int64_t kMinBlockKeys = 64;
constexpr int64_t kMinChunkRows = 64;

const Primitives& primitives(const Tensor& x) {
  TORCH_CHECK(x.device().is_cpu(), "amn_kernels: no compiled primitives for device ", x.device());
  return cpu::primitives;
}

TermList term_list(at::IntArrayRef terms, at::IntArrayRef monitored) {
  TORCH_CHECK(terms.size() <= kMaxTerms, "at most ", kMaxTerms, " terms, got ", terms.size());
  TermList list;
  for (const int64_t term : terms) {
    TORCH_CHECK(term >= 0 && term < kMaxTerms, "terms must be in [0, ", kMaxTerms, "), got ", term);
    list.term[list.size] = term;
    list.differentiable[list.size++] = std::find(monitored.begin(), monitored.end(), term) == monitored.end();
  }
  return list;
}

// Everything that says what is computed, besides the tensors of rows.
struct Options {
  TermList terms;
  Temperature temperature;
  InfonceForm form;
  int64_t negatives;
  double margin;           // < 0: none
  double variance_target;  // < 0: none
};

// x[begin : begin + count] along `dim`, without the cost of a view where that is all of x.
Tensor part(const Tensor& x, int64_t dim, int64_t begin, int64_t count) {
  return count == x.size(dim) ? x : x.narrow(dim, begin, count);
}

// Rows [begin, begin + count) of the groups [group, group + groups): several groups are always whole.
struct Chunk {
  int64_t group, groups, begin, count;
};

// [M, ...] or, of several groups, [G, M, ...]
Tensor rows_of(const Tensor& x, const Chunk& chunk) {
  if (chunk.groups > 1) return part(x, 0, chunk.group, chunk.groups);
  return part(x.dim() == 3 ? x.select(0, chunk.group) : x, 0, chunk.begin, chunk.count);
}

// The rows of [N, D] or [B, T, D] by group, read chunk by chunk in the dtype that is computed in.
class Rows {
 public:
  Rows(const Tensor& x, int64_t negatives, at::ScalarType real, const Tensor& mask = {})
      : x_(grouped(x, negatives)), real_(real), mask_(mask.defined() ? mask.unsqueeze(-1) : mask) {}

  int64_t groups() const { return x_.dim() == 3 ? x_.size(0) : 1; }
  int64_t group_size() const { return x_.size(-2); }
  int64_t size() const { return groups() * group_size(); }
  int64_t dim() const { return x_.size(-1); }

  // True if chunks are views: nothing has to be widened, zeroed or made contiguous along D.
  bool direct() const {
    return !mask_.defined() && x_.scalar_type() == real_ && (x_.stride(-1) == 1 || x_.size(-1) == 1);
  }

  Tensor chunk(const Chunk& chunk) const {  // [M, D] or [G, M, D] real
    const Tensor view = rows_of(x_, chunk);
    if (direct()) return view;
    const Tensor rows = view.to(real_).contiguous();
    // Masked rows may hold NaN, and 0 * NaN poisons a matrix product.
    return mask_.defined() ? rows.masked_fill(rows_of(mask_, chunk).logical_not(), 0) : rows;
  }

  Tensor all() const { return chunk({0, groups(), 0, group_size()}); }

  // [N, ...] or [B, T, ...] -> [N, ...] if all rows are one group, else [G, M, ...].
  static Tensor grouped(const Tensor& x, int64_t negatives, int64_t row_dims) {
    if (row_dims == 1) return x;
    if (negatives == kAll) return x.flatten(0, 1);
    const Tensor groups = negatives == kStep ? x.transpose(0, 1) : x;
    return groups.size(0) == 1 ? groups.select(0, 0) : groups;
  }

 private:
  static Tensor grouped(const Tensor& x, int64_t negatives) { return grouped(x, negatives, x.dim() - 1); }

  Tensor x_;  // [M, D] or [G, M, D]
  at::ScalarType real_;
  Tensor mask_;  // [M, 1] or [G, M, 1] bool, or undefined
};

// Calls f for chunks of at most `rows` rows, at least one; several groups at a time where they fit.
template <class F>
void for_chunks(int64_t groups, int64_t group_size, int64_t rows, const F& f) {
  const int64_t together = std::clamp<int64_t>(rows / std::max<int64_t>(1, group_size), 1, groups);
  for (int64_t group = 0; group < groups; group += together) {
    const int64_t count = std::min(together, groups - group);
    const int64_t step = count > 1 ? group_size : std::min(rows, group_size);
    for (int64_t begin = 0; begin < group_size; begin += step) {
      f(Chunk{group, count, begin, std::min(step, group_size - begin)});
    }
  }
}

template <class F>
void for_chunks(const Rows& rows, bool direct, const F& f) {
  for_chunks(rows.groups(), rows.group_size(), direct ? rows.size() : kChunkRows, f);
}

// out = a b, or out += a b; of matrices or batches of them.
void multiply(const Tensor& out_, const Tensor& a, const Tensor& b, bool accumulate) {
  Tensor out = out_;
  if (out.dim() == 2) {
    accumulate ? at::addmm_out(out, out, a, b) : at::mm_out(out, a, b);
  } else {
    accumulate ? at::baddbmm_out(out, out, a, b) : at::bmm_out(out, a, b);
  }
}

// Scratch memory that is taken in one size or another.
class Scratch {
 public:
  Scratch(int64_t numel, const at::TensorOptions& options) : memory_(at::empty({numel}, options)) {}
  const Tensor& memory() const { return memory_; }
  Tensor take(at::IntArrayRef sizes) const { return part(memory_, 0, 0, c10::multiply_integers(sizes)).view(sizes); }

 private:
  Tensor memory_;
};

// InfoNCE over the rows: fills the softmax scalars of `rows` and what the gradients need.
class Infonce {
 public:
  Infonce(
      const Primitives& prim, const Options& options, const Rows& pred, const Rows& target, const Tensor& extra,
      const Tensor& ids, const Tensor& rows, const Tensor& key_scale, int64_t chunk_bytes)
      : prim_(prim), options_(options), pred_(pred), target_(target), extra_(extra), ids_(ids), rows_(rows),
        key_scale_(key_scale), groups_(pred.groups()), size_(pred.group_size()), dim_(pred.dim()),
        keys_(size_ + (extra.defined() ? extra.size(0) : 0)),
        budget_(std::max<int64_t>(1, chunk_bytes / key_scale.itemsize())), real_(key_scale.options()) {}

  // attention: [N, D], or empty without gradients.
  void plain(const Tensor& attention) const {
    const bool sends = attention.size(0) > 0;
    const Tensor targets = target_.all();
    const int64_t together = std::clamp<int64_t>(budget_ / (size_ * keys_), 1, groups_);
    const int64_t chunk_rows = together > 1 ? size_ : std::min(kChunkRows, size_);
    // Keys per block, so that the similarities of a chunk stay within the budget.
    const int64_t fits = budget_ / (together * chunk_rows);
    const int64_t block = std::clamp<int64_t>(fits, std::min(kMinBlockKeys, keys_), std::max(size_, keys_ - size_));
    const bool merges = block < keys_;  // one block has nothing to merge with
    const Tensor rescale = at::empty({merges ? together * chunk_rows : 0, 1}, real_);
    const Scratch scratch(together * chunk_rows * block, real_), guides(has_margin() ? scratch.memory().numel() : 0, real_);
    prim_.prepare(scratch.memory());

    for_chunks(groups_, size_, together * chunk_rows, [&](const Chunk& chunk) {
      const Tensor queries = pred_.chunk(chunk), own_targets = target_.chunk(chunk);
      const Tensor chunk_rows_ = scalars_of(rows_, chunk);
      const Tensor shrink = merges ? part(rescale, 0, 0, chunk.groups * chunk.count) : rescale;
      const Tensor out = sends ? view_rows(attention, chunk) : attention;
      bool first = true;
      const auto merge = [&](const Tensor& keys, const Tensor& key_scale, const Tensor& key_ids, int64_t own) {
        const Tensor logits = scratch.take(sizes_of(chunk, keys.size(-2)));
        multiply(logits, queries, keys.mT(), false);
        const Pairs pairs = pairs_of(chunk, key_ids, guides, own_targets, keys);
        prim_.softmax_rows_(logits, key_scale, chunk_rows_, shrink, pairs, own, options_.temperature);
        if (sends) {
          if (!first) out.mul_(chunk.groups > 1 ? shrink.view({chunk.groups, chunk.count, 1}) : shrink);
          multiply(out, logits, keys, !first);
        }
        first = false;
      };
      const Tensor keys = groups_of(targets, chunk), scale = groups_of(key_scale_, chunk), ids = groups_of(ids_, chunk);
      for (int64_t begin = 0; begin < size_; begin += block) {
        const int64_t width = std::min(block, size_ - begin);
        merge(
            part(keys, -2, begin, width), part(scale, -1, begin, width), ids.defined() ? part(ids, -1, begin, width) : ids,
            chunk.begin - begin);
      }
      for (int64_t begin = size_; begin < keys_; begin += block) {
        const int64_t width = std::min(block, keys_ - begin);
        merge(
            with_groups(part(extra_, 0, begin - size_, width), chunk), part(scale, -1, begin, width), Tensor(),
            /*own=*/-size_);
      }
      if (sends) {
        prim_.row_dots(
            queries, own_targets, out, chunk_rows_, Attention::kUnnormalised, options_.form, options_.temperature);
      }
    });
  }

  // attention [N, D]; key_attention [N, D] and extra_attention [K, D] of the keys: each empty where not needed.
  void general(const Tensor& attention, const Tensor& key_attention, const Tensor& extra_attention) const {
    const Tensor targets = target_.all();
    const int64_t fits = budget_ / (keys_ * (has_margin() ? 2 : 1));  // rows
    const int64_t least = std::min(kMinChunkRows, size_);
    int64_t rows = std::clamp<int64_t>(fits, least, groups_ * size_);
    // Both directions gain by whole groups; else more rows than kChunkRows gain nothing, unless groups are small.
    if (rows < size_ || !options_.form.both) rows = std::min(rows, std::max(kChunkRows, fits / size_ * size_));
    rows = std::min(rows, std::max(kChunkRows, rows / size_ * size_));
    const int64_t numel = rows * keys_;
    const Scratch scratch(numel, real_), guides(has_margin() ? numel : 0, real_);
    prim_.prepare(scratch.memory());
    const Tensor cols = at::empty({2, options_.form.both ? groups_ * size_ : 0}, real_);

    const auto fill = [&](const Chunk& chunk, const Tensor& queries, Pairs& pairs) {
      const Tensor logits = all_products(scratch, chunk, queries, targets);
      pairs = pairs_of(chunk, groups_of(ids_, chunk), guides, Tensor(), Tensor());
      if (has_margin()) pairs.guide = all_products(guides, chunk, target_.chunk(chunk), targets);
      return logits;
    };
    const auto first_half = [&](const Chunk& chunk, const Tensor& logits, const Pairs& pairs) {
      prim_.softmax_stats_(
          logits, groups_of(key_scale_, chunk), scalars_of(rows_, chunk), pairs, options_.form, chunk.begin,
          options_.temperature);
      if (options_.form.both) prim_.softmax_cols(logits, scalars_of(rows_, whole(chunk)), pairs, options_.form);
    };
    const auto factors = [&](const Chunk& chunk) {
      if (!options_.form.both) return;
      const Chunk groups = whole(chunk);
      prim_.col_factors(
          scalars_of(rows_, groups), part(cols, 1, groups.group * size_, groups.groups * size_), options_.temperature);
    };
    const auto second_half = [&](const Chunk& chunk, const Tensor& queries, const Tensor& logits, const Pairs& pairs,
                                 bool raw) {
      if (attention.size(0) == 0) return;
      Tensor columns = options_.form.both ? part(cols, 1, chunk.group * size_, chunk.groups * size_) : cols;
      if (chunk.groups > 1) columns = columns.view({2, chunk.groups, -1});
      const Tensor chunk_scalars = scalars_of(rows_, chunk);
      prim_.softmax_weights_(
          logits, groups_of(key_scale_, chunk), chunk_scalars, columns, pairs, options_.form, chunk.begin, raw,
          options_.temperature);
      const Tensor out = view_rows(attention, chunk), own = part(logits, -1, 0, size_);
      multiply(out, own, groups_of(targets, chunk), false);
      if (keys_ > size_) multiply(out, part(logits, -1, size_, keys_ - size_), with_groups(extra_, chunk), true);
      if (key_attention.size(0) > 0 || extra_attention.size(0) > 0) {
        const Tensor inv_pred = chunk_scalars.select(0, kInvPred).to(real_.dtype().toScalarType());
        const Tensor units = queries * inv_pred.view(chunk.groups > 1 ? at::IntArrayRef{chunk.groups, chunk.count, 1}
                                                                      : at::IntArrayRef{chunk.count, 1});
        if (key_attention.size(0) > 0) multiply(view_rows(key_attention, whole(chunk)), own.mT(), units, chunk.begin > 0);
        if (extra_attention.size(0) > 0) {
          const Tensor shared = part(logits, -1, size_, keys_ - size_).flatten(0, -2);  // [G C, K]
          multiply(extra_attention, shared.t(), units.flatten(0, -2), chunk.group > 0 || chunk.begin > 0);
        }
      }
      prim_.row_dots(
          queries, target_.chunk(chunk), out, chunk_scalars, Attention::kNormalised, options_.form,
          options_.temperature);
    };

    const int64_t together = std::max<int64_t>(1, rows / size_);
    for_chunks(groups_, size_, together * size_, [&](const Chunk& groups) {
      const bool sees_all = rows >= groups.groups * size_ || !options_.form.both;
      const auto each = [&](const auto& f) {
        if (rows >= groups.groups * size_) return f(groups);
        for_chunks(1, size_, rows, [&](Chunk chunk) {
          chunk.group = groups.group;
          f(chunk);
        });
      };
      each([&](const Chunk& chunk) {
        Pairs pairs;
        const Tensor queries = pred_.chunk(chunk), logits = fill(chunk, queries, pairs);
        first_half(chunk, logits, pairs);
        if (!sees_all) return;
        factors(chunk);
        second_half(chunk, queries, logits, pairs, /*raw=*/false);
      });
      if (sees_all || attention.size(0) == 0) return;
      factors(groups);
      each([&](const Chunk& chunk) {
        Pairs pairs;
        const Tensor queries = pred_.chunk(chunk), logits = fill(chunk, queries, pairs);
        second_half(chunk, queries, logits, pairs, /*raw=*/true);
      });
    });
  }

  // Rows of a chunk in a tensor whose rows are numbered group after group.
  static Tensor view_rows(const Tensor& x, const Chunk& chunk, int64_t group_size) {
    const Tensor flat = part(x, 0, chunk.group * group_size + chunk.begin, chunk.groups * chunk.count);
    return chunk.groups > 1 ? flat.view({chunk.groups, chunk.count, x.size(1)}) : flat;
  }
  static Tensor scalars_of(const Tensor& rows, const Chunk& chunk, int64_t group_size) {
    return part(rows, 1, chunk.group * group_size + chunk.begin, chunk.groups * chunk.count);
  }

 private:
  bool has_margin() const { return options_.margin >= 0; }

  Tensor view_rows(const Tensor& x, const Chunk& chunk) const { return view_rows(x, chunk, size_); }
  Tensor scalars_of(const Tensor& rows, const Chunk& chunk) const { return scalars_of(rows, chunk, size_); }

  Chunk whole(const Chunk& chunk) const { return {chunk.group, chunk.groups, 0, size_}; }

  // What belongs to the groups of a chunk, from [G, ...], or all of it where there is one group without a dimension.
  Tensor groups_of(const Tensor& x, const Chunk& chunk) const {
    if (!x.defined() || groups_ == 1) return x;
    return chunk.groups > 1 ? part(x, 0, chunk.group, chunk.groups) : x.select(0, chunk.group);
  }

  static Tensor with_groups(const Tensor& keys, const Chunk& chunk) {  // [K, D], or [G, K, D] for several groups
    return chunk.groups > 1 ? keys.expand({chunk.groups, -1, -1}) : keys;
  }

  static std::vector<int64_t> sizes_of(const Chunk& chunk, int64_t keys) {
    if (chunk.groups > 1) return {chunk.groups, chunk.count, keys};
    return {chunk.count, keys};
  }

  // x k for all keys k of the rows x of a chunk, [M, keys] or [G, M, keys].
  Tensor all_products(const Scratch& scratch, const Chunk& chunk, const Tensor& x, const Tensor& targets) const {
    const Tensor out = scratch.take(sizes_of(chunk, keys_));
    multiply(part(out, -1, 0, size_), x, groups_of(targets, chunk).mT(), false);
    if (keys_ > size_) multiply(part(out, -1, size_, keys_ - size_), x, with_groups(extra_, chunk).mT(), false);
    return out;
  }

  Pairs pairs_of(
      const Chunk& chunk, const Tensor& key_ids, const Scratch& guides, const Tensor& own_targets,
      const Tensor& keys) const {
    Pairs pairs{{}, {}, {}, options_.margin};
    if (key_ids.defined()) {
      pairs.row_ids = part(ids_.view(-1), 0, chunk.group * size_ + chunk.begin, chunk.groups * chunk.count);
      pairs.key_ids = key_ids;
    }
    if (has_margin() && keys.defined()) {
      pairs.guide = guides.take(sizes_of(chunk, keys.size(-2)));
      multiply(pairs.guide, own_targets, keys.mT(), false);
    }
    return pairs;
  }

  const Primitives& prim_;
  const Options& options_;
  const Rows &pred_, &target_;
  const Tensor &extra_, &ids_, &rows_, &key_scale_;  // [K, D] real; [M] or [G, M]; [R, N]; [M + K] or [G, M + K]
  const int64_t groups_, size_, dim_, keys_, budget_;
  const at::TensorOptions real_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Options& options, const Tensor& pred, const Tensor& target, const Tensor& mask, const Tensor& ids,
    const Tensor& extra_negatives, int64_t chunk_bytes, int64_t needs) {
  const Primitives& prim = primitives(pred);
  const bool wide = pred.scalar_type() == at::kDouble || target.scalar_type() == at::kDouble;
  const at::ScalarType dtype = wide ? at::kDouble : at::kFloat;
  const auto real = pred.options().dtype(dtype), doubles = pred.options().dtype(at::kDouble);
  const auto by_group = [&](const Tensor& x) {
    return x.defined() ? Rows::grouped(x, options.negatives, pred.dim() - 1) : x;
  };
  const Tensor group_mask = by_group(mask);
  const Rows p(pred, options.negatives, dtype, group_mask), t(target, options.negatives, dtype, group_mask);
  const int64_t n = p.size(), dim = p.dim(), size = p.group_size();
  const bool has_infonce = options.terms.has(kInfonce), attends = needs != 0 && options.terms.sends(kInfonce);
  const Tensor extra = extra_negatives.defined() ? extra_negatives.to(dtype).contiguous() : extra_negatives;
  const int64_t extra_keys = extra.defined() ? extra.size(0) : 0;

  const int64_t target_section = needs & kNeedsTarget ? n : 0;
  const int64_t extra_section = attends && (needs & kNeedsExtra) ? extra_keys : 0;
  const bool has_columns = options.terms.has(kMoment) || options.terms.has(kVariance);
  const int64_t all_keys = n + target_section + extra_section;
  const Tensor all_rows = options.form.both || options.form.positives_by_id || has_columns || target_section
                              ? at::zeros({kRowScalars, all_keys}, doubles)
                              : at::empty({kPlainRowScalars, all_keys}, doubles);
  const Tensor rows = part(all_rows, 1, 0, n);
  if (mask.defined()) {
    const Tensor counts = group_mask.to(at::kDouble).flatten();
    rows.select(0, kWeight).copy_(counts / counts.sum().clamp_min(1));
  } else {
    rows.select(0, kWeight).fill_(1.0 / n);
  }
  // Scale of the keys of every group: its rows, then the extra negatives.
  const Tensor key_scale =
      at::empty(p.groups() > 1 ? at::IntArrayRef{p.groups(), size + extra_keys} : at::IntArrayRef{size + extra_keys}, real);
  const bool direct = p.direct() && t.direct();
  for_chunks(p, direct, [&](const Chunk& chunk) {
    const Tensor scale = chunk.groups > 1 || p.groups() == 1 ? key_scale : key_scale.select(0, chunk.group);
    const Tensor groups = chunk.groups > 1 ? part(scale, 0, chunk.group, chunk.groups) : scale;
    prim.row_stats(
        p.chunk(chunk), t.chunk(chunk), Infonce::scalars_of(rows, chunk, size),
        part(groups, -1, chunk.begin, chunk.count), options.form);
  });

  Tensor extra_rows;
  if (extra_keys > 0 && has_infonce) {
    extra_rows = extra_section ? all_rows.narrow(1, n + target_section, extra_keys)
                               : at::empty({all_rows.size(0), extra_keys}, doubles);
    const Tensor any_weight = rows.select(0, kWeight).amax();  // that of every row that counts
    extra_rows.select(0, kWeight).fill_(1.0);
    const Tensor scale = at::empty({extra_keys}, real);
    prim.row_stats(extra, extra, extra_rows, scale, options.form);
    extra_rows.select(0, kWeight).copy_(any_weight);
    part(key_scale, -1, size, extra_keys).copy_(scale);
  }

  const Tensor attention = at::empty({attends ? n + target_section + extra_section : 0, dim}, real);
  prim.prepare(attention);
  const Tensor o = part(attention, 0, 0, attends ? n : 0);
  if (has_infonce) {
    const Tensor group_ids = ids.defined() ? by_group(ids).to(at::kLong).contiguous() : ids;
    const Infonce infonce(prim, options, p, t, extra, group_ids, rows, key_scale, chunk_bytes);
    const Tensor q = attends ? attention.narrow(0, n, target_section) : attention;
    const Tensor e = attends ? attention.narrow(0, n + target_section, extra_section) : attention;
    if (options.form.both || options.form.positives_by_id || q.size(0) || e.size(0)) {
      infonce.general(o, q, e);
    } else {
      infonce.plain(o);
    }
    if (e.size(0)) {
      prim.row_dots(extra, extra, e, extra_rows, Attention::kByKey, options.form, options.temperature);
    }
  }
  if (target_section) {
    const Tensor mirrored = all_rows.narrow(1, n, n);
    prim.mirror_rows(rows, mirrored);
    if (attends) {
      const Tensor q = attention.narrow(0, n, n);
      for_chunks(p, direct, [&](const Chunk& chunk) {
        prim.row_dots(
            t.chunk(chunk), p.chunk(chunk), Infonce::view_rows(q, chunk, size),
            Infonce::scalars_of(mirrored, chunk, size), Attention::kByKey, options.form, options.temperature);
      });
    }
  }

  const Tensor columns = at::empty({has_columns ? kColumns : 0, dim}, real);
  const Tensor col_values = at::empty({has_columns ? 2 : 0}, doubles);
  if (has_columns) {
    const Tensor moments = at::zeros({kMoments, dim}, doubles), count = at::zeros({1}, doubles);
    for_chunks(p, direct, [&](const Chunk& chunk) {
      prim.col_stats(p.chunk(chunk), t.chunk(chunk), Infonce::scalars_of(rows, chunk, size), moments, count);
    });
    prim.col_terms(moments, count, options.variance_target, columns, col_values);
    if (needs) {
      for_chunks(p, direct, [&](const Chunk& chunk) {
        prim.col_dots(
            p.chunk(chunk), t.chunk(chunk), attends ? Infonce::view_rows(o, chunk, size) : o, columns,
            Infonce::scalars_of(rows, chunk, size));
      });
    }
  }
  const int64_t m = options.terms.size, gram_size = needs & kNeedsPred ? m : 0;
  const Tensor values = at::empty({m}, real), gram = at::empty({gram_size, gram_size}, real);
  const Tensor metrics = at::empty({kMetrics}, real);
  prim.term_sums(rows, col_values, options.terms, options.form, dim, options.temperature, values, gram, metrics);
  return {values, gram, metrics, all_rows, attention, columns};
}

std::vector<Tensor> backward(
    const Options& options, const Tensor& grad_values, const Tensor& pred, const Tensor& target,
    const Tensor& extra_negatives, const Tensor& all_rows, const Tensor& attention, const Tensor& columns,
    int64_t needs) {
  const Primitives& prim = primitives(pred);
  const at::ScalarType real = attention.scalar_type();
  const Tensor weights = grad_values.to(real).contiguous();
  const Rows p(pred, options.negatives, real), t(target, options.negatives, real);
  const int64_t n = p.size();
  const bool attends = attention.size(0) > 0;
  std::vector<Tensor> gradients;

  // The gradient of x, where y is its partner: pred and target, or target and pred.
  const auto combine = [&](const Tensor& like, const Rows& x, const Rows& y, const Tensor& rows, const Tensor& o,
                           const Tensor& c, const TermList& terms) {
    const Tensor grad = at::empty(like.sizes(), like.options().memory_format(at::MemoryFormat::Contiguous));
    prim.prepare(grad);
    const Tensor grouped = Rows::grouped(grad, options.negatives, like.dim() - 1);
    for_chunks(x, x.direct() && y.direct() && grad.scalar_type() == real, [&](const Chunk& chunk) {
      const Tensor out = rows_of(grouped, chunk);
      const Tensor result = out.scalar_type() == real ? out : at::empty(out.sizes(), attention.options());
      prim.row_combine(
          weights, x.chunk(chunk), y.chunk(chunk), o.size(0) ? Infonce::view_rows(o, chunk, x.group_size()) : o, c,
          Infonce::scalars_of(rows, chunk, x.group_size()), terms, options.temperature, result);
      if (!result.is_same(out)) out.copy_(result);
    });
    return grad;
  };

  const Tensor rows = part(all_rows, 1, 0, n), o = part(attention, 0, 0, attends ? n : 0);
  if (needs & kNeedsPred) gradients.push_back(combine(pred, p, t, rows, o, columns, options.terms));
  const int64_t target_section = needs & kNeedsTarget ? n : 0;
  if (needs & kNeedsTarget) {
    const Tensor mirrored = columns.size(0) ? at::empty_like(columns) : columns;
    if (columns.size(0)) prim.mirror_columns(columns, mirrored);
    gradients.push_back(combine(
        target, t, p, all_rows.narrow(1, n, n), attends ? attention.narrow(0, n, n) : attention, mirrored,
        options.terms));
  }
  if (needs & kNeedsExtra) {
    if (attends) {
      TermList infonce = options.terms;
      for (int64_t i = 0; i < infonce.size; ++i) infonce.differentiable[i] &= infonce.term[i] == kInfonce;
      const Rows e(extra_negatives, kAll, real);
      const int64_t first = n + target_section;
      gradients.push_back(combine(
          extra_negatives, e, e, all_rows.narrow(1, first, e.size()), attention.narrow(0, first, e.size()),
          at::empty({0, p.dim()}, attention.options()), infonce));
    } else {
      gradients.push_back(at::zeros_like(extra_negatives));
    }
  }
  if (needs & kNeedsTemperature) {
    const Tensor& tau = options.temperature.learned;
    if (attends) {
      // -sum_i weight/|p| p.o / tau^2, times the incoming gradient.
      const Tensor sum = (rows.select(0, kWeight) * rows.select(0, kInvPred) * rows.select(0, kPredAtt)).sum();
      const Tensor wide = tau.to(at::kDouble);
      const Tensor incoming = weights.select(0, options.terms.find(kInfonce));
      gradients.push_back((sum / (wide * wide) * incoming).neg().to(tau.scalar_type()));
    } else {
      gradients.push_back(at::zeros_like(tau));
    }
  }
  return gradients;
}

Tensor balance(
    const Tensor& values, const Tensor& gram, const Tensor& mean, const Tensor& updates, const Tensor& calls,
    const Tensor& skipped, const Tensor& lambdas, const Tensor& most, int64_t anchor, double decay,
    int64_t update_every, bool by_value, bool update) {
  const Tensor weights = at::empty_like(values);
  const BalanceOptions options{anchor, decay, update_every, by_value, update};
  primitives(values).balance(values, gram, mean, updates, calls, skipped, lambdas, most, options, weights);
  return weights;
}

// The schemas take every option by itself; here they become one object.
Options make_options(
    at::IntArrayRef terms, at::IntArrayRef monitored, double temperature, const OptionalTensor& learned_temperature,
    bool both, int64_t negatives, bool positives_by_id, double margin, double variance_target) {
  return {term_list(terms, monitored), {temperature, learned_temperature.value_or(Tensor())}, {both, positives_by_id},
          negatives, margin, variance_target};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> seq_loss_forward(
    const Tensor& pred, const Tensor& target, const OptionalTensor& mask, const OptionalTensor& ids,
    const OptionalTensor& extra_negatives, const OptionalTensor& learned_temperature, at::IntArrayRef terms,
    at::IntArrayRef monitored, double temperature, bool both, int64_t negatives, bool positives_by_id, double margin,
    double variance_target, int64_t chunk_bytes, int64_t needs) {
  const Options options = make_options(
      terms, monitored, temperature, learned_temperature, both, negatives, positives_by_id, margin, variance_target);
  return forward(
      options, pred, target, mask.value_or(Tensor()), ids.value_or(Tensor()), extra_negatives.value_or(Tensor()),
      chunk_bytes, needs);
}

// mask and ids are in the scalars already; the arguments serve the double backward, registered in Python.
std::vector<Tensor> seq_loss_backward(
    const Tensor& grad_values, const Tensor& pred, const Tensor& target, const OptionalTensor& mask,
    const OptionalTensor& ids, const OptionalTensor& extra_negatives, const OptionalTensor& learned_temperature,
    const Tensor& rows, const Tensor& attention, const Tensor& columns, at::IntArrayRef terms,
    at::IntArrayRef monitored, double temperature, bool both, int64_t negatives, bool positives_by_id, double margin,
    double variance_target, int64_t needs) {
  const Options options = make_options(
      terms, monitored, temperature, learned_temperature, both, negatives, positives_by_id, margin, variance_target);
  return backward(
      options, grad_values, pred, target, extra_negatives.value_or(Tensor()), rows, attention, columns, needs);
}

// The dispatcher's handles on the two halves, so that tracing sees them as ops.
const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("amn_kernels::_seq_loss_forward", "")
                             .typed<decltype(seq_loss_forward)>();
  return op;
}

const auto& backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("amn_kernels::_seq_loss_backward", "")
                             .typed<decltype(seq_loss_backward)>();
  return op;
}

bool needs_gradient(const OptionalTensor& x) { return x.has_value() && x->defined() && x->requires_grad(); }

class SeqLoss : public torch::autograd::Function<SeqLoss> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& pred, const Tensor& target, const Tensor& weights, const OptionalTensor& mask,
      const OptionalTensor& ids, const OptionalTensor& extra_negatives, const OptionalTensor& learned_temperature,
      at::IntArrayRef terms, at::IntArrayRef monitored, double temperature, bool both, int64_t negatives,
      bool positives_by_id, double margin, double variance_target, int64_t chunk_bytes, int64_t needs) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [values, gram, metrics, rows, attention, columns] = forward_op().call(
        pred, target, mask, ids, extra_negatives, learned_temperature, terms, monitored, temperature, both, negatives,
        positives_by_id, margin, variance_target, chunk_bytes, needs);
    ctx->save_for_backward(
        {pred, target, weights, mask.value_or(Tensor()), ids.value_or(Tensor()), extra_negatives.value_or(Tensor()),
         learned_temperature.value_or(Tensor()), rows, attention, columns});
    ctx->saved_data["terms"] = terms;
    ctx->saved_data["monitored"] = monitored;
    ctx->saved_data["numbers"] = std::vector<double>{temperature, margin, variance_target};
    ctx->saved_data["choices"] = std::vector<int64_t>{both, negatives, positives_by_id, needs};
    ctx->mark_non_differentiable({gram, metrics});
    ctx->set_materialize_grads(false);  // gram and metrics have no gradient; zeros for them would be made in vain
    return {at::dot(values, weights), values, gram, metrics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(kInputs);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const Tensor& weights = saved[2];
    const auto optional = [&](int64_t i) { return saved[i].defined() ? OptionalTensor(saved[i]) : std::nullopt; };
    const std::vector<double> numbers = ctx->saved_data["numbers"].toDoubleVector();
    const std::vector<int64_t> choices = ctx->saved_data["choices"].toIntVector();
    const int64_t needs = choices[3];
    const auto gradients = [&] {
      const Tensor grad_values = !grads[0].defined()   ? grads[1]
                                 : !grads[1].defined() ? grads[0] * weights
                                                       : grads[0] * weights + grads[1];
      return backward_op().call(
          grad_values, saved[0], saved[1], optional(3), optional(4), optional(5), optional(6), saved[7], saved[8],
          saved[9], ctx->saved_data["terms"].toIntVector(), ctx->saved_data["monitored"].toIntVector(), numbers[0],
          choices[0], choices[1], choices[2], numbers[1], numbers[2], needs);
    };
    std::vector<Tensor> out;
    if (at::GradMode::is_enabled()) {
      out = gradients();  // create_graph: the op's own autograd formula, registered in Python, goes on from here
    } else {
      at::AutoDispatchBelowADInplaceOrView below;
      out = gradients();
    }
    // Positions of pred, target, extra_negatives and learned_temperature among the inputs.
    constexpr int64_t kPosition[] = {0, 1, 5, 6};
    auto next = out.begin();
    for (int64_t i = 0; i < 4; ++i) {
      if (needs & (1 << i)) result[kPosition[i]] = *next++;
    }
    return result;
  }

 private:
  static constexpr size_t kInputs = 17;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> seq_loss(
    const Tensor& pred, const Tensor& target, const Tensor& weights, const OptionalTensor& mask,
    const OptionalTensor& ids, const OptionalTensor& extra_negatives, const OptionalTensor& learned_temperature,
    at::IntArrayRef terms, at::IntArrayRef monitored, double temperature, bool both, int64_t negatives,
    bool positives_by_id, double margin, double variance_target, int64_t chunk_bytes) {
  int64_t needs = 0;
  if (at::GradMode::is_enabled()) {
    TORCH_CHECK(
        !weights.requires_grad(), "amn_kernels::seq_loss has no gradient for weights; use the reference backend");
    needs = (pred.requires_grad() ? kNeedsPred : 0) | (target.requires_grad() ? kNeedsTarget : 0) |
            (needs_gradient(extra_negatives) ? kNeedsExtra : 0) |
            (needs_gradient(learned_temperature) ? kNeedsTemperature : 0);
  }
  if (needs == 0) {
    auto [values, gram, metrics, rows, attention, columns] = forward_op().call(
        pred, target, mask, ids, extra_negatives, learned_temperature, terms, monitored, temperature, both, negatives,
        positives_by_id, margin, variance_target, chunk_bytes, needs);
    return {at::dot(values, weights), values, gram, metrics};
  }
  const auto out = SeqLoss::apply(
      pred, target, weights, mask, ids, extra_negatives, learned_temperature, terms, monitored, temperature, both,
      negatives, positives_by_id, margin, variance_target, chunk_bytes, needs);
  return {out[0], out[1], out[2], out[3]};
}

TORCH_LIBRARY_IMPL(amn_kernels, CompositeImplicitAutograd, m) {
  m.impl("seq_loss", seq_loss);
  m.impl("_cpu_isa", [] { return std::string(cpu::isa()); });
}

TORCH_LIBRARY_IMPL(amn_kernels, CPU, m) {
  m.impl("_seq_loss_forward", seq_loss_forward);
  m.impl("_seq_loss_backward", seq_loss_backward);
  m.impl("_balance", balance);
}

}  // namespace
}  // namespace amn
