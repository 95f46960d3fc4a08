"""Kernel of the primitive row_combine: grad = a p + b d + c o, and the columns' part."""

import triton
import triton.language as tl

from amn_kernels.triton.columns import moment_at, spread_at
from amn_kernels.triton.scalars import (
    EXCESS,
    INV_PRED,
    INV_TARGET,
    ONE_MINUS_COS,
    PRED_ATT,
    PRED_SPREAD,
    SIZES,
    WEIGHT,
    get,
    load_rows,
    row_offset,
    temperature,
)


@triton.jit
def incoming(grad_loss, weights, grad_values, at: tl.constexpr):
    """Gradient of a term's value, by its place: through the loss and its own; 0 for a term that sends none."""
    gradient = tl.full([], 0.0, tl.float64)
    if at >= 0:
        if grad_loss is not None:
            gradient += tl.load(grad_loss).to(tl.float64) * tl.load(weights + at).to(tl.float64)
        if grad_values is not None:
            gradient += tl.load(grad_values + at).to(tl.float64)
    return gradient


@triton.jit
def coefficients(
    grad_loss, weights, grad_values, rows, stride, i, counts, dim, tau, MSE: tl.constexpr, COSINE: tl.constexpr,
    INFONCE: tl.constexpr, VARIANCE: tl.constexpr,
):  # fmt: skip
    """a, b, c of p, d, o, and that of t where d would lose the smaller vector; float64 [BLOCK_M]."""
    weight = get(rows, stride, WEIGHT, i, counts)
    inv_pred, inv_target = get(rows, stride, INV_PRED, i, counts), get(rows, stride, INV_TARGET, i, counts)
    a, c, e = weight * 0, weight * 0, weight * 0
    b = incoming(grad_loss, weights, grad_values, MSE) * 2 / dim * weight
    if COSINE >= 0:
        cosine = incoming(grad_loss, weights, grad_values, COSINE) * weight
        excess, one_minus_cos = get(rows, stride, EXCESS, i, counts), get(rows, stride, ONE_MINUS_COS, i, counts)
        sending = (inv_pred != 0) & (inv_target != 0)
        similar = tl.abs(excess) < 0.5
        along = tl.where(similar, -(one_minus_cos + excess), 1 - one_minus_cos)
        a += tl.where(sending, cosine * inv_pred * inv_pred * along, 0.0)
        across = tl.where(sending, cosine * inv_pred * inv_target, 0.0)
        b += tl.where(similar, across, 0.0)
        e -= tl.where(similar, 0.0, across)
    if INFONCE >= 0:
        infonce = incoming(grad_loss, weights, grad_values, INFONCE) / tau * weight
        c = infonce * inv_pred
        a -= c * inv_pred * inv_pred * get(rows, stride, PRED_ATT, i, counts)
    if VARIANCE >= 0:
        spread = get(rows, stride, PRED_SPREAD, i, counts)
        a -= incoming(grad_loss, weights, grad_values, VARIANCE) * inv_pred * inv_pred * spread
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), e.to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def row_combine_kernel(
    grad_loss,  # [] of the weighted sum of the values, or None
    weights,  # [m] float32, with it
    grad_values,  # [m] float32, or None
    pred, target,  # [G, M, D]
    attention,  # [G, M, D] float32: o, or None
    columns,  # [7, D] float32, or None
    rows,  # [scalars, G M] float64
    learned,  # []
    grad,  # [G, M, D], out
    tau: tl.float64, count, size, dim, pred_group, pred_row, target_group, target_row, attention_group, attention_row,
    grad_group, grad_row, rows_stride, MSE: tl.constexpr, COSINE: tl.constexpr, INFONCE: tl.constexpr,
    MOMENT: tl.constexpr, VARIANCE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows. A masked row is not read, and its gradient is 0."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < count
    counts = inside & (get(rows, rows_stride, WEIGHT, i, inside) != 0)
    a, b, c, e = coefficients(
        grad_loss,
        weights,
        grad_values,
        rows,
        rows_stride,
        i,
        counts,
        dim,
        temperature(tau, learned),
        MSE,
        COSINE,
        INFONCE,
        VARIANCE,
    )
    inv_pred = get(rows, rows_stride, INV_PRED, i, counts).to(tl.float32)[:, None]
    p_row, t_row = row_offset(i, size, pred_group, pred_row), row_offset(i, size, target_group, target_row)
    o_row, g_row = row_offset(i, size, attention_group, attention_row), row_offset(i, size, grad_group, grad_row)
    for start in range(0, dim, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        p, t = load_rows(pred, p_row, k, dim, counts), load_rows(target, t_row, k, dim, counts)
        g = a[:, None] * p + b[:, None] * (p - t) + e[:, None] * t
        if INFONCE >= 0:
            # Not read where it counts for nothing: o of a row that sends nothing may be anything.
            g += c[:, None] * load_rows(attention, o_row, k, dim, counts & (c != 0))
        if MOMENT >= 0:
            g += incoming(grad_loss, weights, grad_values, MOMENT).to(tl.float32) * moment_at(columns, k, dim, p)
        if VARIANCE >= 0:
            spread = incoming(grad_loss, weights, grad_values, VARIANCE).to(tl.float32) * inv_pred
            g += spread * spread_at(columns, k, dim, p * inv_pred)
        g = tl.where(counts[:, None], g, 0.0).to(grad.dtype.element_ty)
        tl.store(grad + (g_row[:, None] + k[None, :]), g, mask=inside[:, None] & (k < dim)[None, :])
