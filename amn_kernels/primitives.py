"""The primitives of csrc/primitives.h in Python: what `amn_kernels.algorithm` is written over.

Shapes, dtypes and formulas are documented there; names and order of arguments are the same. Tensors that a primitive
fills are given to it.
"""

import enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from amn_kernels.options import DEFAULT_CHUNK_BYTES, FUSED_TERMS

_ROWS = (
    "weight inv_pred inv_target excess one_minus_cos pred_pred target_target diff_diff pred_diff max others keys "
    "pred_att diff_att att_att col_max col_others positives positive_sum col_positive_sum negative_max pred_spread "
    "pred_moment diff_moment att_moment moment_moment diff_variance att_variance moment_variance variance_variance"
)
Row = enum.IntEnum("Row", [name.upper() for name in _ROWS.split()], start=0)
"""Row scalars [len(Row), N] float64: enum RowScalar in csrc/types.h."""

COLUMN_SUMS = (Row.COL_MAX, Row.COL_OTHERS, Row.COL_POSITIVE_SUM)
"""What is gathered for a key as the rows pass by."""

PLAIN_ROWS = Row.COL_MAX
"""How many of them there are with plain options: kPlainRowScalars."""

_MOMENTS = (
    "mean_pred mean_target mean_diff mean_unit_pred mean_unit_target pred_pred target_target diff_diff diff_pred "
    "unit_pred unit_target"
)
Moment = enum.IntEnum("Moment", [name.upper() for name in _MOMENTS.split()], start=0)
"""Means and sums of products of the columns, [len(Moment), D] float64: enum Moment in csrc/types.h."""

MEANS = int(Moment.PRED_PRED)
"""The first moments, which are means."""
PRODUCTS = ((0, 0), (1, 1), (2, 2), (2, 0), (3, 3), (4, 4))
"""Moment MEANS + i is the sum of products of the two columns whose means are moments PRODUCTS[i]."""

MOMENTS, COLUMNS = len(Moment), 7
"""Numbers per column: kMoments and kColumns in csrc/types.h."""


class Attention(enum.IntEnum):
    """How the attention output is held before row_dots: enum Attention in csrc/types.h."""

    UNNORMALISED = 0
    NORMALISED = 1
    BY_KEY = 2


class InfonceForm(NamedTuple):
    """What is said of InfoNCE besides its temperature."""

    both: bool
    positives_by_id: bool


class Temperature(NamedTuple):
    """A number, or a 0-dim tensor where it is learned."""

    number: float
    learned: Tensor | None


class Pairs(NamedTuple):
    """Which keys of a block a row must leave out or take as positives, besides masked ones."""

    row_ids: Tensor | None  # [M] int64
    key_ids: Tensor | None  # [K] int64
    guide: Tensor | None  # [M, K]: t_i.k_j
    margin: float


class TermList(NamedTuple):
    """What is computed, and which of it sends a gradient."""

    names: tuple[str, ...]
    differentiable: tuple[bool, ...]

    @property
    def ids(self) -> list[int]:
        """The terms' numbers: enum Term in csrc/types.h."""
        return [FUSED_TERMS.index(name) for name in self.names]

    def sends(self, name: str) -> bool:
        """Whether the term is computed with a gradient."""
        return name in self.names and self.differentiable[self.names.index(name)]


class Primitives(Protocol):
    """What a device provides; see csrc/primitives.h. Matrices [M, D] may come as [G, M, D].

    `weights` is where the softmax leaves its weights [G, C, K]: the logits themselves, or a tensor of another dtype.
    `sums` are rows COL_MAX, COL_OTHERS, COL_POSITIVE_SUM of the keys, [3, G, K].
    """

    reads_any_dtype: bool
    """Whether rows are read in their own dtypes and masked ones not at all; else they come widened and zeroed."""
    chunk_bytes: dict[str, int]
    """Memory for similarities by direction, where the options don't say."""

    def row_stats(self, pred, target, rows, key_scale, form: InfonceForm) -> None: ...  # noqa: D102
    def softmax_rows_(  # noqa: D102
        self, logits, key_scale, rows, rescale, pairs: Pairs, own: int, tau: Temperature, weights
    ) -> None: ...
    def softmax_stats_(  # noqa: D102
        self, logits, key_scale, rows, pairs: Pairs, form: InfonceForm, own: int, tau: Temperature
    ) -> None: ...
    def softmax_cols(self, logits, sums, pairs: Pairs, form: InfonceForm) -> None: ...  # noqa: D102
    def col_factors(self, key_rows, cols, tau: Temperature) -> None: ...  # noqa: D102
    def softmax_weights_(  # noqa: D102
        self, logits, key_scale, rows, cols, pairs: Pairs, form: InfonceForm, own: int, raw: bool, tau: Temperature,
        weights,
    ) -> None: ...  # fmt: skip
    def row_dots(self, pred, target, attention, rows, held: Attention, form: InfonceForm, tau: Temperature) -> None: ...  # noqa: D102
    def col_stats(self, pred, target, rows, moments, count) -> None: ...  # noqa: D102
    def col_terms(self, moments, count, gamma: float, columns, values) -> None: ...  # noqa: D102
    def col_dots(self, pred, target, attention, columns, rows) -> None: ...  # noqa: D102
    def term_sums(  # noqa: D102
        self, rows, col_values, terms: TermList, form: InfonceForm, dim: int, tau: Temperature, values, gram, metrics
    ) -> None: ...
    def row_combine(  # noqa: D102
        self, grad_values, pred, target, attention, columns, rows, terms: TermList, tau: Temperature, grad
    ) -> None: ...
    def mirror_rows(self, rows, mirrored) -> None: ...  # noqa: D102
    def mirror_columns(self, columns, mirrored) -> None: ...  # noqa: D102


class CompiledPrimitives:
    """The compiled ones, as ops that csrc/primitive_ops.cpp registers."""

    reads_any_dtype = False
    chunk_bytes = DEFAULT_CHUNK_BYTES["cpu"]

    def __init__(self):
        self._ops = torch.ops.amn_kernels

    def row_stats(self, pred, target, rows, key_scale, form):  # noqa: D102
        self._ops._row_stats(pred, target, rows, key_scale, *form)

    def softmax_rows_(self, logits, key_scale, rows, rescale, pairs, own, tau, weights):  # noqa: D102
        self._ops._softmax_rows_(logits, key_scale, rows, rescale, *pairs, own, *tau)

    def softmax_stats_(self, logits, key_scale, rows, pairs, form, own, tau):  # noqa: D102
        self._ops._softmax_stats_(logits, key_scale, rows, *pairs, *form, own, *tau)

    def softmax_cols(self, logits, sums, pairs, form):  # noqa: D102
        rows = sums.new_zeros(len(Row), *sums.shape[1:])
        for row, of_keys in zip(COLUMN_SUMS, sums, strict=True):
            rows[row] = of_keys
        self._ops._softmax_cols(logits, rows.flatten(1), pairs.row_ids, pairs.key_ids, *form)
        for row, of_keys in zip(COLUMN_SUMS, sums, strict=True):
            of_keys.copy_(rows[row])

    def col_factors(self, key_rows, cols, tau):  # noqa: D102
        self._ops._col_factors(key_rows, cols, *tau)

    def softmax_weights_(self, logits, key_scale, rows, cols, pairs, form, own, raw, tau, weights):  # noqa: D102
        self._ops._softmax_weights_(logits, key_scale, rows, cols, *pairs, *form, own, raw, *tau)

    def row_dots(self, pred, target, attention, rows, held, form, tau):  # noqa: D102
        self._ops._row_dots(pred, target, attention, rows, held, *form, *tau)

    def col_stats(self, pred, target, rows, moments, count):  # noqa: D102
        self._ops._col_stats(pred, target, rows, moments, count)

    def col_terms(self, moments, count, gamma, columns, values):  # noqa: D102
        self._ops._col_terms(moments, count, gamma, columns, values)

    def col_dots(self, pred, target, attention, columns, rows):  # noqa: D102
        self._ops._col_dots(pred, target, attention, columns, rows)

    def term_sums(self, rows, col_values, terms, form, dim, tau, values, gram, metrics):  # noqa: D102
        self._ops._term_sums(
            rows, col_values, terms.ids, list(terms.differentiable), *form, dim, *tau, values, gram, metrics
        )

    def row_combine(self, grad_values, pred, target, attention, columns, rows, terms, tau, grad):  # noqa: D102
        self._ops._row_combine(
            grad_values, pred, target, attention, columns, rows, terms.ids, list(terms.differentiable), *tau, grad
        )

    def mirror_rows(self, rows, mirrored):  # noqa: D102
        self._ops._mirror_rows(rows, mirrored)

    def mirror_columns(self, columns, mirrored):  # noqa: D102
        self._ops._mirror_columns(columns, mirrored)
