"""Kernels of the softmax over keys: the plain one, of which blocks merge, and the two halves of the general one.

A program has rows of one group, along their keys in blocks. Similarities come from a matrix product and are in cache
for the second pass.
"""

import triton
import triton.language as tl

from amn_kernels.triton.scalars import (
    INV_PRED,
    INV_TARGET,
    KEYS,
    LOWEST,
    MAX,
    NEGATIVE_MAX,
    OTHERS,
    POSITIVE_SUM,
    POSITIVES,
    SIZES,
    WEIGHT,
    exp_below,
    get,
    own_logit,
    put,
    row_sum,
    sends,
    temperature,
)


@triton.jit
def rows_of_program(rows, rows_stride, size, BLOCK_M: tl.constexpr):
    """Group; rows in the group [BLOCK_M] and their numbers in all, int64; which are there, and which count."""
    blocks = tl.cdiv(size, BLOCK_M)
    group = tl.program_id(0).to(tl.int64) // blocks
    row = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    i, inside = group * size + row, row < size
    return group, row, i, inside, inside & (get(rows, rows_stride, WEIGHT, i, inside) != 0)


@triton.jit
def row_scales(rows, rows_stride, i, counts, tau):
    """1/(|p| τ) and 1/|t| [BLOCK_M] float32."""
    scale = (get(rows, rows_stride, INV_PRED, i, counts) / tau).to(tl.float32)
    return scale, get(rows, rows_stride, INV_TARGET, i, counts).to(tl.float32)


@triton.jit
def same_id(row_ids, key_ids, id_keys, group, ids_group, i, inside, j):
    """[BLOCK_M, BLOCK_K]: whether row and key have one id; further keys have none."""
    has = j < id_keys
    key = tl.load(key_ids + (group * ids_group + j), mask=has, other=0)
    row = tl.load(row_ids + i, mask=inside, other=0)
    return (key[None, :] == row[:, None]) & has[None, :]


@triton.jit
def scaled(
    s, key_norm, guide, inv_target, same, own, j, keys, counts, scale, margin,
    GUIDED: tl.constexpr, HAS_IDS: tl.constexpr, BY_ID: tl.constexpr,
):  # fmt: skip
    """p.k to cosine / τ; -inf for the own key, for keys left out and all along masked rows."""
    keep = counts[:, None] & ((j < keys) & ~(key_norm < 0))[None, :] & (j[None, :] != own[:, None])
    if GUIDED:  # a key this close to the row's target is no negative; a positive it may be
        close = 1 - guide * inv_target[:, None] * key_norm[None, :] < margin
        keep = keep & (~close | same) if HAS_IDS and BY_ID else keep & ~close
    if HAS_IDS and not BY_ID:
        keep = keep & ~same
    return tl.where(keep, s * key_norm[None, :] * scale[:, None], LOWEST)


@triton.jit
def load_scaled(
    logits, key_scale, guide, row_ids, key_ids, id_keys, ids_group, group, row, i, j, keys, counts, scale, inv_target,
    own, margin, logits_group, logits_row, scale_group, guide_group, guide_row, BY_ID: tl.constexpr,
):  # fmt: skip
    """A block of scaled logits [BLOCK_M, BLOCK_K], the keys' 1/|k| [BLOCK_K], and which of them have the row's id."""
    inside = counts[:, None] & (j < keys)[None, :]
    s = tl.load(logits + group * logits_group + row[:, None] * logits_row + j[None, :], mask=inside, other=0.0)
    key_norm = tl.load(key_scale + (group * scale_group + j), mask=j < keys, other=-1.0)
    g, same = s, inside
    if guide is not None:
        g = tl.load(guide + group * guide_group + row[:, None] * guide_row + j[None, :], mask=inside, other=0.0)
    if key_ids is not None:
        same = same_id(row_ids, key_ids, id_keys, group, ids_group, i, counts, j)
    s = scaled(
        s, key_norm, g, inv_target, same, own, j, keys, counts, scale, margin, guide is not None, key_ids is not None,
        BY_ID,
    )  # fmt: skip
    return s, key_norm, same


@triton.jit(do_not_specialize=SIZES)
def softmax_rows_kernel(
    logits,  # [G, C, K] float32: p.k
    weights,  # [G, C, K], out; may be the logits
    key_scale,  # [G, K]
    rows,  # [scalars, G C] float64
    rescale,  # [G C, 1] float32, out
    row_ids, key_ids, guide,  # [G C], [G, K'], [G, C, K], or None
    learned,  # []
    margin, tau: tl.float64, own, size, keys, id_keys, logits_group, logits_row, weights_group, weights_row,
    scale_group, rows_stride, ids_group, guide_group, guide_row, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Merges the block of keys into the row's running maximum and sum, and leaves exp(s - max)/|k|."""
    group, row, i, inside, counts = rows_of_program(rows, rows_stride, size, BLOCK_M)
    scale, inv_target = row_scales(rows, rows_stride, i, counts, temperature(tau, learned))
    own_key = own + row
    before = tl.where(counts, get(rows, rows_stride, MAX, i, counts), LOWEST)
    top = before.to(tl.float32)
    found = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, keys, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        s, _, _ = load_scaled(
            logits, key_scale, guide, row_ids, key_ids, id_keys, ids_group, group, row, i, j, keys, counts, scale,
            inv_target, own_key, margin, logits_group, logits_row, scale_group, guide_group, guide_row, False,
        )  # fmt: skip
        top = tl.maximum(top, tl.max(s, axis=1))
        found += tl.sum((s != LOWEST).to(tl.int32), axis=1)
    total = tl.zeros([BLOCK_M], tl.float64)
    for start in range(0, keys, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        s, key_norm, _ = load_scaled(
            logits, key_scale, guide, row_ids, key_ids, id_keys, ids_group, group, row, i, j, keys, counts, scale,
            inv_target, own_key, margin, logits_group, logits_row, scale_group, guide_group, guide_row, False,
        )  # fmt: skip
        e = exp_below(s, top[:, None])
        total += row_sum(e)
        out = weights + group * weights_group + row[:, None] * weights_row + j[None, :]
        weight = (e * key_norm[None, :]).to(weights.dtype.element_ty)
        tl.store(out, weight, mask=inside[:, None] & (j < keys)[None, :])
    now = top.to(tl.float64)
    shrink = tl.where(before == LOWEST, 0.0, tl.exp(before - now))
    others = get(rows, rows_stride, OTHERS, i, counts) * shrink + total
    put(rows, rows_stride, MAX, i, now, counts)
    put(rows, rows_stride, OTHERS, i, others, counts)
    put(rows, rows_stride, KEYS, i, get(rows, rows_stride, KEYS, i, counts) + found, counts)
    tl.store(rescale + i, shrink.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def softmax_stats_kernel(
    logits,  # [G, C, K] float32: p.k, on return s
    key_scale,  # [G, K]
    rows,  # [scalars, G C] float64
    row_ids, key_ids, guide,  # [G C], [G, K'], [G, C, K], or None
    learned,  # []
    margin, tau: tl.float64, own, size, keys, id_keys, logits_group, logits_row, scale_group, rows_stride, ids_group,
    guide_group, guide_row, BY_ID: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Merges the block into the row's maximum and sum, and into what positives by id need; leaves the scaled logits."""
    group, row, i, inside, counts = rows_of_program(rows, rows_stride, size, BLOCK_M)
    scale, inv_target = row_scales(rows, rows_stride, i, counts, temperature(tau, learned))
    own_key = own + row
    top = tl.where(counts, get(rows, rows_stride, MAX, i, counts), LOWEST).to(tl.float32)
    total = get(rows, rows_stride, OTHERS, i, counts)
    found = tl.zeros([BLOCK_M], tl.int32)
    positives, positive_sum = total * 0, total * 0
    negative_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    for start in range(0, keys, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        s, _, same = load_scaled(
            logits, key_scale, guide, row_ids, key_ids, id_keys, ids_group, group, row, i, j, keys, counts, scale,
            inv_target, own_key, margin, logits_group, logits_row, scale_group, guide_group, guide_row, BY_ID,
        )  # fmt: skip
        out = logits + group * logits_group + row[:, None] * logits_row + j[None, :]
        tl.store(out, s, mask=inside[:, None] & (j < keys)[None, :])
        higher = tl.maximum(top, tl.max(s, axis=1))
        shrink = tl.where(top == LOWEST, 0.0, tl.exp((top - tl.where(higher == LOWEST, 0.0, higher)).to(tl.float64)))
        total = total * shrink + row_sum(exp_below(s, higher[:, None]))
        top = higher
        there = s != LOWEST
        found += tl.sum(there.to(tl.int32), axis=1)
        if BY_ID:
            positive = there
            if key_ids is not None:
                positive = there & same
                positives += tl.sum(positive.to(tl.int32), axis=1)
                positive_sum += row_sum(tl.where(positive, s, 0.0))
                positive = ~same
            negative_max = tl.maximum(negative_max, tl.max(tl.where(positive, s, LOWEST), axis=1))
    put(rows, rows_stride, MAX, i, top.to(tl.float64), counts)
    put(rows, rows_stride, OTHERS, i, total, counts)
    put(rows, rows_stride, KEYS, i, get(rows, rows_stride, KEYS, i, counts) + found, counts)
    if BY_ID:
        positives += get(rows, rows_stride, POSITIVES, i, counts)
        positive_sum += get(rows, rows_stride, POSITIVE_SUM, i, counts)
        put(rows, rows_stride, POSITIVES, i, positives, counts)
        put(rows, rows_stride, POSITIVE_SUM, i, positive_sum, counts)
        highest = tl.maximum(get(rows, rows_stride, NEGATIVE_MAX, i, counts), negative_max.to(tl.float64))
        put(rows, rows_stride, NEGATIVE_MAX, i, highest, counts)


@triton.jit(do_not_specialize=SIZES)
def softmax_weights_kernel(
    logits,  # [G, C, K] float32: s, or p.k if RAW
    weights,  # [G, C, K], out; may be the logits
    key_scale,  # [G, K]
    rows,  # [scalars, G C] float64, complete
    cols,  # [2, G, K'] if HAS_COLS: both directions, and keys that are rows
    row_ids, key_ids, guide,  # [G C], [G, K'], [G, C, K], or None
    learned,  # []
    margin, tau: tl.float64, own, size, keys, id_keys, col_keys, logits_group, logits_row, weights_group, weights_row,
    scale_group, cols_stride, cols_group, rows_stride, ids_group, guide_group, guide_row, BOTH: tl.constexpr,
    HAS_COLS: tl.constexpr, BY_ID: tl.constexpr, RAW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Leaves v/|k|: the normalised weights of both directions, less the positives' share."""
    group, row, i, inside, counts = rows_of_program(rows, rows_stride, size, BLOCK_M)
    sending = sends(rows, rows_stride, i, counts)
    value = temperature(tau, learned)
    scale, inv_target = row_scales(rows, rows_stride, i, counts, value)
    own_key = own + row
    top = tl.where(counts, get(rows, rows_stride, MAX, i, counts), LOWEST)
    direction: tl.constexpr = 0.5 if BOTH else 1.0
    every = get(rows, rows_stride, OTHERS, i, counts) + tl.exp(own_logit(rows, rows_stride, i, counts, value) - top)
    factor = tl.where(sending, direction / every, 0.0).to(tl.float32)
    top = top.to(tl.float32)
    for start in range(0, keys, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        s, key_norm, same = load_scaled(
            logits, key_scale, guide, row_ids, key_ids, id_keys, ids_group, group, row, i, j, keys, counts, scale,
            inv_target, own_key, margin, logits_group, logits_row, scale_group, guide_group, guide_row, BY_ID,
        )  # fmt: skip
        if not RAW:
            s = tl.load(
                logits + group * logits_group + row[:, None] * logits_row + j[None, :],
                mask=inside[:, None] & (j < keys)[None, :],
                other=LOWEST,
            )
        v = exp_below(s, top[:, None]) * factor[:, None]
        col_factor = key_norm * 0
        if HAS_COLS:
            at = cols + (group * cols_group + j)
            col_max = tl.load(at, mask=j < col_keys, other=0.0)
            col_factor = tl.load(at + cols_stride, mask=j < col_keys, other=0.0)
            v += exp_below(s, col_max[None, :]) * col_factor[None, :]
        if BY_ID and key_ids is not None:
            share = direction / (1 + get(rows, rows_stride, POSITIVES, i, counts))
            from_row = tl.where(sending, share, 0.0).to(tl.float32)[:, None]
            from_col = tl.where(col_factor > 0, 1.0, 0.0)[None, :] * share.to(tl.float32)[:, None]
            positive = same & counts[:, None] & (~(key_norm < 0))[None, :] & (j[None, :] != own_key[:, None])
            v -= tl.where(positive, from_row + from_col, 0.0)
        out = weights + group * weights_group + row[:, None] * weights_row + j[None, :]
        weight = (v * key_norm[None, :]).to(weights.dtype.element_ty)
        tl.store(out, weight, mask=inside[:, None] & (j < keys)[None, :])
