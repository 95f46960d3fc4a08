"""Kernels of the primitive term_sums: values of the terms, Gram matrix of their gradients and metrics from the rows.

Rows are summed in blocks by one kernel, blocks in order by the other: the order depends on the number of rows alone.
"""

import triton
import triton.language as tl

from amn_kernels.options import FUSED_TERMS
from amn_kernels.triton.scalars import (
    ATT_ATT,
    ATT_MOMENT,
    ATT_VARIANCE,
    COL_MAX,
    COL_OTHERS,
    COL_POSITIVE_SUM,
    DIFF_ATT,
    DIFF_DIFF,
    DIFF_MOMENT,
    DIFF_VARIANCE,
    EXCESS,
    INV_PRED,
    INV_TARGET,
    KEYS,
    LOWEST,
    MAX,
    MOMENT_MOMENT,
    MOMENT_VARIANCE,
    NEGATIVE_MAX,
    ONE_MINUS_COS,
    OTHERS,
    POSITIVE_SUM,
    POSITIVES,
    PRED_ATT,
    PRED_DIFF,
    PRED_MOMENT,
    PRED_PRED,
    SIZES,
    TARGET_TARGET,
    VARIANCE_VARIANCE,
    WEIGHT,
    get,
    log1p,
    temperature,
)

# What is summed over the rows; then the upper triangle of the Gram matrix, row by row: mse, cosine, infonce, moment,
# variance, without the factors that all rows have in common.
DIFF, COS, INFO, COUNT, TOP1, CHANCE, PRED_NORM, TARGET_NORM, GRAM = (tl.constexpr(n) for n in range(9))
SLOTS = 8 + 15
USED = tl.constexpr(SLOTS)
FINISH_BLOCKS = 32  # sums of so many blocks are added at a time: with all slots 8 numbers a thread
MSE, COSINE, INFONCE, MOMENT, VARIANCE = (tl.constexpr(FUSED_TERMS.index(name)) for name in FUSED_TERMS)
TIE = tl.constexpr(8 * 2.0**-23)  # cosines closer than the rounding of a matrix product are a tie


@triton.jit
def cross_entropy(top, others, own_logit):
    """log(own + others) - own logit, so that neither a dominating nor a vanishing own key loses digits."""
    own = tl.exp(own_logit - top)
    # Further below, the own key is nothing beside the others, and before it is 0 the quotient overflows.
    value = tl.where(own > 1e-200, log1p(others / own), top - own_logit + tl.log(others))
    # No other key: 0, or NaN where the row is not finite.
    return tl.where((top == LOWEST) & (others == 0), 0 * own_logit, value)


@triton.jit
def infonce_of_rows(rows, stride, i, counts, own, BOTH: tl.constexpr, BY_ID: tl.constexpr):
    """Value of each row."""
    value = cross_entropy(get(rows, stride, MAX, i, counts), get(rows, stride, OTHERS, i, counts), own)
    if BOTH:
        top, others = get(rows, stride, COL_MAX, i, counts), get(rows, stride, COL_OTHERS, i, counts)
        value = (value + cross_entropy(top, others, own)) / 2
    if BY_ID:
        # log-sum - mean over the positives = (log-sum - own) + mean over the positives of (own - s).
        positives, positive_sum = get(rows, stride, POSITIVES, i, counts), get(rows, stride, POSITIVE_SUM, i, counts)
        if BOTH:
            positive_sum = (positive_sum + get(rows, stride, COL_POSITIVE_SUM, i, counts)) / 2
        value += (positives * own - positive_sum) / (1 + positives)
    return value


@triton.jit
def write(partial, blocks, slot: tl.constexpr, x, counts):
    """Sum over the rows that count, to its slot of [slots, blocks]."""
    tl.store(partial + slot * blocks + tl.program_id(0), tl.sum(tl.where(counts, x, 0.0), axis=0))


@triton.jit
def sum_rows(
    rows, partial, i, inside, tau, rows_stride, blocks, HAS_INFONCE: tl.constexpr, HAS_GRAM: tl.constexpr,
    ATTENDS: tl.constexpr, COLUMNS: tl.constexpr, BOTH: tl.constexpr, BY_ID: tl.constexpr,
):  # fmt: skip
    """Sums over rows i, to the program's column of partial [slots, blocks]; τ in float64."""
    weight = get(rows, rows_stride, WEIGHT, i, inside)
    counts = inside & (weight != 0)
    inv_pred = get(rows, rows_stride, INV_PRED, i, counts)
    one_minus_cos, dd = get(rows, rows_stride, ONE_MINUS_COS, i, counts), get(rows, rows_stride, DIFF_DIFF, i, counts)
    target_norm = tl.sqrt(get(rows, rows_stride, TARGET_TARGET, i, counts))
    write(partial, blocks, DIFF, weight * dd, counts)
    write(partial, blocks, COS, weight * one_minus_cos, counts)
    write(partial, blocks, COUNT, weight, counts)
    write(partial, blocks, PRED_NORM, weight * tl.sqrt(get(rows, rows_stride, PRED_PRED, i, counts)), counts)
    write(partial, blocks, TARGET_NORM, weight * target_norm, counts)
    if HAS_INFONCE:
        own, top = (1 - one_minus_cos) / tau, get(rows, rows_stride, MAX, i, counts)
        margin = own - top
        if BY_ID:
            margin = tl.maximum(own, top) - get(rows, rows_stride, NEGATIVE_MAX, i, counts)
        write(partial, blocks, INFO, weight * infonce_of_rows(rows, rows_stride, i, counts, own, BOTH, BY_ID), counts)
        write(partial, blocks, TOP1, tl.where(margin * tau > TIE, weight, 0.0), counts)
        write(partial, blocks, CHANCE, weight * log1p(get(rows, rows_stride, KEYS, i, counts)), counts)
    if HAS_GRAM:
        square = weight * weight
        # Cosine sends no gradient into a row where either vector is zero.
        inv_target = get(rows, rows_stride, INV_TARGET, i, counts)
        sending = (inv_pred != 0) & (inv_target != 0)
        inv_pred_sent = tl.where(sending, inv_pred, 0.0)
        inv_target_sent = tl.where(sending, inv_target, 0.0)
        sin_square = one_minus_cos * (2 - one_minus_cos)
        write(partial, blocks, GRAM, square * dd, counts)
        write(partial, blocks, GRAM + 1, square * target_norm * inv_pred_sent * sin_square, counts)
        write(partial, blocks, GRAM + 5, square * inv_pred_sent * inv_pred_sent * sin_square, counts)
        along_pred = inv_pred * 0
        if ATTENDS:
            # The InfoNCE gradient is (o - (p.o)/|p|² p)/|p|: orthogonal to p, so of the others only what lies along d
            # counts.
            po = get(rows, rows_stride, PRED_ATT, i, counts)
            along_pred = po * inv_pred * inv_pred
            with_diff = get(rows, rows_stride, DIFF_ATT, i, counts)
            with_diff = inv_pred * (with_diff - along_pred * get(rows, rows_stride, PRED_DIFF, i, counts))
            own_square = inv_pred * inv_pred * (get(rows, rows_stride, ATT_ATT, i, counts) - along_pred * po)
            write(partial, blocks, GRAM + 2, square * with_diff, counts)
            write(partial, blocks, GRAM + 6, square * inv_pred * inv_target * with_diff, counts)
            write(partial, blocks, GRAM + 9, square * own_square, counts)
        if COLUMNS:
            dh, ph = get(rows, rows_stride, DIFF_MOMENT, i, counts), get(rows, rows_stride, PRED_MOMENT, i, counts)
            dv = get(rows, rows_stride, DIFF_VARIANCE, i, counts)
            excess = get(rows, rows_stride, EXCESS, i, counts)
            along = inv_pred_sent * inv_pred_sent * (one_minus_cos + excess)
            write(partial, blocks, GRAM + 3, weight * dh, counts)
            write(partial, blocks, GRAM + 4, weight * dv, counts)
            write(partial, blocks, GRAM + 7, weight * (inv_pred_sent * inv_target_sent * dh - along * ph), counts)
            write(partial, blocks, GRAM + 8, weight * inv_pred_sent * inv_target_sent * dv, counts)
            if ATTENDS:
                oh, ov = get(rows, rows_stride, ATT_MOMENT, i, counts), get(rows, rows_stride, ATT_VARIANCE, i, counts)
                write(partial, blocks, GRAM + 10, weight * inv_pred * (oh - along_pred * ph), counts)
                write(partial, blocks, GRAM + 11, weight * inv_pred * ov, counts)
            write(partial, blocks, GRAM + 12, get(rows, rows_stride, MOMENT_MOMENT, i, counts), counts)
            write(partial, blocks, GRAM + 13, get(rows, rows_stride, MOMENT_VARIANCE, i, counts), counts)
            write(partial, blocks, GRAM + 14, get(rows, rows_stride, VARIANCE_VARIANCE, i, counts), counts)


@triton.jit(do_not_specialize=SIZES)
def sum_rows_kernel(
    rows,  # [scalars, N] float64
    partial,  # [slots, blocks] float64, out
    learned,  # []
    tau: tl.float64, count, rows_stride, blocks, HAS_INFONCE: tl.constexpr, HAS_GRAM: tl.constexpr,
    ATTENDS: tl.constexpr, COLUMNS: tl.constexpr, BOTH: tl.constexpr, BY_ID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sum_rows(
        rows, partial, i, i < count, temperature(tau, learned), rows_stride, blocks, HAS_INFONCE, HAS_GRAM, ATTENDS,
        COLUMNS, BOTH, BY_ID,
    )  # fmt: skip


@triton.jit
def slot_sums(partial, blocks, BLOCK: tl.constexpr):
    """Sums [32] of the slots over the blocks, in order. A slot that nobody wrote holds anything."""
    slot = tl.arange(0, 32)
    sums = tl.zeros([32], tl.float64)
    for start in range(0, blocks, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = (slot < USED)[:, None] & (n < blocks)[None, :]
        sums += tl.sum(tl.load(partial + (slot[:, None] * blocks + n[None, :]), mask=inside, other=0.0), axis=1)
    return sums


@triton.jit
def at(sums, slot: tl.constexpr):
    """One of the sums."""
    return tl.sum(tl.where(tl.arange(0, 32) == slot, sums, 0.0), axis=0)


@triton.jit
def value_of(sums, col_values, term: tl.constexpr, dim):
    """Value of a term."""
    if term == MSE:
        x = at(sums, DIFF) / dim
    elif term == COSINE:
        x = at(sums, COS)
    elif term == INFONCE:
        x = at(sums, INFO)
    else:
        x = tl.load(col_values + (term - MOMENT))
    return x


@triton.jit
def factor_of(term: tl.constexpr, dim, tau):
    """What all rows of a term's gradient have in common."""
    factor = tau * 0 + 1
    if term == MSE:
        factor = 2 * factor / dim
    if term == INFONCE:
        factor = factor / tau
    return factor


@triton.jit
def gram_of(sums, one: tl.constexpr, other: tl.constexpr, dim, tau):
    """Inner product of two terms' gradients."""
    low: tl.constexpr = one if one < other else other
    high: tl.constexpr = other if one < other else one
    # Row `low` of the triangle begins after the rows before it, of 5, 4, 3, ... entries.
    slot: tl.constexpr = GRAM + low * 5 - low * (low - 1) // 2 + high - low
    return factor_of(low, dim, tau) * factor_of(high, dim, tau) * at(sums, slot)


@triton.jit
def finish_sums(
    partial, col_values, values, gram, metrics, tau, dim, blocks, LIST: tl.constexpr, SENDS: tl.constexpr,
    HAS_INFONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The blocks' sums to values, Gram matrix and metrics. LIST has the terms' numbers; τ in float64."""
    sums = slot_sums(partial, blocks, BLOCK)
    m: tl.constexpr = len(LIST)
    for a in tl.static_range(m):
        tl.store(values + a, value_of(sums, col_values, LIST[a], dim).to(tl.float32))
        if gram is not None:
            for b in tl.static_range(m):
                entry = tl.full([], 0.0, tl.float64)
                if SENDS[a] and SENDS[b]:
                    entry = gram_of(sums, LIST[a], LIST[b], dim, tau)
                tl.store(gram + a * m + b, entry.to(tl.float32))
    weight, cosine_distance = at(sums, COUNT), at(sums, COS)
    top1, chance = tau * 0, tau * 0
    if HAS_INFONCE:
        top1, chance = at(sums, TOP1), at(sums, CHANCE)
    tl.store(metrics, (weight - cosine_distance).to(tl.float32))
    tl.store(metrics + 1, top1.to(tl.float32))
    tl.store(metrics + 2, chance.to(tl.float32))
    tl.store(metrics + 3, at(sums, PRED_NORM).to(tl.float32))
    tl.store(metrics + 4, at(sums, TARGET_NORM).to(tl.float32))


@triton.jit(do_not_specialize=SIZES)
def finish_sums_kernel(
    partial,  # [slots, blocks] float64
    col_values,  # [2] float64, or None
    values,  # [m] float32, out
    gram,  # [m, m] float32, out, or None
    metrics,  # [5] float32, out
    learned,  # []
    tau: tl.float64, dim, blocks, LIST: tl.constexpr, SENDS: tl.constexpr, HAS_INFONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for all blocks."""
    tau = temperature(tau, learned)
    finish_sums(partial, col_values, values, gram, metrics, tau, dim, blocks, LIST, SENDS, HAS_INFONCE, BLOCK)
