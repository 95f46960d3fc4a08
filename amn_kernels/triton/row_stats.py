"""Kernel of the primitive row_stats: norms, distances and 1 - cos of every row."""

import triton
import triton.language as tl

from amn_kernels.triton.scalars import (
    ATT_ATT,
    COL_MAX,
    COL_OTHERS,
    COL_POSITIVE_SUM,
    DIFF_ATT,
    DIFF_DIFF,
    EXCESS,
    INV_PRED,
    INV_TARGET,
    KEYS,
    LOWEST,
    MAX,
    NEGATIVE_MAX,
    ONE_MINUS_COS,
    OTHERS,
    POSITIVE_SUM,
    POSITIVES,
    PRED_ATT,
    PRED_DIFF,
    PRED_PRED,
    SIZES,
    TARGET_TARGET,
    WEIGHT,
    get,
    inverse_norm,
    load_rows,
    put,
    row_offset,
    row_sum,
)


@triton.jit
def half_square_of_units(pred, target, p_row, t_row, dim, counts, inv_pred, inv_target, excess, BLOCK_D: tl.constexpr):
    """|p/|p| - t/|t||² / 2 = 1 - cos, without cancellation.

    For similar norms the difference is taken as (d - excess t)/|p|; d itself loses the smaller vector else. The row was
    read just before and is in cache.
    """
    similar = tl.abs(excess) < 0.5
    d_scale = tl.where(similar, inv_pred, 0.0).to(tl.float32)[:, None]
    p_scale = tl.where(similar, 0.0, inv_pred).to(tl.float32)[:, None]
    t_scale = tl.where(similar, inv_pred * excess, inv_target).to(tl.float32)[:, None]
    square = inv_pred * 0.0
    for start in range(0, dim, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        p, t = load_rows(pred, p_row, k, dim, counts), load_rows(target, t_row, k, dim, counts)
        e = d_scale * (p - t) + p_scale * p - t_scale * t
        square += row_sum(e * e)
    return square / 2


@triton.jit(do_not_specialize=SIZES)
def row_stats_kernel(
    pred, target,  # [G, M, D]
    rows,  # [scalars, G M] float64
    key_scale,  # [G, M] float32, out
    count, size, dim, pred_group, pred_row, target_group, target_row, rows_stride, scale_group,
    BOTH: tl.constexpr, BY_ID: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows. Masked rows are not read, and all their scalars are 0 or those of no keys."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < count
    counts = inside & (get(rows, rows_stride, WEIGHT, i, inside) != 0)
    p_row, t_row = row_offset(i, size, pred_group, pred_row), row_offset(i, size, target_group, target_row)
    pp = tl.zeros([BLOCK_M], tl.float64)
    tt, dd, pd = pp, pp, pp
    for start in range(0, dim, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        p, t = load_rows(pred, p_row, k, dim, counts), load_rows(target, t_row, k, dim, counts)
        d = p - t
        pp += row_sum(p * p)
        tt += row_sum(t * t)
        dd += row_sum(d * d)
        pd += row_sum(p * d)
    inv_pred, inv_target = inverse_norm(pp), inverse_norm(tt)
    # |p|² - |t|² = d.(p + t) = 2 p.d - d.d
    norms = tl.sqrt(pp) + tl.sqrt(tt)
    excess = tl.where(norms == 0, 0.0, (2 * pd - dd) / tl.where(norms == 0, 1.0, norms) * inv_target)
    square = half_square_of_units(
        pred, target, p_row, t_row, dim, counts, inv_pred, inv_target, excess, BLOCK_D
    )  # fmt: skip
    one_minus_cos = tl.where((inv_pred != 0) & (inv_target != 0), square, 1.0)
    put(rows, rows_stride, INV_PRED, i, inv_pred, inside)
    put(rows, rows_stride, INV_TARGET, i, inv_target, inside)
    put(rows, rows_stride, EXCESS, i, excess, inside)
    put(rows, rows_stride, ONE_MINUS_COS, i, one_minus_cos, inside)
    put(rows, rows_stride, PRED_PRED, i, pp, inside)
    put(rows, rows_stride, TARGET_TARGET, i, tt, inside)
    put(rows, rows_stride, DIFF_DIFF, i, dd, inside)
    put(rows, rows_stride, PRED_DIFF, i, pd, inside)
    put(rows, rows_stride, MAX, i, LOWEST, inside)
    put(rows, rows_stride, OTHERS, i, 0.0, inside)
    put(rows, rows_stride, KEYS, i, 0.0, inside)
    put(rows, rows_stride, PRED_ATT, i, 0.0, inside)
    put(rows, rows_stride, DIFF_ATT, i, 0.0, inside)
    put(rows, rows_stride, ATT_ATT, i, 0.0, inside)
    if BOTH:
        put(rows, rows_stride, COL_MAX, i, LOWEST, inside)
        put(rows, rows_stride, COL_OTHERS, i, 0.0, inside)
    if BY_ID:
        put(rows, rows_stride, POSITIVES, i, 0.0, inside)
        put(rows, rows_stride, POSITIVE_SUM, i, 0.0, inside)
        put(rows, rows_stride, COL_POSITIVE_SUM, i, 0.0, inside)
        put(rows, rows_stride, NEGATIVE_MAX, i, LOWEST, inside)
    scale = tl.where(counts, inv_target, -1.0).to(tl.float32)
    tl.store(key_scale + row_offset(i, size, scale_group, 1), scale, mask=inside)
