"""Kernel of the primitive row_dots: the positive added to the attention output, and its products with p and d."""

import triton
import triton.language as tl

from amn_kernels.primitives import Attention
from amn_kernels.triton.scalars import (
    ATT_ATT,
    COL_MAX,
    COL_OTHERS,
    DIFF_ATT,
    INV_PRED,
    INV_TARGET,
    MAX,
    OTHERS,
    POSITIVES,
    PRED_ATT,
    PRED_PRED,
    SIZES,
    WEIGHT,
    get,
    load_rows,
    own_logit,
    put,
    row_offset,
    row_sum,
    sends,
    share_of_others,
    temperature,
)

UNNORMALISED = tl.constexpr(int(Attention.UNNORMALISED))
BY_KEY = tl.constexpr(int(Attention.BY_KEY))


@triton.jit
def attention_scales(rows, stride, i, counts, tau, HELD: tl.constexpr, BOTH: tl.constexpr, BY_ID: tl.constexpr):
    """What the attention output is multiplied by, and the share of t that is taken from it, in float64."""
    own = own_logit(rows, stride, i, counts, tau)
    top, others = get(rows, stride, MAX, i, counts), get(rows, stride, OTHERS, i, counts)
    sending = sends(rows, stride, i, counts)
    if HELD == UNNORMALISED:
        factor = tl.where(sending, 1.0 / (others + tl.exp(own - top)), 0.0)
    elif HELD == BY_KEY:
        norm = tl.sqrt(get(rows, stride, PRED_PRED, i, counts))
        factor = tl.where(get(rows, stride, INV_PRED, i, counts) != 0, norm, 0.0)
    else:
        factor = own * 0 + 1.0
    positive = share_of_others(top, others, own)
    if BOTH:
        col_top, col_others = get(rows, stride, COL_MAX, i, counts), get(rows, stride, COL_OTHERS, i, counts)
        positive = (positive + share_of_others(col_top, col_others, own)) / 2
    if BY_ID:
        positives = get(rows, stride, POSITIVES, i, counts)
        positive -= positives / (1 + positives)
    take = tl.where(sending, positive * get(rows, stride, INV_TARGET, i, counts), 0.0)
    return factor, take


@triton.jit(do_not_specialize=SIZES)
def row_dots_kernel(
    pred, target,  # [G, M, D]
    attention,  # [G, M, D] float32, in place
    rows,  # [scalars, G M] float64
    learned,  # []
    tau: tl.float64, count, size, dim, pred_group, pred_row, target_group, target_row, attention_group, attention_row,
    rows_stride, HELD: tl.constexpr, BOTH: tl.constexpr, BY_ID: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows. o = 0 for masked ones."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < count
    counts = inside & (get(rows, rows_stride, WEIGHT, i, inside) != 0)
    factor, take = attention_scales(rows, rows_stride, i, counts, temperature(tau, learned), HELD, BOTH, BY_ID)
    factor, take = factor.to(tl.float32)[:, None], take.to(tl.float32)[:, None]
    p_row, t_row = row_offset(i, size, pred_group, pred_row), row_offset(i, size, target_group, target_row)
    o_row = row_offset(i, size, attention_group, attention_row)
    p_o = tl.zeros([BLOCK_M], tl.float64)
    d_o, o_o = p_o, p_o
    for start in range(0, dim, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        p, t = load_rows(pred, p_row, k, dim, counts), load_rows(target, t_row, k, dim, counts)
        o = load_rows(attention, o_row, k, dim, counts) * factor - t * take
        p_o += row_sum(p * o)
        d_o += row_sum((p - t) * o)
        o_o += row_sum(o * o)
        tl.store(attention + (o_row[:, None] + k[None, :]), o, mask=inside[:, None] & (k < dim)[None, :])
    put(rows, rows_stride, PRED_ATT, i, p_o, inside)
    put(rows, rows_stride, DIFF_ATT, i, d_o, inside)
    put(rows, rows_stride, ATT_ATT, i, o_o, inside)
