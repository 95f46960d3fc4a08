"""Groups of at most 128 rows: one program does a whole group, so that a training step is two or three launches.

The similarities of a group are one tile of registers. What takes five primitives and two matrix products elsewhere is
here three passes over the dimensions of the group, of which the second and third find its rows in the L2 cache.

Launches of a training step, counted in tests/test_triton_small_groups.py: forward and backward; for several groups one
more in between, which sums over them. Values, Gram matrix, metrics, balanced weights and the loss are formed where the
sums are, and the backward multiplies by the incoming gradient and the weights.
"""

import triton
import triton.language as tl

from amn_kernels.primitives import Row

MAX_ROWS = 128
SUMS = 16
"""Numbers per group that are summed over groups, padded to a power of two; the order is that of `_sum_rows`."""

# A kernel for every value of these would be compiled for nothing.
_NUMBERS = ["tau", "size", "groups", "anchor", "update_every", "gain", "log_decay"]

_WEIGHT = tl.constexpr(int(Row.WEIGHT))
_INV_PRED = tl.constexpr(int(Row.INV_PRED))
_INV_TARGET = tl.constexpr(int(Row.INV_TARGET))
_EXCESS = tl.constexpr(int(Row.EXCESS))
_ONE_MINUS_COS = tl.constexpr(int(Row.ONE_MINUS_COS))
_PRED_PRED = tl.constexpr(int(Row.PRED_PRED))
_TARGET_TARGET = tl.constexpr(int(Row.TARGET_TARGET))
_DIFF_DIFF = tl.constexpr(int(Row.DIFF_DIFF))
_PRED_DIFF = tl.constexpr(int(Row.PRED_DIFF))
_MAX = tl.constexpr(int(Row.MAX))
_OTHERS = tl.constexpr(int(Row.OTHERS))
_KEYS = tl.constexpr(int(Row.KEYS))
_PRED_ATT = tl.constexpr(int(Row.PRED_ATT))
_DIFF_ATT = tl.constexpr(int(Row.DIFF_ATT))
_ATT_ATT = tl.constexpr(int(Row.ATT_ATT))
_COL_MAX = tl.constexpr(int(Row.COL_MAX))
_COL_OTHERS = tl.constexpr(int(Row.COL_OTHERS))


@triton.jit
def _load(base, offsets, stride_row, d, stride_d, row_mask, dim):  # [BLOCK_M, BLOCK_D]
    offsets = offsets.to(tl.int64)[:, None] * stride_row + d.to(tl.int64)[None, :] * stride_d
    return tl.load(base + offsets, mask=row_mask[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def _inverse_norm(square):
    # 0 for a zero vector; NaN for a norm that is not finite, so that it can't pass for a zero vector.
    norm = tl.sqrt(square)
    inverse = tl.where(norm < 1e-8, 0.0, 1.0 / norm)
    return tl.where(norm == float("inf"), float("nan"), inverse)


@triton.jit
def _log1p(x):
    # For small x the logarithm of 1 + x loses its digits; from 1e-4 on float64 has enough of them.
    return tl.where(x < 1e-4, x * (1 - x * (0.5 - x * (1 / 3))), tl.log(1 + x))


@triton.jit
def _cross_entropy(top, others, own):
    # log(own + others) - own logit, written so that neither a dominating nor a vanishing own key loses digits.
    own_exp = tl.exp(own - top)
    vanishes = own_exp == 0
    return tl.where(vanishes, top - own + tl.log(others), _log1p(others / tl.where(vanishes, 1.0, own_exp)))


@triton.jit
def _put(sums, place: tl.constexpr, x):  # [SUMS]
    return tl.where(tl.arange(0, 16) == place, tl.sum(x, 0), sums)


@triton.jit
def _at(sums, place: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, 16) == place, sums, 0.0), 0)


@triton.jit
def _sum_rows(
    row,  # pointers to the row scalars of the group's rows, [BLOCK_M]
    n,  # rows in all: the distance from one scalar to the next
    inside,  # [BLOCK_M]
    tau,
    HAS_INFONCE: tl.constexpr,
    ATTENDS: tl.constexpr,
    BOTH: tl.constexpr,
):
    """What values, Gram matrix and metrics are made of, summed over the rows that count: sum_rows in csrc/cpu."""
    weight = tl.load(row + _WEIGHT * n, mask=inside, other=0.0)
    inside = inside & (weight != 0)
    inv_pred = tl.load(row + _INV_PRED * n, mask=inside, other=0.0)
    inv_target = tl.load(row + _INV_TARGET * n, mask=inside, other=0.0)
    one_minus_cos = tl.load(row + _ONE_MINUS_COS * n, mask=inside, other=0.0)
    diff_diff = tl.load(row + _DIFF_DIFF * n, mask=inside, other=0.0)
    pred_norm = tl.sqrt(tl.load(row + _PRED_PRED * n, mask=inside, other=0.0))
    target_norm = tl.sqrt(tl.load(row + _TARGET_TARGET * n, mask=inside, other=0.0))
    square = weight * weight
    sums = tl.zeros([16], tl.float64)
    sums = _put(sums, 0, weight)
    sums = _put(sums, 1, weight * diff_diff)
    sums = _put(sums, 2, weight * one_minus_cos)
    sums = _put(sums, 3, weight * pred_norm)
    sums = _put(sums, 4, weight * target_norm)
    sums = _put(sums, 5, square * diff_diff)
    has_cosine = (inv_pred != 0) & (inv_target != 0)
    sin_square = tl.where(has_cosine, one_minus_cos * (2 - one_minus_cos), 0.0)
    sums = _put(sums, 6, square * target_norm * inv_pred * sin_square)
    sums = _put(sums, 7, square * inv_pred * inv_pred * sin_square)
    if HAS_INFONCE:
        top = tl.load(row + _MAX * n, mask=inside, other=0.0)
        others = tl.load(row + _OTHERS * n, mask=inside, other=0.0)
        keys = tl.load(row + _KEYS * n, mask=inside, other=0.0)
        own = (1 - one_minus_cos) / tau
        value = _cross_entropy(top, others, own)
        if BOTH:
            col_top = tl.load(row + _COL_MAX * n, mask=inside, other=0.0)
            col_others = tl.load(row + _COL_OTHERS * n, mask=inside, other=0.0)
            value = (value + _cross_entropy(col_top, col_others, own)) / 2
        # Cosines closer than the rounding of a matrix product are a tie: 8 units of float32.
        wins = (own - top) * tau > 8 * 1.1920928955078125e-07
        sums = _put(sums, 8, tl.where(inside, weight * value, 0.0))
        sums = _put(sums, 9, tl.where(wins, weight, 0.0))
        sums = _put(sums, 10, weight * tl.log(1 + keys))
    if ATTENDS:
        # The InfoNCE gradient is (o - (p.o)/|p|^2 p)/|p|: orthogonal to p, so of d only d - (p.d)/|p|^2 p counts.
        pred_diff = tl.load(row + _PRED_DIFF * n, mask=inside, other=0.0)
        pred_att = tl.load(row + _PRED_ATT * n, mask=inside, other=0.0)
        diff_att = tl.load(row + _DIFF_ATT * n, mask=inside, other=0.0)
        att_att = tl.load(row + _ATT_ATT * n, mask=inside, other=0.0)
        along_pred = pred_att * inv_pred * inv_pred
        with_diff = inv_pred * (diff_att - along_pred * pred_diff)
        sums = _put(sums, 11, square * with_diff)
        sums = _put(sums, 12, square * inv_pred * inv_target * with_diff)
        sums = _put(sums, 13, square * inv_pred * inv_pred * (att_att - along_pred * pred_att))
        sums = _put(sums, 14, weight * inv_pred * pred_att)
    return sums


@triton.jit
def _balance(
    observed,  # [4] squared gradient norms, or values
    inside,  # [4]
    mean,
    updates,
    calls,
    skipped,
    lambdas,
    most,
    anchor,
    update_every,
    gain,  # 1 - decay
    log_decay,
    BY_VALUE: tl.constexpr,
    OBSERVES: tl.constexpr,
    UPDATE: tl.constexpr,
):
    """Weights [4] of the terms, from running means that are updated first: twin of python_ref/balance.py."""
    k = tl.arange(0, 4)
    running = tl.load(mean + k, mask=inside, other=0.0)
    count = tl.load(updates + k, mask=inside, other=0)
    factor = tl.load(lambdas + k, mask=inside, other=0.0)
    if OBSERVES and UPDATE:
        call = tl.load(calls)
        due = (call % update_every == 0) & (factor > 0)
        usable = (observed > 0) & (observed < float("inf"))
        known = running / (1 - tl.exp(tl.maximum(count, 1).to(tl.float64) * log_decay))
        limit = tl.where(count >= 10, 9 * known.to(tl.float32), float("inf"))
        step = gain * (tl.minimum(observed, limit) - running)
        take = due & usable & inside
        running = tl.where(take, running + step, running)
        count = tl.where(take, count + 1, count)
        tl.store(mean + k, running, mask=inside)
        tl.store(updates + k, count, mask=inside)
        missed = tl.load(skipped + k, mask=inside, other=0)
        tl.store(skipped + k, tl.where(due & ~usable, missed + 1, missed), mask=inside)
        tl.store(calls, call + 1)
    known = (running / (1 - tl.exp(tl.maximum(count, 1).to(tl.float64) * log_decay))).to(tl.float32)
    is_anchor = k == anchor
    known_anchor = tl.sum(tl.where(is_anchor, known, 0.0), 0)
    if BY_VALUE:
        ratio = known_anchor / known
    else:
        current = known
        if OBSERVES:
            current = tl.where(observed > known, observed, known)
        ratio = tl.sqrt_rn(known_anchor) / tl.sqrt_rn(current)
    seen = (count > 0) & (tl.sum(tl.where(is_anchor, count, 0), 0) > 0) & ~is_anchor
    largest = tl.load(most + k, mask=inside, other=1.0)
    ratio = tl.where(seen, tl.minimum(tl.maximum(ratio, 1e-6), largest), 1.0)
    return (factor * ratio).to(tl.float32)


@triton.jit
def _finish(
    sums,  # [SUMS]
    weights,  # pointers to the results and to the state of the weighting, as documented at `forward`
    values,
    gram,
    metrics,
    loss,
    tau_slope,
    mean,
    updates,
    calls,
    skipped,
    lambdas,
    most,
    tau,
    dim,
    anchor,
    update_every,
    gain,
    log_decay,
    MSE: tl.constexpr,  # place of the term among those that are computed, or -1
    COSINE: tl.constexpr,
    INFONCE: tl.constexpr,
    SENDS: tl.constexpr,  # bit i: the term in place i sends a gradient
    GRAM: tl.constexpr,
    WEIGHTING: tl.constexpr,  # None, "fixed", "gradient" or "value"
    UPDATE: tl.constexpr,
):
    """Values, Gram matrix, metrics, weights and loss from sums over all rows: term_sums and balance."""
    i = tl.arange(0, 4)
    m: tl.constexpr = (MSE >= 0) + (COSINE >= 0) + (INFONCE >= 0)
    inside = i < m
    value = tl.where(i == MSE, _at(sums, 1) / dim, 0.0)
    value = tl.where(i == COSINE, _at(sums, 2), value)
    value = tl.where(i == INFONCE, _at(sums, 8), value).to(tl.float32)
    tl.store(values + i, value, mask=inside)
    squares = value
    if GRAM:
        squares = tl.where(i == MSE, 4 * _at(sums, 5) / dim / dim, 0.0)
        squares = tl.where(i == COSINE, _at(sums, 7), squares)
        squares = tl.where(i == INFONCE, _at(sums, 13) / tau / tau, squares)
        squares = tl.where(((SENDS >> i) & 1) != 0, squares, 0.0).to(tl.float32)
        a = i[:, None]
        b = i[None, :]
        low = tl.minimum(a, b)
        high = tl.maximum(a, b)
        entry = tl.where((low == MSE) & (high == COSINE), 2 * _at(sums, 6) / dim, 0.0)
        entry = tl.where((low == MSE) & (high == INFONCE), 2 * _at(sums, 11) / dim / tau, entry)
        entry = tl.where((low == COSINE) & (high == INFONCE), _at(sums, 12) / tau, entry)
        entry = tl.where((((SENDS >> a) & (SENDS >> b)) & 1) != 0, entry, 0.0).to(tl.float32)
        entry = tl.where(a == b, squares[:, None], entry)
        tl.store(gram + a * m + b, entry, mask=(a < m) & (b < m))
    if tau_slope is not None:
        tl.store(tau_slope, (-_at(sums, 14) / tau / tau).to(tl.float32))
    k = tl.arange(0, 8)
    metric = tl.where(k == 0, _at(sums, 0) - _at(sums, 2), 0.0)
    metric = tl.where(k == 1, _at(sums, 9), metric)
    metric = tl.where(k == 2, _at(sums, 10), metric)
    metric = tl.where(k == 3, _at(sums, 3), metric)
    metric = tl.where(k == 4, _at(sums, 4), metric)
    tl.store(metrics + k, metric.to(tl.float32), mask=k < 5)
    if WEIGHTING is not None:
        if WEIGHTING == "fixed":
            weight = tl.load(weights + i, mask=inside, other=0.0)
        else:
            observed = value if WEIGHTING == "value" else squares
            weight = _balance(
                observed, inside, mean, updates, calls, skipped, lambdas, most, anchor, update_every, gain, log_decay,
                BY_VALUE=WEIGHTING == "value", OBSERVES=GRAM or WEIGHTING == "value", UPDATE=UPDATE,
            )  # fmt: skip
            tl.store(weights + i, weight, mask=inside)
        tl.store(loss, tl.sum(tl.where(inside, weight * value, 0.0), 0))


@triton.jit
def _count_rows(mask, groups, size, mask_group, mask_row):
    """The number of rows that count, of all groups."""
    count = tl.zeros([1024], tl.int32)
    for first in range(0, groups * size, 1024):
        index = first + tl.arange(0, 1024)
        offsets = (index // size).to(tl.int64) * mask_group + (index % size).to(tl.int64) * mask_row
        count += tl.load(mask + offsets, mask=index < groups * size, other=0).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit(do_not_specialize=_NUMBERS)
def forward_kernel(
    pred,
    target,
    mask,
    ids,
    learned_tau,
    rows,
    attention,
    partial,
    weights,
    values,
    gram,
    metrics,
    loss,
    tau_slope,
    mean,
    updates,
    calls,
    skipped,
    lambdas,
    most,
    tau,
    size,
    dim,
    groups,
    pred_group,
    pred_row,
    pred_dim,
    target_group,
    target_row,
    target_dim,
    mask_group,
    mask_row,
    ids_group,
    ids_row,
    anchor,
    update_every,
    gain,
    log_decay,
    MSE: tl.constexpr,
    COSINE: tl.constexpr,
    INFONCE: tl.constexpr,
    SENDS: tl.constexpr,
    ATTENDS: tl.constexpr,
    BOTH: tl.constexpr,
    GRAM: tl.constexpr,
    WEIGHTING: tl.constexpr,
    UPDATE: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Everything of one group; for a single group also everything of the batch."""
    group = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_M)
    inside = i < size
    valid = inside
    count = groups * size
    if mask is not None:
        valid = inside & (tl.load(mask + group * mask_group + i * mask_row, mask=inside, other=0) != 0)
        count = tl.maximum(_count_rows(mask, groups, size, mask_group, mask_row), 1)
    if learned_tau is not None:
        tau = tl.load(learned_tau)
    pred += group * pred_group
    target += group * target_group
    n = (groups * size).to(tl.int64)
    row = rows + group * size + i

    # Products of low precision are exact in float32, and so are their sums per block but for its last places.
    low: tl.constexpr = pred.dtype.element_ty if pred.dtype == target.dtype else tl.float32
    pred_pred = tl.zeros([BLOCK_M], tl.float64)
    target_target = tl.zeros([BLOCK_M], tl.float64)
    diff_diff = tl.zeros([BLOCK_M], tl.float64)
    pred_diff = tl.zeros([BLOCK_M], tl.float64)
    logits = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        p = _load(pred, i, pred_row, d, pred_dim, valid, dim)
        t = _load(target, i, target_row, d, target_dim, valid, dim)
        if INFONCE >= 0:
            logits = tl.dot(p.to(low), tl.trans(t.to(low)), logits, input_precision="ieee")
        p = p.to(tl.float32)
        t = t.to(tl.float32)
        pred_pred += tl.sum(p * p, 1)
        target_target += tl.sum(t * t, 1)
        diff_diff += tl.sum((p - t) * (p - t), 1)
        pred_diff += tl.sum(p * (p - t), 1)
    tl.store(row + _PRED_PRED * n, pred_pred, mask=inside)
    tl.store(row + _TARGET_TARGET * n, target_target, mask=inside)
    tl.store(row + _DIFF_DIFF * n, diff_diff, mask=inside)
    tl.store(row + _PRED_DIFF * n, pred_diff, mask=inside)

    inv_pred = _inverse_norm(pred_pred)
    inv_target = _inverse_norm(target_target)
    # |p|^2 - |t|^2 = d.(p + t) = 2 p.d - d.d
    norms = tl.sqrt(pred_pred) + tl.sqrt(target_target)
    excess = tl.where(norms == 0, 0.0, (2 * pred_diff - diff_diff) / norms * inv_target)
    # |p/|p| - t/|t||^2 / 2. For similar norms the difference is taken as (d - excess t)/|p|, in which nothing cancels;
    # d itself loses the smaller vector else.
    similar = tl.abs(excess) < 0.5
    d_scale = tl.where(similar, inv_pred, 0.0).to(tl.float32)[:, None]
    p_scale = tl.where(similar, 0.0, inv_pred).to(tl.float32)[:, None]
    t_scale = tl.where(similar, inv_pred * excess, inv_target).to(tl.float32)[:, None]
    square = tl.zeros([BLOCK_M], tl.float64)
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        p = _load(pred, i, pred_row, d, pred_dim, valid, dim).to(tl.float32)
        t = _load(target, i, target_row, d, target_dim, valid, dim).to(tl.float32)
        e = d_scale * (p - t) + p_scale * p - t_scale * t
        square += tl.sum(e * e, 1)
    has_cosine = (inv_pred != 0) & (inv_target != 0)
    one_minus_cos = tl.where(has_cosine, square / 2, 1.0)
    tl.store(row + _WEIGHT * n, tl.where(valid, 1.0 / count.to(tl.float64), 0.0), mask=inside)
    tl.store(row + _INV_PRED * n, inv_pred, mask=inside)
    tl.store(row + _INV_TARGET * n, inv_target, mask=inside)
    tl.store(row + _EXCESS * n, excess, mask=inside)
    tl.store(row + _ONE_MINUS_COS * n, one_minus_cos, mask=inside)

    if INFONCE >= 0:
        other = valid[:, None] & valid[None, :] & (i[:, None] != i[None, :])
        if ids is not None:
            id = tl.load(ids + group * ids_group + i * ids_row, mask=inside, other=0)
            other = other & (id[:, None] != id[None, :])
        scale = inv_target.to(tl.float32)
        logits = logits * (inv_pred / tau).to(tl.float32)[:, None] * scale[None, :]
        logits = tl.where(other, logits, float("-inf"))
        own = (1 - one_minus_cos) / tau
        top = tl.max(logits, 1)
        soft = tl.exp(logits - tl.where(top == float("-inf"), 0.0, top)[:, None])
        top = top.to(tl.float64)
        others = tl.sum(soft, 1).to(tl.float64)
        tl.store(row + _MAX * n, top, mask=inside)
        tl.store(row + _OTHERS * n, others, mask=inside)
        tl.store(row + _KEYS * n, tl.sum(other.to(tl.int32), 1).to(tl.float64), mask=inside)
        sends = valid & has_cosine
        total = others + tl.exp(own - top)
        share = others / total
        factor = 1 / total
        if BOTH:
            col_top = tl.max(logits, 0)
            col_soft = tl.exp(logits - tl.where(col_top == float("-inf"), 0.0, col_top)[None, :])
            col_top = col_top.to(tl.float64)
            col_others = tl.sum(col_soft, 0).to(tl.float64)
            tl.store(row + _COL_MAX * n, col_top, mask=inside)
            tl.store(row + _COL_OTHERS * n, col_others, mask=inside)
            if ATTENDS:
                col_total = col_others + tl.exp(own - col_top)
                share = (share + col_others / col_total) / 2
                from_row = tl.where(sends, 0.5 / total, 0.0).to(tl.float32)
                from_col = tl.where(sends, 0.5 / col_total, 0.0).to(tl.float32)
                soft = soft * from_row[:, None] + col_soft * from_col[None, :]
                # Back to at most 1, which keeps small weights out of the subnormal numbers of float16.
                peak = tl.max(soft, 1)
                soft = soft * tl.where(peak > 0, 1 / peak, 0.0)[:, None]
                factor = peak.to(tl.float64)

        if ATTENDS:
            largest = tl.max(scale, 0)
            weight = (soft * (scale * tl.where(largest > 0, 1 / largest, 1.0))[None, :]).to(low)
            factor = tl.where(sends, factor * tl.where(largest > 0, largest, 1.0), 0.0).to(tl.float32)[:, None]
            take = tl.where(sends, share * inv_target, 0.0).to(tl.float32)[:, None]
            pred_att = tl.zeros([BLOCK_M], tl.float64)
            diff_att = tl.zeros([BLOCK_M], tl.float64)
            att_att = tl.zeros([BLOCK_M], tl.float64)
            out = attention + (group * size + i)[:, None] * dim
            for first in range(0, dim, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                t = _load(target, i, target_row, d, target_dim, valid, dim)
                o = tl.dot(weight, t.to(low), input_precision="ieee")
                t = t.to(tl.float32)
                o = o * factor - t * take
                p = _load(pred, i, pred_row, d, pred_dim, valid, dim).to(tl.float32)
                pred_att += tl.sum(p * o, 1)
                diff_att += tl.sum((p - t) * o, 1)
                att_att += tl.sum(o * o, 1)
                tl.store(out + d[None, :], o, mask=inside[:, None] & (d < dim)[None, :])
            tl.store(row + _PRED_ATT * n, pred_att, mask=inside)
            tl.store(row + _DIFF_ATT * n, diff_att, mask=inside)
            tl.store(row + _ATT_ATT * n, att_att, mask=inside)

    # The scalars come back one row to a thread, and those of other threads are read.
    tl.debug_barrier()
    sums = _sum_rows(row, n, inside, tau, HAS_INFONCE=INFONCE >= 0, ATTENDS=ATTENDS and GRAM, BOTH=BOTH)
    if ONE_GROUP:
        _finish(
            sums, weights, values, gram, metrics, loss, tau_slope, mean, updates, calls, skipped, lambdas, most, tau,
            dim, anchor, update_every, gain, log_decay, MSE=MSE, COSINE=COSINE, INFONCE=INFONCE, SENDS=SENDS, GRAM=GRAM,
            WEIGHTING=WEIGHTING, UPDATE=UPDATE,
        )  # fmt: skip
    else:
        tl.store(partial + group * 16 + tl.arange(0, 16), sums)


@triton.jit(do_not_specialize=_NUMBERS)
def finish_kernel(
    partial,
    learned_tau,
    weights,
    values,
    gram,
    metrics,
    loss,
    tau_slope,
    mean,
    updates,
    calls,
    skipped,
    lambdas,
    most,
    tau,
    dim,
    groups,
    anchor,
    update_every,
    gain,
    log_decay,
    MSE: tl.constexpr,
    COSINE: tl.constexpr,
    INFONCE: tl.constexpr,
    SENDS: tl.constexpr,
    GRAM: tl.constexpr,
    WEIGHTING: tl.constexpr,
    UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of all groups, in order, and what follows from them."""
    if learned_tau is not None:
        tau = tl.load(learned_tau)
    k = tl.arange(0, 16)
    sums = tl.zeros([16], tl.float64)
    for first in range(0, groups, BLOCK):
        group = first + tl.arange(0, BLOCK)
        offsets = group.to(tl.int64)[:, None] * 16 + k[None, :]
        sums += tl.sum(tl.load(partial + offsets, mask=(group < groups)[:, None], other=0.0), 0)
    _finish(
        sums, weights, values, gram, metrics, loss, tau_slope, mean, updates, calls, skipped, lambdas, most, tau, dim,
        anchor, update_every, gain, log_decay, MSE=MSE, COSINE=COSINE, INFONCE=INFONCE, SENDS=SENDS, GRAM=GRAM,
        WEIGHTING=WEIGHTING, UPDATE=UPDATE,
    )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def backward_kernel(
    pred,
    target,
    attention,
    rows,
    grad,
    grad_tau,
    grad_loss,
    grad_values,
    weights,
    tau_slope,
    learned_tau,
    tau,
    size,
    dim,
    groups,
    pred_group,
    pred_row,
    pred_dim,
    target_group,
    target_row,
    target_dim,
    grad_group,
    grad_row,
    MSE: tl.constexpr,
    COSINE: tl.constexpr,
    INFONCE: tl.constexpr,
    SENDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """a p + b d + c o for one row, with the incoming gradients and the weights multiplied in: row_combine."""
    index = tl.program_id(0).to(tl.int64)
    group = index // size
    i = index % size
    n = (groups * size).to(tl.int64)
    row = rows + index
    if learned_tau is not None:
        tau = tl.load(learned_tau)
    mse = 0.0
    cosine = 0.0
    infonce = 0.0
    if MSE >= 0 and (SENDS >> MSE) & 1:
        mse = _incoming(grad_loss, grad_values, weights, MSE) * 2 / dim
    if COSINE >= 0 and (SENDS >> COSINE) & 1:
        cosine = _incoming(grad_loss, grad_values, weights, COSINE)
    if INFONCE >= 0 and (SENDS >> INFONCE) & 1:
        infonce = _incoming(grad_loss, grad_values, weights, INFONCE)
        if grad_tau is not None and index == 0:
            tl.store(grad_tau, infonce * tl.load(tau_slope))
        infonce /= tau
    weight = tl.load(row + _WEIGHT * n)
    inv_pred = tl.load(row + _INV_PRED * n)
    inv_target = tl.load(row + _INV_TARGET * n)
    excess = tl.load(row + _EXCESS * n)
    one_minus_cos = tl.load(row + _ONE_MINUS_COS * n)
    counts = weight != 0
    cosine = tl.where((inv_pred != 0) & (inv_target != 0), cosine * weight, 0.0)
    infonce = tl.where(inv_pred != 0, infonce * weight, 0.0)
    # Where the norms are so different that d would lose the smaller vector, the cosine's part is given by p and t.
    similar = tl.abs(excess) < 0.5
    to_pred = tl.where(similar, -(one_minus_cos + excess), 1 - one_minus_cos) * cosine * inv_pred * inv_pred
    to_other = cosine * inv_pred * inv_target
    to_diff = (mse * weight + tl.where(similar, to_other, 0.0)).to(tl.float32)
    to_target = tl.where(similar, 0.0, -to_other).to(tl.float32)
    if INFONCE >= 0 and (SENDS >> INFONCE) & 1:
        to_pred -= infonce * inv_pred * inv_pred * inv_pred * tl.load(row + _PRED_ATT * n)
    to_pred = to_pred.to(tl.float32)
    to_att = (infonce * inv_pred).to(tl.float32)
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        inside = d < dim
        at = d.to(tl.int64)
        # A masked row may hold NaN: it is not read.
        p = tl.load(pred + group * pred_group + i * pred_row + at * pred_dim, mask=inside & counts, other=0.0)
        t = tl.load(target + group * target_group + i * target_row + at * target_dim, mask=inside & counts, other=0.0)
        p = p.to(tl.float32)
        t = t.to(tl.float32)
        g = to_pred * p + to_diff * (p - t) + to_target * t
        if INFONCE >= 0 and (SENDS >> INFONCE) & 1:
            g += to_att * tl.load(attention + index * dim + at, mask=inside & counts, other=0.0)
        tl.store(grad + group * grad_group + i * grad_row + at, g.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _incoming(grad_loss, grad_values, weights, place: tl.constexpr):
    """The gradient of a value in float64: what comes through the loss, and what comes to the value itself."""
    incoming = tl.zeros([], tl.float64)
    if grad_loss is not None:
        incoming += tl.load(grad_loss).to(tl.float64) * tl.load(weights + place)
    if grad_values is not None:
        incoming += tl.load(grad_values + place)
    return incoming
