"""Kernels of small groups: one program does a whole group, whose similarities are one tile of registers.

What takes five primitives and two matrix products elsewhere is here three passes over the dimensions of the group, of
which the second and third find its rows in the L2 cache.
"""

import triton
import triton.language as tl

from amn_kernels.triton.balance import balanced_weights
from amn_kernels.triton.row_stats import half_square_of_units
from amn_kernels.triton.scalars import (
    ATT_ATT,
    COL_MAX,
    COL_OTHERS,
    DIFF_ATT,
    DIFF_DIFF,
    EXCESS,
    INV_PRED,
    INV_TARGET,
    KEYS,
    MAX,
    ONE_MINUS_COS,
    OTHERS,
    PRED_ATT,
    PRED_DIFF,
    PRED_PRED,
    TARGET_TARGET,
    WEIGHT,
    exp_below,
    inverse_norm,
    load_rows,
    offset_in_group,
    power_of_two,
    put,
    row_sum,
    share_of_others,
)
from amn_kernels.triton.term_sums import finish_sums, sum_rows


@triton.jit
def load_block(x, offset, k, dim, mask):
    """Elements [BLOCK_M, BLOCK_D] of rows that begin at `offset`, as they are, for a matrix product; 0 where masked."""
    return tl.load(x + (offset[:, None] + k[None, :]), mask=mask[:, None] & (k < dim)[None, :], other=0.0)


@triton.jit
def count_rows(mask, groups, size, mask_group, mask_row):
    """The number of rows that count, of all groups; at least 1."""
    count = tl.zeros([1024], tl.int32)
    for start in range(0, groups * size, 1024):
        i = start + tl.arange(0, 1024).to(tl.int64)
        offsets = (i // size) * mask_group + (i % size) * mask_row
        count += tl.load(mask + offsets, mask=i < groups * size, other=0).to(tl.int32)
    return tl.maximum(tl.sum(count, 0), 1)


@triton.jit
def finish(
    partial, weights, values, gram, metrics, loss, mean, updates, calls, skipped, lambdas, most, tau, decay, log_decay,
    dim, groups, update_every, LIST: tl.constexpr, SENDS: tl.constexpr, HAS_INFONCE: tl.constexpr,
    WEIGHTING: tl.constexpr, UPDATE: tl.constexpr, ANCHOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values, Gram matrix and metrics from the groups' sums; weights from these, and the loss."""
    finish_sums(partial, None, values, gram, metrics, tau, dim, groups, LIST, SENDS, HAS_INFONCE, BLOCK)
    m: tl.constexpr = len(LIST)
    if WEIGHTING is not None:
        # What one thread wrote, others read.
        tl.debug_barrier()
        if WEIGHTING == "value":
            balanced_weights(
                values, mean, updates, calls, skipped, lambdas, most, weights, decay, log_decay, update_every, m, 1,
                ANCHOR, True, UPDATE, 4,
            )  # fmt: skip
        elif WEIGHTING == "gradient":
            balanced_weights(
                gram, mean, updates, calls, skipped, lambdas, most, weights, decay, log_decay, update_every, m, m + 1,
                ANCHOR, False, UPDATE, 4,
            )  # fmt: skip
        tl.debug_barrier()
        term = tl.arange(0, 4)
        value = tl.load(values + term, mask=term < m, other=0.0)
        tl.store(loss, tl.sum(tl.load(weights + term, mask=term < m, other=0.0) * value, axis=0))


@triton.jit(do_not_specialize=["size", "groups", "update_every"])
def small_groups_kernel(
    pred, target,  # [G, M, D]
    mask, ids,  # [G, M], or None
    rows,  # [scalars, G M] float64, out
    attention,  # [G M, D] float32, out: o
    partial,  # [slots, G] float64, scratch
    weights,  # [m] float32: the fixed ones, or out
    values, gram, metrics, loss,  # [m], [m, m] or None, [5], [] float32, out
    mean, updates, calls, skipped, lambdas, most,  # state of a balanced weighting, or None
    tau: tl.float64, decay: tl.float64, log_decay: tl.float64, size, dim, groups, update_every, pred_group, pred_row,
    target_group, target_row, mask_group, mask_row, ids_group, ids_row, LIST: tl.constexpr, SENDS: tl.constexpr,
    HAS_INFONCE: tl.constexpr, ATTENDS: tl.constexpr, BOTH: tl.constexpr, WEIGHTING: tl.constexpr,
    UPDATE: tl.constexpr, ANCHOR: tl.constexpr, ONE_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: everything of one group; for a single group also everything of the batch."""
    group = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_M)
    inside = r < size
    counts, n = inside, groups * size
    if mask is not None:
        at = offset_in_group(group, r, mask_group, mask_row)
        counts = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
        n = count_rows(mask, groups, size, mask_group, mask_row)
    i = group * size + r
    stride = groups * size
    p_row = offset_in_group(group, r, pred_group, pred_row)
    t_row = offset_in_group(group, r, target_group, target_row)

    # What the tensor cores take: halves of one kind, else float32.
    low: tl.constexpr = pred.dtype.element_ty if pred.dtype == target.dtype else tl.float32
    pp = tl.zeros([BLOCK_M], tl.float64)
    tt, dd, pd = pp, pp, pp
    logits = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    for start in range(0, dim, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        p, t = load_block(pred, p_row, k, dim, counts), load_block(target, t_row, k, dim, counts)
        if HAS_INFONCE:
            logits = tl.dot(p.to(low), tl.trans(t.to(low)), logits, input_precision="ieee")
        p, t = p.to(tl.float32), t.to(tl.float32)
        pp += row_sum(p * p)
        tt += row_sum(t * t)
        dd += row_sum((p - t) * (p - t))
        pd += row_sum(p * (p - t))
    inv_pred, inv_target = inverse_norm(pp), inverse_norm(tt)
    # |p|² - |t|² = d.(p + t) = 2 p.d - d.d
    norms = tl.sqrt(pp) + tl.sqrt(tt)
    excess = tl.where(norms == 0, 0.0, (2 * pd - dd) / tl.where(norms == 0, 1.0, norms) * inv_target)
    square = half_square_of_units(pred, target, p_row, t_row, dim, counts, inv_pred, inv_target, excess, BLOCK_D)
    has_cosine = (inv_pred != 0) & (inv_target != 0)
    one_minus_cos = tl.where(has_cosine, square, 1.0)
    put(rows, stride, WEIGHT, i, tl.where(counts, 1.0 / n.to(tl.float64), 0.0), inside)
    put(rows, stride, INV_PRED, i, inv_pred, inside)
    put(rows, stride, INV_TARGET, i, inv_target, inside)
    put(rows, stride, EXCESS, i, excess, inside)
    put(rows, stride, ONE_MINUS_COS, i, one_minus_cos, inside)
    put(rows, stride, PRED_PRED, i, pp, inside)
    put(rows, stride, TARGET_TARGET, i, tt, inside)
    put(rows, stride, DIFF_DIFF, i, dd, inside)
    put(rows, stride, PRED_DIFF, i, pd, inside)

    if HAS_INFONCE:
        # One number per key for its scale and whether it is one, as in row_stats: each takes a register per column.
        key_scale = tl.where(counts, inv_target, -1.0).to(tl.float32)
        logits = logits * (inv_pred / tau).to(tl.float32)[:, None]
        logits = tl.where(key_scale[None, :] < 0, float("-inf"), logits * key_scale[None, :])
        logits = tl.where(counts[:, None] & (r[:, None] != r[None, :]), logits, float("-inf"))
        keys = tl.where(counts, tl.sum(counts.to(tl.int32), 0) - 1, 0)
        if ids is not None:
            id = tl.load(ids + offset_in_group(group, r, ids_group, ids_row), mask=inside, other=0)
            logits = tl.where(id[:, None] == id[None, :], float("-inf"), logits)
            keys = tl.sum((logits != float("-inf")).to(tl.int32), 1)
        own = (1 - one_minus_cos) / tau
        top = tl.max(logits, 1)
        soft = exp_below(logits, top[:, None])
        others = row_sum(soft)
        top = top.to(tl.float64)
        put(rows, stride, MAX, i, top, inside)
        put(rows, stride, OTHERS, i, others, inside)
        put(rows, stride, KEYS, i, keys.to(tl.float64), inside)
        sending = counts & has_cosine
        share = share_of_others(top, others, own)
        factor = 1 / (others + tl.exp(own - top))
        if BOTH:
            col_top = tl.max(logits, 0)
            col_soft = exp_below(logits, col_top[None, :])
            col_others = tl.sum(col_soft, 0).to(tl.float64)
            col_top = col_top.to(tl.float64)
            put(rows, stride, COL_MAX, i, col_top, inside)
            put(rows, stride, COL_OTHERS, i, col_others, inside)
            if ATTENDS:
                share = (share + share_of_others(col_top, col_others, own)) / 2
                from_row = tl.where(sending, factor / 2, 0.0).to(tl.float32)
                from_col = tl.where(sending, 0.5 / (col_others + tl.exp(own - col_top)), 0.0).to(tl.float32)
                soft = soft * from_row[:, None] + col_soft * from_col[None, :]
                # Back to at most 1, which keeps small weights out of the subnormal numbers of float16.
                peak = tl.max(soft, 1)
                soft = soft * tl.where(peak > 0, 1 / peak, 0.0)[:, None]
                factor = peak.to(tl.float64)

        if ATTENDS:
            # 1/|k| is a power of two, by which the key is multiplied without rounding, times 1 to 2, which the weight
            # gets: with all of it, float16 weights would be 0 beside that of a key of tiny norm.
            inv_key = inv_target.to(tl.float32)
            power = power_of_two(inv_key)
            w = (soft * tl.where(power == 0, 0.0, inv_key / power)[None, :]).to(low)
            # In both directions a row that sends nothing is a negative of the columns that do.
            factor = tl.where(counts if BOTH else sending, factor, 0.0).to(tl.float32)[:, None]
            take = tl.where(sending, share * inv_target, 0.0).to(tl.float32)[:, None]
            p_o = tl.zeros([BLOCK_M], tl.float64)
            d_o, o_o = p_o, p_o
            for start in range(0, dim, BLOCK_D):
                k = start + tl.arange(0, BLOCK_D)
                p, t = load_rows(pred, p_row, k, dim, counts), load_rows(target, t_row, k, dim, counts)
                o = tl.dot(w, (t * power[:, None]).to(low), input_precision="ieee")
                o = o * factor - t * take
                p_o += row_sum(p * o)
                d_o += row_sum((p - t) * o)
                o_o += row_sum(o * o)
                tl.store(attention + ((i * dim)[:, None] + k[None, :]), o, mask=inside[:, None] & (k < dim)[None, :])
            put(rows, stride, PRED_ATT, i, p_o, inside)
            put(rows, stride, DIFF_ATT, i, d_o, inside)
            put(rows, stride, ATT_ATT, i, o_o, inside)

    # The scalars come back one row to a thread, also those that other threads wrote.
    tl.debug_barrier()
    has_gram: tl.constexpr = gram is not None
    sum_rows(
        rows, partial, i, inside, tau, stride, groups, HAS_INFONCE, has_gram, ATTENDS and has_gram, False, BOTH, False
    )
    if ONE_GROUP:
        tl.debug_barrier()
        finish(
            partial, weights, values, gram, metrics, loss, mean, updates, calls, skipped, lambdas, most, tau, decay,
            log_decay, dim, groups, update_every, LIST, SENDS, HAS_INFONCE, WEIGHTING, UPDATE, ANCHOR, 1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["groups", "update_every"])
def finish_groups_kernel(
    partial, weights, values, gram, metrics, loss, mean, updates, calls, skipped, lambdas, most, tau: tl.float64,
    decay: tl.float64, log_decay: tl.float64, dim, groups, update_every, LIST: tl.constexpr, SENDS: tl.constexpr,
    HAS_INFONCE: tl.constexpr, WEIGHTING: tl.constexpr, UPDATE: tl.constexpr, ANCHOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: what follows from the sums of several groups; the arguments are those of `small_groups_kernel`."""
    finish(
        partial, weights, values, gram, metrics, loss, mean, updates, calls, skipped, lambdas, most, tau, decay,
        log_decay, dim, groups, update_every, LIST, SENDS, HAS_INFONCE, WEIGHTING, UPDATE, ANCHOR, BLOCK,
    )  # fmt: skip
