// InfoNCE over chunks of rows and blocks of keys: the part of the algorithm in which similarities exist.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "rows.h"

namespace amn {

constexpr int64_t kMinBlockKeys = 64;
constexpr int64_t kMinChunkRows = 64;

// Fills the softmax scalars of `rows` and what the gradients need.
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
    const bool attends = attention.size(0) > 0;
    const Tensor targets = target_.all();
    const int64_t together = std::clamp<int64_t>(budget_ / (size_ * keys_), 1, groups_);
    const int64_t most = prim_.reads_any_dtype ? std::max(kChunkRows, budget_ / keys_) : kChunkRows;
    const int64_t chunk_rows = together > 1 ? size_ : std::min(most, size_);
    // Keys per block, so that the similarities of a chunk stay within the budget.
    const int64_t fits = budget_ / (together * chunk_rows);
    const int64_t most_keys = std::max(size_, keys_ - size_);
    const int64_t block = even(most_keys, std::clamp<int64_t>(fits, std::min(kMinBlockKeys, most_keys), most_keys));
    const bool merges = block < keys_;  // one block has nothing to merge with
    const Tensor rescale = at::empty({merges ? together * chunk_rows : 0, 1}, real_);
    const int64_t numel = together * chunk_rows * block;
    const bool narrow = targets.scalar_type() != real_.dtype().toScalarType();  // the products take 16 bits
    const Scratch scratch(numel, real_), guides(has_margin() ? numel : 0, real_);
    const Scratch narrow_weights(narrow && attends ? numel : 0, targets.options());
    prim_.prepare(scratch.memory());

    for_chunks(groups_, size_, together * chunk_rows, [&](const Chunk& chunk) {
      const Tensor queries = pred_.chunk(chunk), own_targets = target_.chunk(chunk);
      const Tensor row_scalars = scalars_of(rows_, chunk);
      const Tensor shrink = merges ? part(rescale, 0, 0, chunk.groups * chunk.count) : rescale;
      const Tensor out = attends ? view_rows(attention, chunk) : attention;
      bool first = true;
      const auto merge = [&](const Tensor& keys, const Tensor& key_scale, const Tensor& key_ids, int64_t own) {
        const Tensor logits = scratch.take(sizes_of(chunk, keys.size(-2)));
        multiply(logits, queries, keys.mT(), false);
        const Pairs pairs = pairs_of(chunk, key_ids, guides, own_targets, keys);
        const Tensor weights = narrow && attends ? narrow_weights.take(logits.sizes()) : logits;
        prim_.softmax_rows_(logits, key_scale, row_scalars, shrink, weights, pairs, own, options_.temperature);
        if (attends) {
          if (!first) out.mul_(chunk.groups > 1 ? shrink.view({chunk.groups, chunk.count, 1}) : shrink);
          multiply(out, weights, keys, !first);
        }
        first = false;
      };
      const Tensor keys = groups_of(targets, chunk), scale = groups_of(key_scale_, chunk), ids = groups_of(ids_, chunk);
      for (int64_t begin = 0; begin < size_; begin += block) {
        const int64_t width = std::min(block, size_ - begin);
        merge(
            part(keys, -2, begin, width), part(scale, -1, begin, width),
            ids.defined() ? part(ids, -1, begin, width) : ids, chunk.begin - begin);
      }
      for (int64_t begin = size_; begin < keys_; begin += block) {
        const int64_t width = std::min(block, keys_ - begin);
        merge(
            with_groups(part(extra_, 0, begin - size_, width), chunk), part(scale, -1, begin, width), Tensor(),
            /*own=*/-size_);
      }
      if (attends) {
        prim_.row_dots(
            queries, own_targets, out, row_scalars, narrow ? Attention::kScaled : Attention::kUnnormalised,
            options_.form, options_.temperature);
      }
    });
  }

  // attention [N, D]; key_attention [N, D] and extra_attention [K, D] of the keys: each empty where not needed.
  void general(const Tensor& attention, const Tensor& key_attention, const Tensor& extra_attention) const {
    const bool gathers = key_attention.size(0) > 0 || extra_attention.size(0) > 0;
    const bool attends = attention.size(0) > 0 || gathers;
    const Tensor targets = target_.all();
    const Plan plan = plan_of(attends);
    const Scratch scratch(plan.numel, real_), guides(has_margin() ? plan.numel : 0, real_);
    prim_.prepare(scratch.memory());
    const Tensor cols = at::empty({2, options_.form.both ? groups_ * size_ : 0}, real_);

    const auto fill = [&](const Chunk& chunk, const Tensor& queries, Pairs& pairs) {
      const int64_t place = std::min(chunk.begin / plan.rows, plan.slots - 1) * plan.rows * keys_;
      const Tensor logits = all_products(scratch, place, chunk, queries, targets);
      pairs = pairs_of(chunk, groups_of(ids_, chunk), guides, Tensor(), Tensor());
      if (has_margin()) pairs.guide = all_products(guides, place, chunk, target_.chunk(chunk), targets);
      return logits;
    };
    const auto first_half = [&](const Chunk& chunk, const Tensor& logits, const Pairs& pairs) {
      prim_.softmax_stats_(
          logits, groups_of(key_scale_, chunk), scalars_of(rows_, chunk), pairs, options_.form, chunk.begin,
          options_.temperature);
      if (options_.form.both) prim_.softmax_cols(logits, scalars_of(rows_, whole(chunk)), pairs, options_.form);
    };
    const auto column_factors = [&](const Chunk& chunk) {
      if (!options_.form.both) return;
      const Chunk groups = whole(chunk);
      prim_.col_factors(
          scalars_of(rows_, groups), part(cols, 1, groups.group * size_, groups.groups * size_), options_.temperature);
    };
    const auto second_half = [&](const Chunk& chunk, const Tensor& queries, const Tensor& logits, const Pairs& pairs,
                                 bool raw) {
      if (!attends) return;
      Tensor columns = options_.form.both ? part(cols, 1, chunk.group * size_, chunk.groups * size_) : cols;
      if (chunk.groups > 1) columns = columns.view({2, chunk.groups, -1});
      const Tensor row_scalars = scalars_of(rows_, chunk);
      prim_.softmax_weights_(
          logits, groups_of(key_scale_, chunk), row_scalars, columns, pairs, options_.form, chunk.begin, raw,
          options_.temperature);
      const Tensor own = part(logits, -1, 0, size_);
      if (attention.size(0) > 0) {
        const Tensor out = view_rows(attention, chunk);
        multiply(out, own, groups_of(targets, chunk), false);
        if (keys_ > size_) multiply(out, part(logits, -1, size_, keys_ - size_), with_groups(extra_, chunk), true);
        prim_.row_dots(
            queries, target_.chunk(chunk), out, row_scalars, Attention::kNormalised, options_.form,
            options_.temperature);
      }
      if (gathers) {
        const Tensor inv_pred = row_scalars.select(0, kInvPred)
                                    .to(real_.dtype().toScalarType())
                                    .view(chunk.groups > 1 ? at::IntArrayRef{chunk.groups, chunk.count, 1}
                                                           : at::IntArrayRef{chunk.count, 1});
        // S^T P / |p|: divided is whichever of the two is smaller; S is not read again.
        const bool in_place = keys_ < dim_;
        if (in_place) logits.mul_(inv_pred);
        const Tensor units = in_place ? queries : queries * inv_pred;
        if (key_attention.size(0) > 0) {
          multiply(view_rows(key_attention, whole(chunk)), own.mT(), units, chunk.begin > 0);
        }
        if (extra_attention.size(0) > 0) {
          const Tensor shared = part(logits, -1, size_, keys_ - size_).flatten(0, -2);  // [G C, K]
          multiply(extra_attention, shared.t(), units.flatten(0, -2), chunk.group > 0 || chunk.begin > 0);
        }
      }
    };

    const int64_t together = std::max<int64_t>(1, plan.rows / size_);
    for_chunks(groups_, size_, together * size_, [&](const Chunk& groups) {
      const bool sees_all = plan.rows >= groups.groups * size_ || !options_.form.both;
      const auto each = [&](const auto& f) {
        if (plan.rows >= groups.groups * size_) return f(groups);
        for_chunks(1, size_, plan.rows, [&](Chunk chunk) {
          chunk.group = groups.group;
          f(chunk);
        });
      };
      std::vector<std::pair<Tensor, Pairs>> kept;
      each([&](const Chunk& chunk) {
        Pairs pairs;
        const Tensor queries = pred_.chunk(chunk), logits = fill(chunk, queries, pairs);
        first_half(chunk, logits, pairs);
        if (sees_all) {
          column_factors(chunk);
          second_half(chunk, queries, logits, pairs, /*raw=*/false);
        } else if (chunk.begin / plan.rows < plan.keeps) {
          kept.emplace_back(logits, pairs);
        }
      });
      if (sees_all || !attends) return;
      column_factors(groups);
      each([&](const Chunk& chunk) {
        const Tensor queries = pred_.chunk(chunk);
        const int64_t number = chunk.begin / plan.rows;
        if (number < plan.keeps) {
          return second_half(chunk, queries, kept[number].first, kept[number].second, /*raw=*/false);
        }
        Pairs pairs;
        const Tensor logits = fill(chunk, queries, pairs);
        second_half(chunk, queries, logits, pairs, /*raw=*/true);
      });
    });
  }

 private:
  // How `general` goes through the rows. Gradients of both directions need the similarities of a group again once all
  // its rows are seen: what fits is kept, and the last slot is for the chunks that are computed twice.
  struct Plan {
    int64_t rows;   // of a chunk: some of one group, or those of whole groups
    int64_t slots;  // chunks of a group whose similarities there is memory for
    int64_t keeps;  // chunks of a group, from its first, whose similarities are kept
    int64_t numel;  // similarities in memory
  };

  Plan plan_of(bool attends) const {
    const bool both = options_.form.both;
    const int64_t fits = budget_ / (keys_ * (has_margin() ? 2 : 1));  // rows
    int64_t rows = std::clamp<int64_t>(fits, std::min(kMinChunkRows, size_), groups_ * size_);
    // On the CPU a large group goes in chunks, so that a part of its similarities can be kept.
    if (both && !prim_.reads_any_dtype && size_ > kChunkRows) rows = std::min(rows, kChunkRows);
    // Where no group fits, or none must be seen whole: chunks of kChunkRows, or all the small groups that fit.
    if (rows < size_ || !both) rows = std::min(rows, std::max(kChunkRows, fits / size_ * size_));
    // More than kChunkRows only as whole groups.
    rows = std::min(rows, std::max(kChunkRows, rows / size_ * size_));
    const int64_t chunks = both && attends ? divide_up(size_, rows) : 1;
    const int64_t slots = fits >= size_ ? chunks : std::clamp<int64_t>(fits / rows, 1, chunks);
    const int64_t keeps = slots < chunks ? slots - 1 : chunks;
    return {rows, slots, keeps, std::min(slots * rows, std::max(rows, size_)) * keys_};
  }

  bool has_margin() const { return options_.margin >= 0; }

  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

  // The size of blocks of at most `most` that `count` keys make: about even, as a small last block is slow.
  static int64_t even(int64_t count, int64_t most) {
    const int64_t size = divide_up(count, divide_up(count, most));
    return std::min(most, divide_up(size, kMinBlockKeys) * kMinBlockKeys);
  }

  Tensor view_rows(const Tensor& x, const Chunk& chunk) const { return amn::view_rows(x, chunk, size_); }
  Tensor scalars_of(const Tensor& rows, const Chunk& chunk) const { return amn::scalars_of(rows, chunk, size_); }

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
  Tensor all_products(
      const Scratch& scratch, int64_t place, const Chunk& chunk, const Tensor& x, const Tensor& targets) const {
    const Tensor out = scratch.take(sizes_of(chunk, keys_), place);
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

}  // namespace amn
