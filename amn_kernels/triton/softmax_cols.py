"""Kernels of the other direction's softmax: sums down the columns of the similarities, and what follows from them."""

import triton
import triton.language as tl

from amn_kernels.triton.scalars import (
    COL_MAX,
    COL_OTHERS,
    LOWEST,
    SIZES,
    exp_below,
    get,
    own_logit,
    sends,
    temperature,
)
from amn_kernels.triton.softmax import same_id


@triton.jit(do_not_specialize=SIZES)
def softmax_cols_kernel(
    logits,  # [G, C, K] float32: s
    sums,  # [3, G, K'] float64, in place: maximum, sum of the others, sum over positives
    row_ids, key_ids,  # [G C], [G, K''], or None
    size, cols, id_keys, logits_group, logits_row, sums_stride, sums_group, ids_group,
    BY_ID: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C columns of a group, down all its rows."""
    blocks = tl.cdiv(cols, BLOCK_C)
    group = tl.program_id(0).to(tl.int64) // blocks
    j = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = j < cols
    at = sums + (group * sums_group + j)
    top = tl.load(at, mask=inside, other=LOWEST).to(tl.float32)
    total = tl.load(at + sums_stride, mask=inside, other=0.0)
    positive_sum = total * 0
    for start in range(0, size, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        there = (row < size)[:, None] & inside[None, :]
        offset = row.to(tl.int64)[:, None] * logits_row + j[None, :]
        s = tl.load(logits + group * logits_group + offset, mask=there, other=LOWEST)
        higher = tl.maximum(top, tl.max(s, axis=0))
        shrink = tl.where(top == LOWEST, 0.0, tl.exp((top - tl.where(higher == LOWEST, 0.0, higher)).to(tl.float64)))
        total = total * shrink + tl.sum(exp_below(s, higher[None, :]), axis=0).to(tl.float64)
        top = higher
        if BY_ID and key_ids is not None:
            same = same_id(row_ids, key_ids, id_keys, group, ids_group, group * size + row, row < size, j)
            positive_sum += tl.sum(tl.where(same & (s != LOWEST), s, 0.0), axis=0).to(tl.float64)
    tl.store(at, top.to(tl.float64), mask=inside)
    tl.store(at + sums_stride, total, mask=inside)
    if BY_ID and key_ids is not None:
        positive_sum += tl.load(at + 2 * sums_stride, mask=inside, other=0.0)
        tl.store(at + 2 * sums_stride, positive_sum, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def col_factors_kernel(
    rows,  # [scalars, G K] float64
    cols,  # [2, G K] float32, out
    learned,  # []
    tau: tl.float64, count, rows_stride, cols_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest s of a column with the own one, and 1/2 over the sum of exp(s - that); 0 for a row that sends not."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = j < count
    own = own_logit(rows, rows_stride, j, inside, temperature(tau, learned))
    top = get(rows, rows_stride, COL_MAX, j, inside)
    shift = tl.maximum(own, top, propagate_nan=tl.PropagateNan.ALL)
    total = tl.exp(own - shift) + get(rows, rows_stride, COL_OTHERS, j, inside) * tl.exp(top - shift)
    factor = tl.where(sends(rows, rows_stride, j, inside), 0.5 / total, 0.0)
    tl.store(cols + j, shift.to(tl.float32), mask=inside)
    tl.store(cols + cols_stride + j, factor.to(tl.float32), mask=inside)
