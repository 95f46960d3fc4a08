"""Kernels of the terms of columns, moment and variance: running moments, what follows from them, products with rows."""

import triton
import triton.language as tl

from amn_kernels.primitives import Moment
from amn_kernels.triton.scalars import (
    ATT_MOMENT,
    ATT_VARIANCE,
    DIFF_MOMENT,
    DIFF_VARIANCE,
    INV_PRED,
    INV_TARGET,
    MOMENT_A,
    MOMENT_C,
    MOMENT_C_TARGET,
    MOMENT_MOMENT,
    MOMENT_PRED,
    MOMENT_TARGET,
    MOMENT_VARIANCE,
    PRED_MOMENT,
    PRED_SPREAD,
    SIZES,
    VARIANCE_UNIT,
    VARIANCE_V,
    VARIANCE_VARIANCE,
    WEIGHT,
    column,
    get,
    load_rows,
    put,
    row_offset,
    row_sum,
)

MOMENTS = tl.constexpr(len(Moment))
MEAN_PRED, MEAN_TARGET = tl.constexpr(int(Moment.MEAN_PRED)), tl.constexpr(int(Moment.MEAN_TARGET))
MEAN_DIFF = tl.constexpr(int(Moment.MEAN_DIFF))
MEAN_UNIT_PRED = tl.constexpr(int(Moment.MEAN_UNIT_PRED))
MEAN_UNIT_TARGET = tl.constexpr(int(Moment.MEAN_UNIT_TARGET))
PRED_PRED_S, TARGET_TARGET_S = tl.constexpr(int(Moment.PRED_PRED)), tl.constexpr(int(Moment.TARGET_TARGET))
DIFF_DIFF_S, DIFF_PRED_S = tl.constexpr(int(Moment.DIFF_DIFF)), tl.constexpr(int(Moment.DIFF_PRED))
UNIT_PRED_S, UNIT_TARGET_S = tl.constexpr(int(Moment.UNIT_PRED)), tl.constexpr(int(Moment.UNIT_TARGET))


@triton.jit
def moment_at(columns, k, dim, p):
    """h, the moment term's row gradient."""
    slope = column(columns, MOMENT_C, k, dim)[None, :] * (p - column(columns, MOMENT_PRED, k, dim)[None, :])
    return column(columns, MOMENT_A, k, dim)[None, :] + slope


@triton.jit
def spread_at(columns, k, dim, unit):
    """u, the variance term's row gradient but for what the normalisation takes out."""
    return column(columns, VARIANCE_V, k, dim)[None, :] * (unit - column(columns, VARIANCE_UNIT, k, dim)[None, :])


@triton.jit
def deviations(x, counts, first, n):
    """Mean [BLOCK_C] of the rows that count and what is left of x [BLOCK_R, BLOCK_C].

    Sums are shifted by the first such row, so that a constant column has no deviation whatever its size.
    """
    origin = tl.sum(tl.where(first[:, None], x, 0.0), axis=0)
    mean = origin + tl.sum(tl.where(counts[:, None], x - origin[None, :], 0.0), axis=0) / n
    return mean.to(tl.float64), tl.where(counts[:, None], x - mean[None, :], 0.0)


@triton.jit
def merged(mean, other, share):
    """The mean of two sets, and the difference of theirs; share is that of the other set."""
    delta = other - mean
    return mean + delta * share, delta


@triton.jit
def down(x, y):
    """Sum of products down the rows."""
    return tl.sum(x * y, axis=0).to(tl.float64)


@triton.jit(do_not_specialize=SIZES)
def col_stats_kernel(
    pred, target,  # [G, M, D]
    rows,  # [scalars, G M] float64
    moments,  # [splits, 11, D] float64, out
    counted,  # [splits] float64, out
    count, size, dim, rows_of_split, pred_group, pred_row, target_group, target_row, rows_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the moments of BLOCK_C columns over the rows of one split.

    Blocks merge by Chan, Golub & LeVeque 1983: means and sums of products of two sets make those of their union.
    """
    blocks = tl.cdiv(dim, BLOCK_C)
    split = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    k = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mean_p = tl.zeros([BLOCK_C], tl.float64)
    mean_t, mean_d, mean_u, mean_v = mean_p, mean_p, mean_p, mean_p
    s_p, s_t, s_d, s_dp, s_u, s_v = mean_p, mean_p, mean_p, mean_p, mean_p, mean_p
    n = tl.full([], 0.0, tl.float64)
    rows_here = tl.minimum(rows_of_split, count - split * rows_of_split)
    for start in range(0, rows_here, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        i = split * rows_of_split + r
        inside = r < rows_here
        counts = inside & (get(rows, rows_stride, WEIGHT, i, inside) != 0)
        here = tl.sum(counts.to(tl.int32))
        rank = tl.where(counts, r, rows_of_split)
        first = counts & (r == tl.min(rank))
        p = load_rows(pred, row_offset(i, size, pred_group, pred_row), k, dim, counts)
        t = load_rows(target, row_offset(i, size, target_group, target_row), k, dim, counts)
        u = p * get(rows, rows_stride, INV_PRED, i, counts).to(tl.float32)[:, None]
        v = t * get(rows, rows_stride, INV_TARGET, i, counts).to(tl.float32)[:, None]
        some = tl.maximum(here, 1).to(tl.float32)
        # The deviations of d come from d itself: those of p and t would cancel.
        m_d, d = deviations(p - t, counts, first, some)
        m_p, p = deviations(p, counts, first, some)
        m_t, t = deviations(t, counts, first, some)
        m_u, u = deviations(u, counts, first, some)
        m_v, v = deviations(v, counts, first, some)
        share = here / tl.maximum(n + here, 1.0)
        both = n * share
        mean_p, delta_p = merged(mean_p, m_p, share)
        mean_t, delta_t = merged(mean_t, m_t, share)
        mean_d, delta_d = merged(mean_d, m_d, share)
        mean_u, delta_u = merged(mean_u, m_u, share)
        mean_v, delta_v = merged(mean_v, m_v, share)
        s_p += down(p, p) + delta_p * delta_p * both
        s_t += down(t, t) + delta_t * delta_t * both
        s_d += down(d, d) + delta_d * delta_d * both
        s_dp += down(d, p) + delta_d * delta_p * both
        s_u += down(u, u) + delta_u * delta_u * both
        s_v += down(v, v) + delta_v * delta_v * both
        n += here
    out = moments + split * MOMENTS * dim + k
    inside = k < dim
    tl.store(out + MEAN_PRED * dim, mean_p, mask=inside)
    tl.store(out + MEAN_TARGET * dim, mean_t, mask=inside)
    tl.store(out + MEAN_DIFF * dim, mean_d, mask=inside)
    tl.store(out + MEAN_UNIT_PRED * dim, mean_u, mask=inside)
    tl.store(out + MEAN_UNIT_TARGET * dim, mean_v, mask=inside)
    tl.store(out + PRED_PRED_S * dim, s_p, mask=inside)
    tl.store(out + TARGET_TARGET_S * dim, s_t, mask=inside)
    tl.store(out + DIFF_DIFF_S * dim, s_d, mask=inside)
    tl.store(out + DIFF_PRED_S * dim, s_dp, mask=inside)
    tl.store(out + UNIT_PRED_S * dim, s_u, mask=inside)
    tl.store(out + UNIT_TARGET_S * dim, s_v, mask=inside)
    if block == 0:
        tl.store(counted + split, n)


@triton.jit(do_not_specialize=SIZES)
def merge_moments_kernel(
    parts,  # [parts, 11, D] float64
    counted,  # [parts] float64
    moments,  # [11, D] float64, out
    count,  # [1] float64, out
    part_count, dim, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one mean or sum of products of BLOCK columns, over the parts in order."""
    which = tl.program_id(0) % MOMENTS
    k = (tl.program_id(0) // MOMENTS) * BLOCK + tl.arange(0, BLOCK)
    inside = k < dim
    # The means that a sum of products is of: pp, tt, dd, dp, uu, vv after p, t, d, u, v.
    is_mean = which < PRED_PRED_S
    of_pair = tl.where(which < DIFF_PRED_S, which - PRED_PRED_S, which - UNIT_PRED_S + MEAN_UNIT_PRED)
    left = tl.where(is_mean, which, tl.where(which == DIFF_PRED_S, MEAN_DIFF, of_pair))
    right = tl.where(which == DIFF_PRED_S, MEAN_PRED, left)
    n = tl.full([], 0.0, tl.float64)
    running = tl.zeros([BLOCK], tl.float64)
    mean_left, mean_right = running, running
    for number in range(part_count):
        part = parts + (tl.cast(number, tl.int64) * MOMENTS * dim + k)
        here = tl.load(counted + number)
        share = here / tl.maximum(n + here, 1.0)
        mean_left, delta_left = merged(mean_left, tl.load(part + left * dim, mask=inside, other=0.0), share)
        mean_right, delta_right = merged(mean_right, tl.load(part + right * dim, mask=inside, other=0.0), share)
        more = tl.load(part + which * dim, mask=inside, other=0.0)
        running = tl.where(is_mean, mean_left, running + more + delta_left * delta_right * (n * share))
        n += here
    tl.store(moments + which * dim + k, running, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(count, n)


@triton.jit
def deviation(moments, which: tl.constexpr, k, dim, n):
    """Unbiased standard deviation of a column from its sum of squares; 0 of fewer than two rows."""
    square = tl.load(moments + which * dim + k, mask=k < dim, other=0.0)
    return tl.where(n > 1, tl.sqrt(square / tl.maximum(n - 1, 1.0)), square * 0)


@triton.jit
def slope(factor, n, sd):
    """factor / ((n - 1) sd), or 0 where nothing deviates."""
    return tl.where(sd > 0, factor / tl.where(sd > 0, (n - 1) * sd, 1.0), 0.0)


@triton.jit(do_not_specialize=SIZES)
def col_terms_kernel(
    moments,  # [11, D] float64
    count,  # [1] float64
    columns,  # [7, D] float32, out
    values,  # [2] float64, out
    gamma: tl.float64, dim, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for all columns: they are D numbers, whatever the number of rows."""
    n = tl.load(count)
    moment, variance = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    for start in range(0, dim, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < dim
        sd_pred, sd_target = deviation(moments, PRED_PRED_S, k, dim, n), deviation(moments, TARGET_TARGET_S, k, dim, n)
        # sd_p² - sd_t² = S(d, p + t)/(n - 1) = (2 S(d, p) - S(d, d))/(n - 1): nothing cancels for p near t.
        sd_difference = sd_pred - sd_target
        near = tl.abs(sd_difference) < 0.5 * sd_target
        cross = 2 * column(moments, DIFF_PRED_S, k, dim)
        cross -= column(moments, DIFF_DIFF_S, k, dim)
        sd_difference = tl.where(near, cross / tl.where(near, (n - 1) * (sd_pred + sd_target), 1.0), sd_difference)
        shift = column(moments, MEAN_DIFF, k, dim)
        moment += tl.sum(shift * shift + sd_difference * sd_difference)
        of_shift = tl.where(n > 0, 2.0 / (tl.maximum(n, 1.0) * dim), 0.0) * shift
        of_sd_difference = 2.0 / tl.cast(dim, tl.float64) * sd_difference
        out = columns + k
        tl.store(out + MOMENT_A * dim, of_shift.to(tl.float32), mask=inside)
        tl.store(out + MOMENT_C * dim, slope(of_sd_difference, n, sd_pred).to(tl.float32), mask=inside)
        tl.store(out + MOMENT_PRED * dim, column(moments, MEAN_PRED, k, dim).to(tl.float32), mask=inside)
        tl.store(out + MOMENT_C_TARGET * dim, slope(of_sd_difference, n, sd_target).to(tl.float32), mask=inside)
        tl.store(out + MOMENT_TARGET * dim, column(moments, MEAN_TARGET, k, dim).to(tl.float32), mask=inside)
        sd_unit = deviation(moments, UNIT_PRED_S, k, dim, n)
        sd_unit_target = deviation(moments, UNIT_TARGET_S, k, dim, n)
        missing = tl.where(gamma < 0, sd_unit_target, gamma) - sd_unit
        hinge = inside & ((missing > 0) | (missing != missing))  # a NaN is not hidden
        variance += tl.sum(tl.where(hinge, missing, 0.0))
        pull = slope(tl.where(missing > 0, -1.0 / tl.cast(dim, tl.float64), 0.0), n, sd_unit)
        tl.store(out + VARIANCE_V * dim, pull.to(tl.float32), mask=inside)
        tl.store(out + VARIANCE_UNIT * dim, column(moments, MEAN_UNIT_PRED, k, dim).to(tl.float32), mask=inside)
    tl.store(values, moment / dim)
    tl.store(values + 1, tl.where(n > 0, variance / dim, 0.0))


@triton.jit(do_not_specialize=SIZES)
def col_dots_kernel(
    pred, target,  # [G, M, D]
    attention,  # [G, M, D] float32: o, or None
    columns,  # [7, D] float32
    rows,  # [scalars, G M] float64
    count, size, dim, pred_group, pred_row, target_group, target_row, attention_group, attention_row, rows_stride,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: products of BLOCK_M rows' moment gradient h and variance gradient v with p, d, o and each other."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < count
    counts = inside & (get(rows, rows_stride, WEIGHT, i, inside) != 0)
    p_row, t_row = row_offset(i, size, pred_group, pred_row), row_offset(i, size, target_group, target_row)
    o_row = row_offset(i, size, attention_group, attention_row)
    inv_pred = get(rows, rows_stride, INV_PRED, i, counts).to(tl.float32)[:, None]
    spread = tl.zeros([BLOCK_M], tl.float64)
    for start in range(0, dim, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        unit = load_rows(pred, p_row, k, dim, counts) * inv_pred
        spread += row_sum(spread_at(columns, k, dim, unit) * unit)
    along = spread.to(tl.float32)[:, None]
    ph = tl.zeros([BLOCK_M], tl.float64)
    dh, oh, hh, dv, ov, hv, vv = ph, ph, ph, ph, ph, ph, ph
    for start in range(0, dim, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        p, d = load_rows(pred, p_row, k, dim, counts), load_rows(target, t_row, k, dim, counts)
        d = p - d
        unit = p * inv_pred
        h = moment_at(columns, k, dim, p)
        v = (spread_at(columns, k, dim, unit) - unit * along) * inv_pred
        ph += row_sum(p * h)
        dh += row_sum(d * h)
        hh += row_sum(h * h)
        dv += row_sum(d * v)
        hv += row_sum(h * v)
        vv += row_sum(v * v)
        if attention is not None:
            o = load_rows(attention, o_row, k, dim, counts)
            oh += row_sum(o * h)
            ov += row_sum(o * v)
    put(rows, rows_stride, PRED_SPREAD, i, tl.where(counts, spread, 0.0), inside)
    put(rows, rows_stride, PRED_MOMENT, i, tl.where(counts, ph, 0.0), inside)
    put(rows, rows_stride, DIFF_MOMENT, i, tl.where(counts, dh, 0.0), inside)
    put(rows, rows_stride, ATT_MOMENT, i, tl.where(counts, oh, 0.0), inside)
    put(rows, rows_stride, MOMENT_MOMENT, i, tl.where(counts, hh, 0.0), inside)
    put(rows, rows_stride, DIFF_VARIANCE, i, tl.where(counts, dv, 0.0), inside)
    put(rows, rows_stride, ATT_VARIANCE, i, tl.where(counts, ov, 0.0), inside)
    put(rows, rows_stride, MOMENT_VARIANCE, i, tl.where(counts, hv, 0.0), inside)
    put(rows, rows_stride, VARIANCE_VARIANCE, i, tl.where(counts, vv, 0.0), inside)
