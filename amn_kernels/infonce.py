"""InfoNCE in the algorithm: blocks of keys, from here or from other processes, past chunks of rows.

Blocks of keys are the outer loop and chunks of rows the inner one, because a block that comes from elsewhere passes by
once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from amn_kernels.options import LossOptions
from amn_kernels.primitives import (
    COLUMN_SUMS,
    Attention,
    InfonceForm,
    Pairs,
    Primitives,
    Row,
    Temperature,
)
from amn_kernels.products import multiply, weight_dtype
from amn_kernels.rows import CHUNK_ROWS, Chunk, Rows

MIN_BLOCK_KEYS = 64


def _even(count: int, most: int) -> int:
    """The size of blocks of at most `most` that `count` keys make: about even, as a small last block is slow."""
    size = math.ceil(count / math.ceil(count / most))
    return min(most, math.ceil(size / MIN_BLOCK_KEYS) * MIN_BLOCK_KEYS)


@dataclass
class Keys:
    """A block of keys for the rows of G groups, and what is gathered for them as they pass by the rows."""

    keys: Tensor  # [G, K, D]
    scale: Tensor  # [G, K] 1/|k|, negative for no key
    ids: Tensor | None = None  # [G, K] int64
    own: bool = False
    """Whether key j is the own key of row j."""
    sums: Tensor | None = None
    """[3, G, K] float64: COL_MAX, COL_OTHERS, COL_POSITIVE_SUM, where columns are summed."""
    cols: Tensor | None = None
    """[2, G, K] what softmax_weights_ needs of the columns."""
    attention: Tensor | None = None
    """[G, K, D] weighted sum of the rows, for keys that need a gradient; [1, K, D] for keys that all groups share."""


class Exchange:
    """What the algorithm needs of other processes; this one is for a process alone."""

    size = 1

    def blocks(self, own: Keys, further: list[Keys]) -> Iterator[Keys]:
        """The blocks of keys that a group's rows see; what is gathered for the own one is home at the end."""
        yield own
        yield from further

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes."""
        return x

    def merge_moments(self, moments: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:  # [MOMENTS, D], [1]
        """Moments and number of the rows of all processes."""
        return moments, count


class Infonce:
    """InfoNCE of the rows of some groups; `budget` is the number of similarities to hold at a time."""

    def __init__(
        self,
        prim: Primitives,
        exchange: Exchange,
        options: LossOptions,
        form: InfonceForm,
        tau: Temperature,
        p: Rows,
        t: Rows,
        whole: Chunk,  # the groups
        rows: Tensor,  # [scalars, N]
        own: Keys,
        extra: Keys | None,
        budget: int,
    ):
        self.prim, self.exchange, self.form, self.tau = prim, exchange, form, tau
        self.p, self.t, self.whole, self.rows, self.own, self.extra = p, t, whole, rows, own, extra
        self.margin, self.real = options.false_negative_margin, own.scale.dtype
        self.groups, self.size = own.scale.shape
        self.further = []
        if extra is not None:  # every group sees them
            keys, shared = extra.keys.expand(self.groups, -1, -1), extra.scale.expand(self.groups, -1)
            self.further = [Keys(keys, shared, attention=extra.attention)]
        # All similarities at once, or those of a chunk of rows with a part of a block.
        widest = max(block.keys.shape[1] for block in (own, *self.further))
        fits = self.groups * self.size * widest <= budget
        self.chunk_rows = self.size if fits else min(CHUNK_ROWS, self.size)
        self.block_keys = max(MIN_BLOCK_KEYS, budget // (self.groups * self.chunk_rows))
        self.kept = [] if fits and exchange.size == 1 else None

    def run(self, attention: Tensor) -> None:  # [N, D], or [0, D] where no row needs its o
        """Fill in the softmax scalars of the rows, their o, and what the keys gather."""
        gathers = any(block.attention is not None for block in (self.own, *self.further))
        if self.form.both or self.form.positives_by_id or gathers:
            self._general(attention)
        else:
            self._plain(attention)

    def _plain(self, attention: Tensor) -> None:
        """One round: blocks merge as they pass by."""
        attends = len(attention) > 0
        for number, block in enumerate(self.exchange.blocks(self.own, self.further)):
            for chunk in self._chunks():
                queries, rows = self.p.of(chunk), self.rows[:, chunk.numbers]
                for first, keys in self._parts(block):
                    logits, pairs = self._similarities(chunk, queries, keys)
                    weights, rescale = self._weights(logits, queries, keys), logits.new_empty(rows.shape[1], 1)
                    own = self._own(block, chunk, first)
                    self.prim.softmax_rows_(logits, keys.scale, rows, rescale, pairs, own, self.tau, weights)
                    if attends:
                        out, merges = chunk.view(attention), number > 0 or first > 0
                        if merges:
                            out.mul_(rescale.view(self.groups, -1, 1))
                        multiply(out, weights, keys.keys, merges)
                    del logits, pairs, weights  # before there are the next ones
        if attends:
            self._dots(attention, Attention.UNNORMALISED)

    def _general(self, attention: Tensor) -> None:
        """Two rounds: sums of rows and columns, then the normalised weights."""
        gathered, self.own.attention = self.own.attention, None  # only the second round gathers
        if self.form.both:
            self.own.sums = self.rows.new_zeros(3, *self.own.scale.shape)
            self.own.sums[0].fill_(-torch.inf)
        gathers = gathered is not None or any(block.attention is not None for block in self.further)
        attends = len(attention) > 0 or gathers
        for block in self.exchange.blocks(self.own, self.further):
            for chunk in self._chunks():
                queries = self.p.of(chunk)
                for first, keys in self._parts(block):
                    logits, pairs = self._similarities(chunk, queries, keys)
                    rows, own = self.rows[:, chunk.numbers], self._own(block, chunk, first)
                    self.prim.softmax_stats_(logits, keys.scale, rows, pairs, self.form, own, self.tau)
                    if keys.sums is not None:
                        self.prim.softmax_cols(logits, keys.sums, pairs, self.form)
                    if attends and self.kept is not None:
                        self.kept.append((logits, pairs))
                    del logits, pairs  # before there are the next ones
        own_rows = self.rows[:, self.whole.numbers]
        if self.form.both:
            for row, sums in zip(COLUMN_SUMS, self.own.sums, strict=True):
                own_rows[row].copy_(sums.view(-1))
            self.own.sums = None
        if not attends:
            return
        if self.form.both:
            self.own.cols = self.own.scale.new_empty(2, *self.own.scale.shape)
            self.prim.col_factors(own_rows, self.own.cols.view(2, -1), self.tau)
        self.own.attention = gathered
        kept = None if self.kept is None else iter(self.kept)
        for number, block in enumerate(self.exchange.blocks(self.own, self.further)):
            for chunk in self._chunks():
                queries, rows = self.p.of(chunk), self.rows[:, chunk.numbers]
                for first, keys in self._parts(block):
                    logits, pairs = self._similarities(chunk, queries, keys) if kept is None else next(kept)
                    weights, own = self._weights(logits, queries, keys), self._own(block, chunk, first)
                    cols = logits.new_empty(2, self.groups, 0) if keys.cols is None else keys.cols
                    self.prim.softmax_weights_(
                        logits, keys.scale, rows, cols, pairs, self.form, own, kept is None, self.tau, weights
                    )
                    if len(attention):
                        multiply(chunk.view(attention), weights, keys.keys, number > 0 or first > 0)
                    if keys.attention is not None:
                        self._gather(keys.attention, weights, queries, chunk.view(self.rows[Row.INV_PRED]))
                    del logits, pairs, weights
        if len(attention):
            self._dots(attention, Attention.NORMALISED)

    def _chunks(self) -> Iterator[Chunk]:
        """The rows of the groups, all at once or some of one group."""
        first, size = self.whole.groups.start, self.size
        for begin in range(0, size, self.chunk_rows):
            end = min(size, begin + self.chunk_rows)
            last = self.whole.groups.stop - 1
            yield Chunk(self.whole.groups, begin, end, slice(first * size + begin, last * size + end))

    def _parts(self, block: Keys) -> Iterator[tuple[int, Keys]]:
        """The block in parts whose similarities with a chunk fit the budget, each with its first key's number."""
        count = block.keys.shape[1]
        width = _even(count, self.block_keys)
        for first in range(0, count, width):
            part = slice(first, first + width)
            yield (
                first,
                Keys(
                    block.keys[:, part],
                    block.scale[:, part],
                    None if block.ids is None else block.ids[:, part],
                    block.own,
                    *(None if x is None else x[:, :, part] for x in (block.sums, block.cols)),
                    None if block.attention is None else block.attention[:, part],
                ),
            )

    def _similarities(self, chunk: Chunk, queries: Tensor, keys: Keys) -> tuple[Tensor, Pairs]:  # [G, M, K]
        logits = torch.empty(*queries.shape[:2], keys.keys.shape[1], dtype=self.real, device=queries.device)
        multiply(logits, queries, keys.keys.mT)
        row_ids = None if keys.ids is None else self.own.ids[:, chunk.begin : chunk.end].reshape(-1)
        guide = None
        if self.margin is not None:
            guide = torch.empty_like(logits)
            multiply(guide, self.t.of(chunk), keys.keys.mT)
        return logits, Pairs(row_ids, keys.ids, guide, -1.0 if self.margin is None else self.margin)

    def _weights(self, logits: Tensor, queries: Tensor, keys: Keys) -> Tensor:
        """Where weights go: in place, unless the product takes another dtype."""
        dtype = weight_dtype(queries, keys.keys, self.real)
        return logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)

    def _own(self, block: Keys, chunk: Chunk, first: int) -> int:
        """Column of the own key of a chunk's first row; out of reach in a block that has none."""
        return chunk.begin - first if block.own else -self.size

    def _gather(self, attention: Tensor, weights: Tensor, queries: Tensor, inv_pred: Tensor) -> None:
        """Add the weighted unit rows to what keys gather."""
        units = (queries * inv_pred.to(self.real).unsqueeze(-1)).to(weights.dtype)
        if len(attention) != len(weights):  # keys of all groups
            weights, units = weights.flatten(0, 1).unsqueeze(0), units.flatten(0, 1).unsqueeze(0)
        multiply(attention, weights.mT, units, accumulate=True)

    def _dots(self, attention: Tensor, held: Attention) -> None:
        for chunk in [self.whole] if self.p.direct and self.t.direct else self._chunks():
            rows, out = self.rows[:, chunk.numbers], chunk.view(attention)
            self.prim.row_dots(self.p.of(chunk), self.t.of(chunk), out, rows, held, self.form, self.tau)
