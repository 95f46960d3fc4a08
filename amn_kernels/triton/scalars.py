"""Numbers per row and per column, and the small formulas that the kernels share: csrc/types.h in Triton.

Row scalars are float64 [scalars, N] with unit stride along N; ``i`` are row numbers, int64, so that offsets are 64-bit.
"""

import triton
import triton.language as tl

from amn_kernels.primitives import Row

WEIGHT = tl.constexpr(int(Row.WEIGHT))
INV_PRED = tl.constexpr(int(Row.INV_PRED))
INV_TARGET = tl.constexpr(int(Row.INV_TARGET))
EXCESS = tl.constexpr(int(Row.EXCESS))
ONE_MINUS_COS = tl.constexpr(int(Row.ONE_MINUS_COS))
PRED_PRED = tl.constexpr(int(Row.PRED_PRED))
TARGET_TARGET = tl.constexpr(int(Row.TARGET_TARGET))
DIFF_DIFF = tl.constexpr(int(Row.DIFF_DIFF))
PRED_DIFF = tl.constexpr(int(Row.PRED_DIFF))
MAX = tl.constexpr(int(Row.MAX))
OTHERS = tl.constexpr(int(Row.OTHERS))
KEYS = tl.constexpr(int(Row.KEYS))
PRED_ATT = tl.constexpr(int(Row.PRED_ATT))
DIFF_ATT = tl.constexpr(int(Row.DIFF_ATT))
ATT_ATT = tl.constexpr(int(Row.ATT_ATT))
COL_MAX = tl.constexpr(int(Row.COL_MAX))
COL_OTHERS = tl.constexpr(int(Row.COL_OTHERS))
POSITIVES = tl.constexpr(int(Row.POSITIVES))
POSITIVE_SUM = tl.constexpr(int(Row.POSITIVE_SUM))
COL_POSITIVE_SUM = tl.constexpr(int(Row.COL_POSITIVE_SUM))
NEGATIVE_MAX = tl.constexpr(int(Row.NEGATIVE_MAX))
PRED_SPREAD = tl.constexpr(int(Row.PRED_SPREAD))
PRED_MOMENT = tl.constexpr(int(Row.PRED_MOMENT))
DIFF_MOMENT = tl.constexpr(int(Row.DIFF_MOMENT))
ATT_MOMENT = tl.constexpr(int(Row.ATT_MOMENT))
MOMENT_MOMENT = tl.constexpr(int(Row.MOMENT_MOMENT))
DIFF_VARIANCE = tl.constexpr(int(Row.DIFF_VARIANCE))
ATT_VARIANCE = tl.constexpr(int(Row.ATT_VARIANCE))
MOMENT_VARIANCE = tl.constexpr(int(Row.MOMENT_VARIANCE))
VARIANCE_VARIANCE = tl.constexpr(int(Row.VARIANCE_VARIANCE))

# enum Column in csrc/types.h.
MOMENT_A, MOMENT_C, MOMENT_PRED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MOMENT_C_TARGET, MOMENT_TARGET = tl.constexpr(3), tl.constexpr(4)
VARIANCE_V, VARIANCE_UNIT = tl.constexpr(5), tl.constexpr(6)

SIZES = [
    *("count", "size", "own", "id_keys", "col_keys", "blocks", "splits", "part_count", "rows_of_split", "m"),
    *("stride", "rows_stride", "mirrored_stride", "sums_stride", "sums_group", "cols_stride", "cols_group"),
    *("scale_group", "ids_group", "update_every"),
]
"""Arguments for whose values a kernel is not compiled anew: what changes from call to call and decides no wide load."""

EPS = tl.constexpr(1e-8)  # a norm below this counts as zero
LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def get(rows, stride, which: tl.constexpr, i, mask):
    """Scalar `which` of the rows; 0 where masked off."""
    return tl.load(rows + (tl.cast(stride, tl.int64) * which + i), mask=mask, other=0.0)


@triton.jit
def put(rows, stride, which: tl.constexpr, i, value, mask):
    """Write scalar `which` of the rows."""
    tl.store(rows + (tl.cast(stride, tl.int64) * which + i), value, mask=mask)


@triton.jit
def column(columns, which: tl.constexpr, k, dim):
    """Numbers `which` of moments or columns [numbers, D], [BLOCK_D]."""
    return tl.load(columns + which * dim + k, mask=k < dim, other=0.0)


@triton.jit
def offset_in_group(group, r, group_stride, row_stride):
    """Where row r of a group begins, in 64 bits; r itself may have 32, which comparisons are cheaper in."""
    return group * group_stride + r.to(tl.int64) * row_stride


@triton.jit
def row_offset(i, size, group_stride, row_stride):
    """Where row i of [G, M, D] begins; its rows are numbered group after group, M = size."""
    return offset_in_group(i // size, i % size, group_stride, row_stride)


@triton.jit
def load_rows(x, offset, k, dim, mask):
    """Elements [BLOCK_M, BLOCK_D] of rows that begin at `offset`, widened to float32; 0 where masked off."""
    inside = mask[:, None] & (k < dim)[None, :]
    return tl.load(x + (offset[:, None] + k[None, :]), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def row_sum(x):
    """Sum along a row of a block; blocks of a row are added in float64."""
    return tl.sum(x, axis=1).to(tl.float64)


@triton.jit
def temperature(number, learned):
    """τ in float64: a number, or read on the device where it is learned."""
    tau = number
    if learned is not None:
        tau = tl.load(learned).to(tl.float64)
    return tau


@triton.jit
def inverse_norm(square):
    """0 for a zero vector; NaN for a norm that is not finite, so that it can't pass for a zero vector."""
    norm = tl.sqrt(square)
    return tl.where(norm < EPS, 0.0, tl.where(norm < float("inf"), 1.0 / norm, float("nan")))


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 in float64: Goldberg 1991, theorem 4."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.where(y < float("inf"), x * (tl.log(y) / (y - 1.0)), y))


@triton.jit
def power_of_two(x):
    """The largest power of two up to x >= 0 in float32; 0 for 0. What is multiplied by it keeps all its digits."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def sends(rows, stride, i, counts):
    """Whether the row sends a gradient from cosine and InfoNCE: it counts, and neither vector is zero."""
    inv_pred, inv_target = get(rows, stride, INV_PRED, i, counts), get(rows, stride, INV_TARGET, i, counts)
    return counts & (inv_pred != 0) & (inv_target != 0)


@triton.jit
def own_logit(rows, stride, i, mask, tau):
    """s_ii in float64."""
    return (1.0 - get(rows, stride, ONE_MINUS_COS, i, mask)) / tau


@triton.jit
def share_of_others(top, others, own):
    """others / (others + own) of a softmax; without any, the maximum is -inf and the share 0."""
    return others / (others + tl.exp(own - top))


@triton.jit
def exp_below(s, shift):
    """exp(s - shift) for s <= shift, which may be -inf where all s are; recomputed logits may exceed it by rounding."""
    x = s - tl.where(shift == LOWEST, 0.0, shift)
    return tl.exp(tl.where(x > 0, 0.0, x))
