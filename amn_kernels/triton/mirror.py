"""Kernels of mirror_rows and mirror_columns: pred and target exchanged, for the gradient of the target."""

import triton
import triton.language as tl

from amn_kernels.triton.scalars import (
    COL_MAX,
    COL_OTHERS,
    DIFF_DIFF,
    EXCESS,
    INV_PRED,
    INV_TARGET,
    KEYS,
    MAX,
    MOMENT_A,
    MOMENT_C,
    MOMENT_C_TARGET,
    MOMENT_PRED,
    MOMENT_TARGET,
    ONE_MINUS_COS,
    OTHERS,
    POSITIVE_SUM,
    POSITIVES,
    PRED_ATT,
    PRED_DIFF,
    PRED_PRED,
    PRED_SPREAD,
    SIZES,
    TARGET_TARGET,
    VARIANCE_UNIT,
    VARIANCE_V,
    WEIGHT,
    column,
    get,
    put,
)


@triton.jit
def copy(rows, stride, mirrored, mirrored_stride, which: tl.constexpr, i, inside):
    """A scalar that is the same either way."""
    put(mirrored, mirrored_stride, which, i, get(rows, stride, which, i, inside), inside)


@triton.jit(do_not_specialize=SIZES)
def mirror_rows_kernel(rows, mirrored, count, stride, mirrored_stride, BLOCK: tl.constexpr):
    """[scalars, N] -> [scalars, N], out."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    copy(rows, stride, mirrored, mirrored_stride, WEIGHT, i, inside)
    copy(rows, stride, mirrored, mirrored_stride, ONE_MINUS_COS, i, inside)
    copy(rows, stride, mirrored, mirrored_stride, DIFF_DIFF, i, inside)
    copy(rows, stride, mirrored, mirrored_stride, MAX, i, inside)
    copy(rows, stride, mirrored, mirrored_stride, OTHERS, i, inside)
    copy(rows, stride, mirrored, mirrored_stride, KEYS, i, inside)
    copy(rows, stride, mirrored, mirrored_stride, COL_MAX, i, inside)
    copy(rows, stride, mirrored, mirrored_stride, COL_OTHERS, i, inside)
    copy(rows, stride, mirrored, mirrored_stride, POSITIVES, i, inside)
    copy(rows, stride, mirrored, mirrored_stride, POSITIVE_SUM, i, inside)
    inv_pred, inv_target = get(rows, stride, INV_PRED, i, inside), get(rows, stride, INV_TARGET, i, inside)
    put(mirrored, mirrored_stride, INV_PRED, i, inv_target, inside)
    put(mirrored, mirrored_stride, INV_TARGET, i, inv_pred, inside)
    put(mirrored, mirrored_stride, PRED_PRED, i, get(rows, stride, TARGET_TARGET, i, inside), inside)
    put(mirrored, mirrored_stride, TARGET_TARGET, i, get(rows, stride, PRED_PRED, i, inside), inside)
    # t.(t - p) = d.d - p.d
    along = get(rows, stride, DIFF_DIFF, i, inside) - get(rows, stride, PRED_DIFF, i, inside)
    put(mirrored, mirrored_stride, PRED_DIFF, i, along, inside)
    # (|t| - |p|)/|p|; without both norms nothing reads it.
    known = inv_target != 0
    excess = -get(rows, stride, EXCESS, i, inside) * inv_pred / tl.where(known, inv_target, 1.0)
    put(mirrored, mirrored_stride, EXCESS, i, tl.where(known, excess, 0.0), inside)
    put(mirrored, mirrored_stride, PRED_SPREAD, i, 0.0, inside)
    put(mirrored, mirrored_stride, PRED_ATT, i, 0.0, inside)


@triton.jit(do_not_specialize=SIZES)
def mirror_columns_kernel(columns, mirrored, dim, BLOCK: tl.constexpr):  # [7, D] float32 -> [7, D], out
    """The columns with pred and target exchanged; no variance, which asks nothing of the target."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < dim
    out = mirrored + k
    tl.store(out + MOMENT_A * dim, -column(columns, MOMENT_A, k, dim), mask=inside)
    tl.store(out + MOMENT_C * dim, -column(columns, MOMENT_C_TARGET, k, dim), mask=inside)
    tl.store(out + MOMENT_PRED * dim, column(columns, MOMENT_TARGET, k, dim), mask=inside)
    tl.store(out + MOMENT_C_TARGET * dim, -column(columns, MOMENT_C, k, dim), mask=inside)
    tl.store(out + MOMENT_TARGET * dim, column(columns, MOMENT_PRED, k, dim), mask=inside)
    tl.store(out + VARIANCE_V * dim, 0.0, mask=inside)
    tl.store(out + VARIANCE_UNIT * dim, 0.0, mask=inside)
