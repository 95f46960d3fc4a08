"""Tensors to launches: `amn_kernels.primitives.Primitives` on a CUDA device. Contract: csrc/primitives.h.

Rows come in their own dtypes and strides and are widened in the kernels; masked ones are not read.
"""

import math

import torch
import triton
from torch import Tensor

from amn_kernels.options import DEFAULT_CHUNK_BYTES, FUSED_TERMS
from amn_kernels.primitives import MOMENTS, Attention, InfonceForm, Pairs, Temperature, TermList
from amn_kernels.triton.balance import balance_kernel
from amn_kernels.triton.columns import (
    col_dots_kernel,
    col_stats_kernel,
    col_terms_kernel,
    merge_moments_kernel,
)
from amn_kernels.triton.launching import (
    COLUMN_TILE,
    FLAT_TILE,
    MOMENT_TILE,
    launch,
    logits_tile,
    row_tile,
    strides,
)
from amn_kernels.triton.mirror import mirror_columns_kernel, mirror_rows_kernel
from amn_kernels.triton.row_combine import row_combine_kernel
from amn_kernels.triton.row_dots import row_dots_kernel
from amn_kernels.triton.row_stats import row_stats_kernel
from amn_kernels.triton.softmax import softmax_rows_kernel, softmax_stats_kernel, softmax_weights_kernel
from amn_kernels.triton.softmax_cols import col_factors_kernel, softmax_cols_kernel
from amn_kernels.triton.term_sums import FINISH_BLOCKS, SLOTS, finish_sums_kernel, sum_rows_kernel

ROWS_OF_SPLIT = 512
"""Rows whose column moments one program gathers: 65,536 rows of 768 columns are then 1,536 programs."""


def _groups(x: Tensor) -> tuple[int, int]:
    """Number of groups and of the rows of each, of [G, M, D] or [M, D]."""
    return (x.shape[0] if x.dim() == 3 else 1), x.shape[-2]


def _pairs(pairs: Pairs) -> tuple[tuple, tuple, tuple]:
    """The tensors of the pairs, their sizes, and the strides, as kernels take them."""
    ids, guide = pairs.key_ids, pairs.guide
    id_keys = 0 if ids is None else ids.shape[-1]
    ids_group = 0 if ids is None or ids.dim() == 1 else ids.stride(0)
    return (pairs.row_ids, ids, guide), (id_keys,), (ids_group, *((0, 0) if guide is None else strides(guide)))


class TritonPrimitives:
    """The primitives as Triton kernels. All launch on the current device and its current stream."""

    reads_any_dtype = True
    # Similarities of 1,024 rows with 16,384 keys. Both directions are worth more: what fits is not computed twice.
    chunk_bytes = DEFAULT_CHUNK_BYTES["triton"]

    def row_stats(self, pred, target, rows, key_scale, form: InfonceForm) -> None:  # noqa: D102
        groups, size = _groups(pred)
        count, dim = groups * size, pred.shape[-1]
        tile = row_tile(dim)
        launch(
            row_stats_kernel,
            triton.cdiv(count, tile.rows),
            *(pred, target, rows, key_scale, count, size, dim),
            *(*strides(pred), *strides(target), rows.stride(0), key_scale.stride(0) if key_scale.dim() == 2 else 0),
            *form,
            BLOCK_M=tile.rows,
            BLOCK_D=tile.cols,
            warps=tile.warps,
        )

    def softmax_rows_(  # noqa: D102
        self, logits, key_scale, rows, rescale, pairs: Pairs, own: int, tau: Temperature, weights
    ) -> None:
        groups, size = _groups(logits)
        tensors, sizes, pair_strides = _pairs(pairs)
        tile = logits_tile(logits.shape[-1])
        launch(
            softmax_rows_kernel,
            groups * triton.cdiv(size, tile.rows),
            *(logits, weights, key_scale, rows, rescale, *tensors, tau.learned, pairs.margin, tau.number),
            *(own, size, logits.shape[-1], *sizes, *strides(logits), *strides(weights)),
            *(key_scale.stride(0) if key_scale.dim() == 2 else 0, rows.stride(0), *pair_strides),
            BLOCK_M=tile.rows,
            BLOCK_K=tile.cols,
            warps=tile.warps,
        )

    def softmax_stats_(  # noqa: D102
        self, logits, key_scale, rows, pairs: Pairs, form: InfonceForm, own: int, tau: Temperature
    ) -> None:
        groups, size = _groups(logits)
        tensors, sizes, pair_strides = _pairs(pairs)
        tile = logits_tile(logits.shape[-1])
        launch(
            softmax_stats_kernel,
            groups * triton.cdiv(size, tile.rows),
            *(logits, key_scale, rows, *tensors, tau.learned, pairs.margin, tau.number),
            *(own, size, logits.shape[-1], *sizes, *strides(logits)),
            *(key_scale.stride(0) if key_scale.dim() == 2 else 0, rows.stride(0), *pair_strides),
            BY_ID=form.positives_by_id,
            BLOCK_M=tile.rows,
            BLOCK_K=tile.cols,
            warps=tile.warps,
        )

    def softmax_cols(self, logits, sums, pairs: Pairs, form: InfonceForm) -> None:  # noqa: D102
        groups, size = _groups(logits)
        cols = sums.shape[-1]
        tensors, sizes, pair_strides = _pairs(pairs)
        launch(
            softmax_cols_kernel,
            groups * triton.cdiv(cols, COLUMN_TILE.cols),
            *(logits, sums, *tensors[:2], size, cols, *sizes, *strides(logits)),
            *(sums.stride(0), sums.stride(1), pair_strides[0]),
            BY_ID=form.positives_by_id,
            BLOCK_R=COLUMN_TILE.rows,
            BLOCK_C=COLUMN_TILE.cols,
            warps=COLUMN_TILE.warps,
        )

    def col_factors(self, key_rows, cols, tau: Temperature) -> None:  # noqa: D102
        count = key_rows.shape[1]
        launch(
            col_factors_kernel,
            triton.cdiv(count, FLAT_TILE.cols),
            *(key_rows, cols, tau.learned, tau.number, count, key_rows.stride(0), cols.stride(0)),
            BLOCK=FLAT_TILE.cols,
            warps=FLAT_TILE.warps,
        )

    def softmax_weights_(  # noqa: D102
        self, logits, key_scale, rows, cols, pairs: Pairs, form: InfonceForm, own: int, raw: bool, tau: Temperature,
        weights,
    ) -> None:  # fmt: skip
        groups, size = _groups(logits)
        tensors, sizes, pair_strides = _pairs(pairs)
        tile = logits_tile(logits.shape[-1])
        col_keys = cols.shape[-1]
        launch(
            softmax_weights_kernel,
            groups * triton.cdiv(size, tile.rows),
            *(logits, weights, key_scale, rows, cols, *tensors, tau.learned, pairs.margin, tau.number),
            *(own, size, logits.shape[-1], *sizes, col_keys, *strides(logits), *strides(weights)),
            *(key_scale.stride(0) if key_scale.dim() == 2 else 0, cols.stride(0), cols.stride(1)),
            *(rows.stride(0), *pair_strides),
            BOTH=form.both,
            HAS_COLS=form.both and col_keys > 0,
            BY_ID=form.positives_by_id,
            RAW=raw,
            BLOCK_M=tile.rows,
            BLOCK_K=tile.cols,
            warps=tile.warps,
        )

    def row_dots(self, pred, target, attention, rows, held: Attention, form: InfonceForm, tau: Temperature) -> None:  # noqa: D102
        groups, size = _groups(pred)
        count, dim = groups * size, pred.shape[-1]
        tile = row_tile(dim)
        launch(
            row_dots_kernel,
            triton.cdiv(count, tile.rows),
            *(pred, target, attention, rows, tau.learned, tau.number, count, size, dim),
            *(*strides(pred), *strides(target), *strides(attention), rows.stride(0)),
            HELD=int(held),
            BOTH=form.both,
            BY_ID=form.positives_by_id,
            BLOCK_M=tile.rows,
            BLOCK_D=tile.cols,
            warps=tile.warps,
        )

    def col_stats(self, pred, target, rows, moments, count) -> None:  # noqa: D102
        groups, size = _groups(pred)
        rows_in_all, dim = groups * size, pred.shape[-1]
        splits = triton.cdiv(rows_in_all, ROWS_OF_SPLIT)
        # The running moments are the first part.
        parts = torch.empty(splits + 1, MOMENTS, dim, dtype=moments.dtype, device=moments.device)
        counted = torch.empty(splits + 1, dtype=moments.dtype, device=moments.device)
        parts[0].copy_(moments)
        counted[:1].copy_(count)
        launch(
            col_stats_kernel,
            splits * triton.cdiv(dim, MOMENT_TILE.cols),
            *(pred, target, rows, parts[1:], counted[1:], rows_in_all, size, dim, ROWS_OF_SPLIT),
            *(*strides(pred), *strides(target), rows.stride(0)),
            BLOCK_R=MOMENT_TILE.rows,
            BLOCK_C=MOMENT_TILE.cols,
            warps=MOMENT_TILE.warps,
            contracts=False,  # p/|p| has to be rounded before its mean is taken from it
        )
        launch(
            merge_moments_kernel,
            MOMENTS * triton.cdiv(dim, FLAT_TILE.cols),
            *(parts, counted, moments, count, splits + 1, dim),
            BLOCK=FLAT_TILE.cols,
            warps=FLAT_TILE.warps,
            registers=64,  # left to itself, the assembler stops at 32 for sm_100 and spills 8 bytes
        )

    def col_terms(self, moments, count, gamma: float, columns, values) -> None:  # noqa: D102
        launch(
            col_terms_kernel,
            1,
            *(moments, count, columns, values, gamma, moments.shape[1]),
            BLOCK=FLAT_TILE.cols,
            warps=FLAT_TILE.warps,
        )

    def col_dots(self, pred, target, attention, columns, rows) -> None:  # noqa: D102
        groups, size = _groups(pred)
        count, dim = groups * size, pred.shape[-1]
        tile = row_tile(dim)
        has_attention = attention.numel() > 0
        # Eight sums a row: with 8 elements of each row a thread, as elsewhere, they would leave a third of the warps.
        launch(
            col_dots_kernel,
            triton.cdiv(count, tile.rows),
            *(pred, target, attention if has_attention else None, columns, rows, count, size, dim),
            *(*strides(pred), *strides(target), *(strides(attention) if has_attention else (0, 0)), rows.stride(0)),
            BLOCK_M=tile.rows,
            BLOCK_D=tile.cols,
            warps=2 * tile.warps,
        )

    def term_sums(  # noqa: D102
        self, rows, col_values, terms: TermList, form: InfonceForm, dim: int, tau: Temperature, values, gram, metrics
    ) -> None:
        count = rows.shape[1]
        blocks = triton.cdiv(count, FLAT_TILE.cols)
        partial = torch.empty(SLOTS, blocks, dtype=rows.dtype, device=rows.device)
        has_gram, has_infonce = gram.numel() > 0, "infonce" in terms.names
        launch(
            sum_rows_kernel,
            blocks,
            *(rows, partial, tau.learned, tau.number, count, rows.stride(0), blocks),
            HAS_INFONCE=has_infonce,
            HAS_GRAM=has_gram,
            ATTENDS=has_gram and terms.sends("infonce"),
            COLUMNS=has_gram and (terms.sends("moment") or terms.sends("variance")),
            BOTH=form.both,
            BY_ID=form.positives_by_id,
            BLOCK=FLAT_TILE.cols,
            warps=FLAT_TILE.warps,
        )
        launch(
            finish_sums_kernel,
            1,
            *(partial, col_values if col_values.numel() else None, values, gram if has_gram else None, metrics),
            *(tau.learned, tau.number, dim, blocks),
            LIST=tuple(terms.ids),
            SENDS=tuple(bool(sends) for sends in terms.differentiable),
            HAS_INFONCE=has_infonce,
            BLOCK=FINISH_BLOCKS,
            warps=FLAT_TILE.warps,
        )

    def row_combine(  # noqa: D102
        self, grad_values, pred, target, attention, columns, rows, terms: TermList, tau: Temperature, grad
    ) -> None:
        groups, size = _groups(pred)
        count, dim = groups * size, pred.shape[-1]
        tile = row_tile(dim)
        has_attention, has_columns = attention.numel() > 0, columns.numel() > 0
        places = {name.upper(): terms.names.index(name) if terms.sends(name) else -1 for name in FUSED_TERMS}
        launch(
            row_combine_kernel,
            triton.cdiv(count, tile.rows),
            *(None, None, grad_values, pred, target),
            *(attention if has_attention else None, columns if has_columns else None),
            *(rows, tau.learned, grad, tau.number, count, size, dim, *strides(pred), *strides(target)),
            *(*(strides(attention) if has_attention else (0, 0)), *strides(grad), rows.stride(0)),
            **places,
            BLOCK_M=tile.rows,
            BLOCK_D=tile.cols,
            warps=2 * tile.warps if has_columns else tile.warps,
        )

    def mirror_rows(self, rows, mirrored) -> None:  # noqa: D102
        count = rows.shape[1]
        launch(
            mirror_rows_kernel,
            triton.cdiv(count, FLAT_TILE.cols),
            *(rows, mirrored, count, rows.stride(0), mirrored.stride(0)),
            BLOCK=FLAT_TILE.cols,
            warps=FLAT_TILE.warps,
        )

    def mirror_columns(self, columns, mirrored) -> None:  # noqa: D102
        dim = columns.shape[1]
        launch(
            mirror_columns_kernel,
            triton.cdiv(dim, FLAT_TILE.cols),
            *(columns, mirrored, dim),
            BLOCK=FLAT_TILE.cols,
            warps=FLAT_TILE.warps,
        )


def balance(
    values: Tensor,  # [m]
    gram: Tensor | None,  # [m, m]
    mean: Tensor,
    updates: Tensor,
    calls: Tensor,
    skipped: Tensor,
    lambdas: Tensor,
    most: Tensor,
    anchor: int,
    decay: float,
    update_every: int,
    by_value: bool,
    update: bool,
) -> Tensor:  # [m]
    """The twin of `amn_kernels.reference.balance.balance` in one launch, with its arguments."""
    weights = torch.empty_like(values)
    m = len(values)
    observed, step = (values, 1) if by_value else (gram, m + 1)
    with torch.cuda.device_of(values):
        launch(
            balance_kernel,
            1,
            *(observed, mean, updates, calls, skipped, lambdas, most, weights),
            *(decay, math.log(decay) if decay > 0 else -math.inf, update_every, m, step, anchor, by_value, update),
            BLOCK=triton.next_power_of_2(m),
            warps=1,
        )
    return weights
