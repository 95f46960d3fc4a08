"""The algorithm of csrc/seq_loss.cpp in Python, over any primitives, with keys that may come from other processes.

`forward` and `backward` are the two halves; `Exchange` is what they need of other processes. Here blocks of keys are
the outer loop and chunks of rows the inner one, because a block that comes from elsewhere passes by once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from amn_kernels.options import LossOptions
from amn_kernels.primitives import (
    COLUMN_SUMS,
    COLUMNS,
    MOMENTS,
    PLAIN_ROWS,
    Attention,
    Form,
    Pairs,
    Primitives,
    Row,
    Temperature,
    TermList,
)
from amn_kernels.products import multiply, weight_dtype
from amn_kernels.reference.seq_loss import compute_dtype, to_groups
from amn_kernels.stats import METRICS

CHUNK_ROWS = 1024
MIN_BLOCK_KEYS = 64


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


class Saved(NamedTuple):
    """What the backward needs, in sections for pred, target and extra negatives as far as they need a gradient.

    Rows are numbered group after group; K is 0 without InfoNCE.
    """

    rows: Tensor  # [len(Row) or PLAIN_ROWS, N + N + K] float64
    attention: Tensor  # [N + N + K, D] o, or [0, D] without gradients of InfoNCE
    columns: Tensor  # [COLUMNS, D], or [0, D] without terms of columns

    def sections(self, rows: int, needs: frozenset[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Row scalars and attention outputs of pred, target and extra_negatives."""
        target = rows if "target" in needs else 0
        bounds = {"pred": (0, rows), "target": (rows, rows + target), "extra_negatives": (rows + target, None)}
        return {name: (self.rows[:, slice(*bound)], self.attention[slice(*bound)]) for name, bound in bounds.items()}


@dataclass
class _Rows:
    """Rows [N, D] or [B, T, D] by group, with unit stride along D, masked ones zeroed."""

    x: Tensor
    options: LossOptions
    dtype: torch.dtype | None = None
    """What rows are read in; None for their own."""
    mask: Tensor | None = None
    grouped: Tensor = field(init=False)  # [G, M, D]

    def __post_init__(self):
        x = to_groups(self.x.detach(), self.options.negatives, self.x.dim() - 1)
        if self.mask is not None:  # masked rows may hold NaN, and 0 * NaN poisons a matrix product
            mask = to_groups(self.mask, self.options.negatives, self.x.dim() - 1)
            x = x.to(self.dtype or x.dtype).masked_fill(~mask.unsqueeze(-1), 0)
        self.grouped = x

    @property
    def direct(self) -> bool:
        """Whether chunks are views."""
        return self.dtype in (None, self.grouped.dtype) and self.grouped.stride(-1) == 1

    def of(self, chunk: "_Chunk") -> Tensor:  # [G, M, D]
        rows = self.grouped[chunk.groups, chunk.begin : chunk.end]
        rows = rows if self.dtype is None else rows.to(self.dtype)
        return rows if rows.stride(-1) == 1 else rows.contiguous()


class _Chunk(NamedTuple):
    """Rows [begin, end) of some groups; several groups are always whole. `numbers` are theirs among all rows."""

    groups: slice
    begin: int
    end: int
    numbers: slice

    def view(self, x: Tensor) -> Tensor:  # [N, ...] -> [G, M, ...], numbered group after group
        return x[self.numbers].view(-1, self.end - self.begin, *x.shape[1:])


def _chunks(groups: int, size: int, rows: int) -> Iterator[_Chunk]:
    """Chunks of at most so many rows, at least one; several groups at a time where they fit."""
    together = min(groups, max(1, rows // size))
    step = size if together > 1 else min(rows, size)
    for first in range(0, groups, together):
        last = min(groups, first + together)
        for begin in range(0, size, step):
            end = min(size, begin + step)
            yield _Chunk(slice(first, last), begin, end, slice(first * size + begin, (last - 1) * size + end))


def forward(
    prim: Primitives,
    exchange: Exchange,
    options: LossOptions,
    pred: Tensor,  # [N, D] or [B, T, D]
    target: Tensor,
    *,
    temperature: Tensor | None = None,
    mask: Tensor | None = None,
    extra_negatives: Tensor | None = None,  # [K, D]
    ids: Tensor | None = None,
    needs: frozenset[str] = frozenset(),
) -> tuple[Tensor, Tensor | None, Tensor, Saved]:
    """Values [m], Gram matrix [m, m] of the term gradients (if pred needs a gradient) and metrics of the whole batch.

    Args:
        prim: The primitives.
        exchange: The other processes.
        options: What to compute.
        pred: Rows of this process.
        target: The same shape.
        temperature: 0-dim, where it is learned.
        mask: Rows that count.
        extra_negatives: Keys for the rows of this process alone.
        ids: Per row; compared over all processes.
        needs: Which of pred, target, extra_negatives, temperature need a gradient.
    """
    real = compute_dtype(pred, target)
    terms = TermList(options.terms, tuple(term not in options.monitor for term in options.terms))
    form = Form(options.direction == "both", options.positives == "ids")
    tau = Temperature(options.temperature, temperature)
    has_infonce, has_columns = "infonce" in terms.names, not {"moment", "variance"}.isdisjoint(terms.names)
    attends = bool(needs) and terms.sends("infonce")
    dtype = None if prim.reads_any_dtype else real
    # Primitives that read any dtype read no masked row either; matrix products do.
    zeroed = mask if has_infonce or not prim.reads_any_dtype else None
    p, t = (_Rows(x, options, dtype, zeroed) for x in (pred, target))
    groups, size, dim = p.grouped.shape
    n = groups * size
    doubles = {"dtype": torch.float64, "device": pred.device}
    reals = {"dtype": real, "device": pred.device}

    def chunks():
        return _chunks(groups, size, n if p.direct and t.direct else CHUNK_ROWS)

    plain = not (form.both or form.positives_by_id or has_columns or "target" in needs)
    all_rows = n + (n if "target" in needs else 0)
    if attends and "extra_negatives" in needs:
        all_rows += len(extra_negatives)
    saved = Saved(
        torch.empty(PLAIN_ROWS, all_rows, **doubles) if plain else torch.zeros(len(Row), all_rows, **doubles),
        torch.empty(all_rows if attends else 0, dim, **reals),
        torch.empty(COLUMNS if has_columns else 0, dim, **reals),
    )
    sections = saved.sections(n, needs)
    (rows, attention), (target_rows, target_attention) = sections["pred"], sections["target"]
    extra_rows, extra_attention = sections["extra_negatives"]
    total = _set_weights(rows[Row.WEIGHT], mask, options, exchange)
    scale = torch.empty(groups, size, **reals)
    for chunk in chunks():
        part = scale[chunk.groups, chunk.begin : chunk.end]
        prim.row_stats(p.of(chunk), t.of(chunk), rows[:, chunk.numbers], part, form)

    extra = None
    if extra_negatives is not None and has_infonce:
        keys = extra_negatives.detach().to(dtype or extra_negatives.dtype).contiguous()
        extra = Keys(keys.unsqueeze(0), torch.empty(1, len(keys), **reals))
        if len(extra_attention):
            extra.attention = extra_attention.zero_().unsqueeze(0)
        else:
            extra_rows = torch.empty(len(rows), len(keys), **doubles)
        extra_rows[Row.WEIGHT].fill_(1)
        prim.row_stats(keys, keys, extra_rows, extra.scale[0], form)
        extra_rows[Row.WEIGHT].copy_(1 / total)
    if has_infonce:
        group_ids = None if ids is None else to_groups(ids, options.negatives, ids.dim()).long().contiguous()
        budget = (options.chunk_bytes or prim.chunk_bytes[options.direction]) // real.itemsize
        most_keys = max(size, 0 if extra is None else extra.keys.shape[1])
        for some in _chunks(groups, size, max(size, budget // most_keys)):
            own = Keys(t.of(some), scale[some.groups], None if group_ids is None else group_ids[some.groups], own=True)
            if len(target_attention):
                own.attention = some.view(target_attention).zero_()
            infonce = _Infonce(prim, exchange, options, form, tau, p, t, some, rows, own, extra, budget)
            infonce.run(attention)
    if len(extra_attention):
        prim.row_dots(keys, keys, extra_attention, extra_rows, Attention.BY_KEY, form, tau)
    if "target" in needs:
        prim.mirror_rows(rows, target_rows)
        for chunk in chunks() if attends else ():
            q, mirrored = chunk.view(target_attention), target_rows[:, chunk.numbers]
            prim.row_dots(t.of(chunk), p.of(chunk), q, mirrored, Attention.BY_KEY, form, tau)

    col_values = torch.empty(0, **doubles)
    if has_columns:
        moments, count = torch.zeros(MOMENTS, dim, **doubles), torch.zeros(1, **doubles)
        for chunk in chunks():
            prim.col_stats(p.of(chunk), t.of(chunk), rows[:, chunk.numbers], moments, count)
        moments, count = exchange.merge_moments(moments, count)
        col_values = torch.empty(2, **doubles)
        gamma = -1.0 if options.variance_target is None else options.variance_target
        prim.col_terms(moments, count, gamma, saved.columns, col_values)
        for chunk in chunks() if needs else ():
            o = chunk.view(attention) if attends else attention
            prim.col_dots(p.of(chunk), t.of(chunk), o, saved.columns, rows[:, chunk.numbers])

    m = len(terms.names)
    gram = m if "pred" in needs else 0
    values, grams, metrics = (torch.empty(shape, **reals) for shape in ((m,), (gram, gram), (len(METRICS),)))
    # The values of the columns are those of all processes already, and would be counted once for each.
    prim.term_sums(rows, col_values / exchange.size, terms, form, dim, tau, values, grams, metrics)
    if exchange.size > 1:
        sums = exchange.sum(torch.cat([values, grams.flatten(), metrics]))
        values, grams, metrics = sums.split([m, gram * gram, len(METRICS)])
    return values, grams.view(gram, gram) if gram else None, metrics, saved


def _set_weights(weight: Tensor, mask: Tensor | None, options: LossOptions, exchange: Exchange) -> Tensor | float:
    """Fill in 1/n for the rows that count, 0 for the others; returns n, at least 1, of all processes."""
    if mask is None and exchange.size == 1:  # the host knows
        weight.fill_(1 / len(weight))
        return torch.full((), len(weight), dtype=weight.dtype, device=weight.device)
    counts = torch.ones_like(weight)
    if mask is not None:
        counts = to_groups(mask, options.negatives, mask.dim()).reshape(-1).to(weight.dtype)
    total = exchange.sum(counts.sum()).clamp(min=1)
    weight.copy_(counts / total)
    return total


class _Infonce:
    """InfoNCE of the rows of some groups."""

    def __init__(self, prim, exchange, options, form, tau, p, t, some: _Chunk, rows, own: Keys, extra, budget: int):
        self.prim, self.exchange, self.form, self.tau = prim, exchange, form, tau
        self.p, self.t, self.some, self.rows, self.own, self.extra = p, t, some, rows, own, extra
        self.margin, self.budget, self.real = options.false_negative_margin, budget, own.scale.dtype
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

    def run(self, attention: Tensor) -> None:  # [N, D], or [0, D] without gradients
        gathers = any(block.attention is not None for block in (self.own, *self.further))
        if self.form.both or self.form.positives_by_id or gathers:
            self._general(attention)
        else:
            self._plain(attention)

    def _plain(self, attention: Tensor) -> None:
        """One round: blocks merge as they pass by."""
        sends = len(attention) > 0
        for number, block in enumerate(self.exchange.blocks(self.own, self.further)):
            for chunk in self._chunks():
                queries, rows = self.p.of(chunk), self.rows[:, chunk.numbers]
                for first, keys in self._parts(block):
                    logits, pairs = self._similarities(chunk, queries, keys)
                    weights, rescale = self._weights(logits, keys), logits.new_empty(rows.shape[1], 1)
                    own = self._own(block, chunk, first)
                    self.prim.softmax_rows_(logits, keys.scale, rows, rescale, pairs, own, self.tau, weights)
                    if sends:
                        out, merges = chunk.view(attention), number > 0 or first > 0
                        if merges:
                            out.mul_(rescale.view(self.groups, -1, 1))
                        multiply(out, weights, keys.keys, merges)
        if sends:
            self._dots(attention, Attention.UNNORMALISED)

    def _general(self, attention: Tensor) -> None:
        """Two rounds: sums of rows and columns, then the normalised weights."""
        gathered, self.own.attention = self.own.attention, None  # only the second round gathers
        if self.form.both:
            self.own.sums = self.rows.new_zeros(3, *self.own.scale.shape)
            self.own.sums[0].fill_(-torch.inf)
        sends = len(attention) > 0
        for block in self.exchange.blocks(self.own, self.further):
            for chunk in self._chunks():
                queries = self.p.of(chunk)
                for first, keys in self._parts(block):
                    logits, pairs = self._similarities(chunk, queries, keys)
                    rows, own = self.rows[:, chunk.numbers], self._own(block, chunk, first)
                    self.prim.softmax_stats_(logits, keys.scale, rows, pairs, self.form, own, self.tau)
                    if keys.sums is not None:
                        self.prim.softmax_cols(logits, keys.sums, pairs, self.form)
                    if sends and self.kept is not None:
                        self.kept.append((logits, pairs))
        own_rows = self.rows[:, self.some.numbers]
        if self.form.both:
            for row, sums in zip(COLUMN_SUMS, self.own.sums, strict=True):
                own_rows[row].copy_(sums.view(-1))
            self.own.sums = None
        if not sends:
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
                    weights, own = self._weights(logits, keys), self._own(block, chunk, first)
                    cols = logits.new_empty(2, self.groups, 0) if keys.cols is None else keys.cols
                    self.prim.softmax_weights_(
                        logits, keys.scale, rows, cols, pairs, self.form, own, kept is None, self.tau, weights
                    )
                    multiply(chunk.view(attention), weights, keys.keys, number > 0 or first > 0)
                    if keys.attention is not None:
                        self._gather(keys.attention, weights, queries, chunk.view(self.rows[Row.INV_PRED]))
        self._dots(attention, Attention.NORMALISED)

    def _chunks(self) -> Iterator[_Chunk]:
        """The rows of the groups, all at once or some of one group."""
        first, size = self.some.groups.start, self.size
        for begin in range(0, size, self.chunk_rows):
            end = min(size, begin + self.chunk_rows)
            last = self.some.groups.stop - 1
            yield _Chunk(self.some.groups, begin, end, slice(first * size + begin, last * size + end))

    def _parts(self, block: Keys) -> Iterator[tuple[int, Keys]]:
        """The block in parts whose similarities with a chunk fit the budget, each with its first key's number."""
        for first in range(0, block.keys.shape[1], self.block_keys):
            part = slice(first, first + self.block_keys)
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

    def _similarities(self, chunk: _Chunk, queries: Tensor, keys: Keys) -> tuple[Tensor, Pairs]:  # [G, M, K]
        logits = torch.empty(*queries.shape[:2], keys.keys.shape[1], dtype=self.real, device=queries.device)
        multiply(logits, queries, keys.keys.mT)
        row_ids = None if keys.ids is None else self.own.ids[:, chunk.begin : chunk.end].reshape(-1)
        guide = None
        if self.margin is not None:
            guide = torch.empty_like(logits)
            multiply(guide, self.t.of(chunk), keys.keys.mT)
        return logits, Pairs(row_ids, keys.ids, guide, -1.0 if self.margin is None else self.margin)

    def _weights(self, logits: Tensor, keys: Keys) -> Tensor:
        """Where weights go: in place, unless the product takes another dtype."""
        dtype = weight_dtype(keys.keys, self.real)
        return logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)

    def _own(self, block: Keys, chunk: _Chunk, first: int) -> int:
        """Column of the own key of a chunk's first row; out of reach in a block that has none."""
        return chunk.begin - first if block.own else -self.size

    def _gather(self, attention: Tensor, weights: Tensor, queries: Tensor, inv_pred: Tensor) -> None:
        """Add the weighted unit rows to what keys gather."""
        units = (queries * inv_pred.to(self.real).unsqueeze(-1)).to(weights.dtype)
        if len(attention) != len(weights):  # keys of all groups
            weights, units = weights.flatten(0, 1).unsqueeze(0), units.flatten(0, 1).unsqueeze(0)
        multiply(attention, weights.mT, units, accumulate=True)

    def _dots(self, attention: Tensor, held: Attention) -> None:
        for chunk in [self.some] if self.p.direct and self.t.direct else self._chunks():
            rows, out = self.rows[:, chunk.numbers], chunk.view(attention)
            self.prim.row_dots(self.p.of(chunk), self.t.of(chunk), out, rows, held, self.form, self.tau)


def backward(
    prim: Primitives,
    options: LossOptions,
    saved: Saved,
    grad_values: Tensor,  # [m]
    pred: Tensor,
    target: Tensor,
    *,
    temperature: Tensor | None = None,
    extra_negatives: Tensor | None = None,
    needs: frozenset[str] = frozenset(),
) -> dict[str, Tensor]:
    """Gradients of what needs one, by name, for the incoming gradients of the values."""
    real = saved.attention.dtype
    tau = Temperature(options.temperature, temperature)
    weights = grad_values.to(real).contiguous()
    terms = TermList(options.terms, tuple(term not in options.monitor for term in options.terms))
    dtype = None if prim.reads_any_dtype else real
    p, t = (_Rows(x, options, dtype) for x in (pred, target))

    def combine(like, x, y, rows, attention, columns, terms):
        grad = torch.empty_like(like, memory_format=torch.contiguous_format)
        out = _Rows(grad, x.options)
        groups, size, _ = out.grouped.shape
        writes = prim.reads_any_dtype or grad.dtype == real
        for chunk in _chunks(groups, size, groups * size if writes and x.direct and y.direct else CHUNK_ROWS):
            result = out.of(chunk) if writes else torch.empty(out.of(chunk).shape, dtype=real, device=grad.device)
            o = chunk.view(attention) if len(attention) else attention
            of_rows = rows[:, chunk.numbers]
            prim.row_combine(weights, x.of(chunk), y.of(chunk), o, columns, of_rows, terms, tau, result)
            if not writes:
                out.of(chunk).copy_(result)
        return grad

    sections = saved.sections(p.grouped.shape[:2].numel(), needs)
    gradients = {}
    if "pred" in needs:
        gradients["pred"] = combine(pred, p, t, *sections["pred"], saved.columns, terms)
    if "target" in needs:
        mirrored = torch.empty_like(saved.columns)
        if len(mirrored):
            prim.mirror_columns(saved.columns, mirrored)
        gradients["target"] = combine(target, t, p, *sections["target"], mirrored, terms)
    if "extra_negatives" in needs:
        if len(saved.attention):
            keys = _Rows(extra_negatives, LossOptions(), dtype)
            alone = TermList(terms.names, tuple(terms.sends(name) and name == "infonce" for name in terms.names))
            gradients["extra_negatives"] = combine(
                extra_negatives, keys, keys, *sections["extra_negatives"], saved.columns[:0], alone
            )
        else:
            gradients["extra_negatives"] = torch.zeros_like(extra_negatives)
    if "temperature" in needs:
        total = weights.new_zeros((), dtype=torch.float64)
        if len(saved.attention):
            rows, _ = sections["pred"]
            along = rows[Row.WEIGHT] * rows[Row.INV_PRED] * rows[Row.PRED_ATT]
            total = -along.sum() / temperature.double().square() * weights[terms.names.index("infonce")]
        gradients["temperature"] = total.to(temperature.dtype)
    return gradients
