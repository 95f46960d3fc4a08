"""The algorithm of csrc/seq_loss.cpp in Python, over any primitives, with keys that may come from other processes.

`forward` and `backward` are the two halves; `Exchange` is what they need of other processes. Here blocks of keys are
the outer loop and chunks of rows the inner one, because a block that comes from elsewhere passes by once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from amn_kernels.options import DEFAULT_CHUNK_BYTES, LossOptions
from amn_kernels.primitives import (
    COLUMNS,
    MOMENTS,
    Attention,
    Form,
    Pairs,
    Primitives,
    Row,
    Temperature,
    TermList,
)
from amn_kernels.reference.seq_loss import compute_dtype, to_groups
from amn_kernels.stats import METRICS

CHUNK_ROWS = 1024


@dataclass
class Keys:
    """A block of keys for the rows of one group, and what is gathered for them as they pass by the rows."""

    keys: Tensor  # [K, D]
    scale: Tensor  # [K] 1/|k|, negative for no key
    ids: Tensor | None = None  # [K] int64
    own: bool = False
    """Whether key j is the own key of row j."""
    sums: Tensor | None = None
    """[3, K] float64: COL_MAX, COL_OTHERS, COL_POSITIVE_SUM, where columns are summed."""
    cols: Tensor | None = None
    """[2, K] what softmax_weights_ needs of the columns."""
    attention: Tensor | None = None
    """[K, D] weighted sum of the rows, for keys that need a gradient."""


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


@dataclass
class Saved:
    """What the backward needs; rows are numbered group after group."""

    options: LossOptions
    tau: Temperature
    rows: Tensor  # [len(Row), N]
    attention: Tensor  # [N or 0, D] o
    columns: Tensor  # [COLUMNS or 0, D]
    target_rows: Tensor | None = None  # the same for the targets, [len(Row), N]
    target_attention: Tensor | None = None
    extra_rows: Tensor | None = None
    extra_attention: Tensor | None = None


@dataclass
class _Rows:
    """Rows [N, D] or [B, T, D] by group, in the dtype that is computed in, masked ones zeroed."""

    x: Tensor
    options: LossOptions
    real: torch.dtype
    mask: Tensor | None = None
    grouped: Tensor = field(init=False)  # [G, M, D]

    def __post_init__(self):
        x = to_groups(self.x.detach(), self.options.negatives, self.x.dim() - 1)
        if self.mask is not None:  # masked rows may hold NaN, and 0 * NaN poisons a matrix product
            mask = to_groups(self.mask, self.options.negatives, self.x.dim() - 1)
            x = x.to(self.real).masked_fill(~mask.unsqueeze(-1), 0)
        self.grouped = x

    def chunk(self, group: int, begin: int = 0, end: int | None = None) -> Tensor:  # [M, D] real
        rows = self.grouped[group, begin:end].to(self.real)
        return rows if rows.stride(-1) == 1 else rows.contiguous()


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
    p, t = (_Rows(x, options, real, mask) for x in (pred, target))
    groups, size, dim = p.grouped.shape
    n = groups * size
    doubles = {"dtype": torch.float64, "device": pred.device}
    reals = {"dtype": real, "device": pred.device}

    rows = torch.zeros(len(Row), n, **doubles)
    counts = torch.ones(n, **doubles)
    if mask is not None:
        counts = to_groups(mask, options.negatives, mask.dim()).reshape(-1).double()
    total = exchange.sum(counts.sum()).clamp(min=1)
    rows[Row.WEIGHT] = counts / total
    scale = torch.empty(groups, size, **reals)
    for group in range(groups):
        prim.row_stats(p.chunk(group), t.chunk(group), rows[:, group * size :][:, :size], scale[group], form)

    attends = bool(needs) and terms.sends("infonce")
    saved = Saved(options, tau, rows, torch.zeros(n if attends else 0, dim, **reals), torch.empty(0, dim, **reals))
    if attends and "target" in needs:
        saved.target_attention = torch.zeros(n, dim, **reals)
    extra = None
    if extra_negatives is not None and "infonce" in terms.names:
        keys = extra_negatives.detach().to(real).contiguous()
        saved.extra_rows = torch.zeros(len(Row), len(keys), **doubles)
        saved.extra_rows[Row.WEIGHT] = 1
        extra = Keys(keys, torch.empty(len(keys), **reals))
        prim.row_stats(keys, keys, saved.extra_rows, extra.scale, form)
        saved.extra_rows[Row.WEIGHT] = 1 / total
        if attends and "extra_negatives" in needs:
            extra.attention = saved.extra_attention = torch.zeros_like(keys)
    if "infonce" in terms.names:
        group_ids = None if ids is None else to_groups(ids, options.negatives, ids.dim()).long().contiguous()
        for group in range(groups):
            of_group = slice(group * size, (group + 1) * size)
            own = Keys(t.chunk(group), scale[group], None if group_ids is None else group_ids[group], own=True)
            if saved.target_attention is not None:
                own.attention = saved.target_attention[of_group]
            infonce = _Infonce(prim, exchange, options, form, tau, p, t, group, rows[:, of_group], own, extra)
            infonce.run(saved.attention[of_group])
    if saved.extra_attention is not None:
        prim.row_dots(keys, keys, saved.extra_attention, saved.extra_rows, Attention.BY_KEY, form, tau)
    if "target" in needs:
        saved.target_rows = torch.zeros_like(rows)
        prim.mirror_rows(rows, saved.target_rows)
        if attends:
            for group in range(groups):
                of_group = slice(group * size, (group + 1) * size)
                attention, mirrored = saved.target_attention[of_group], saved.target_rows[:, of_group]
                prim.row_dots(t.chunk(group), p.chunk(group), attention, mirrored, Attention.BY_KEY, form, tau)

    col_values = torch.empty(0, **doubles)
    if "moment" in terms.names or "variance" in terms.names:
        moments, count = torch.zeros(MOMENTS, dim, **doubles), torch.zeros(1, **doubles)
        for group in range(groups):
            prim.col_stats(p.chunk(group), t.chunk(group), rows[:, group * size :][:, :size], moments, count)
        moments, count = exchange.merge_moments(moments, count)
        saved.columns, col_values = torch.empty(COLUMNS, dim, **reals), torch.empty(2, **doubles)
        gamma = -1.0 if options.variance_target is None else options.variance_target
        prim.col_terms(moments, count, gamma, saved.columns, col_values)
        for group in range(groups):
            of_group = slice(group * size, (group + 1) * size)
            attention = saved.attention[of_group]
            prim.col_dots(p.chunk(group), t.chunk(group), attention, saved.columns, rows[:, of_group])

    m = len(terms.names)
    gram = m if "pred" in needs else 0
    values, grams, metrics = (torch.empty(shape, **reals) for shape in ((m,), (gram, gram), (len(METRICS),)))
    # The values of the columns are those of all processes already, and would be counted once for each.
    prim.term_sums(rows, col_values / exchange.size, terms, form, dim, tau, values, grams, metrics)
    sums = exchange.sum(torch.cat([values, grams.flatten(), metrics]))
    values, grams, metrics = sums.split([m, gram * gram, len(METRICS)])
    return values, grams.view(gram, gram) if gram else None, metrics, saved


class _Infonce:
    """InfoNCE of the rows of one group."""

    def __init__(self, prim, exchange, options, form, tau, p, t, group, rows, own, extra):
        self.prim, self.exchange, self.form, self.tau = prim, exchange, form, tau
        self.p, self.t, self.group, self.rows, self.own, self.extra = p, t, group, rows, own, extra
        self.margin = options.false_negative_margin
        self.budget = (options.chunk_bytes or DEFAULT_CHUNK_BYTES["pred_to_target"]) // own.keys.itemsize
        self.general = form.both or form.positives_by_id
        # Similarities of a chunk of rows with a part of a block, again and again in the same memory.
        rows_of_chunk = min(CHUNK_ROWS, rows.shape[1])
        self.scratch = own.keys.new_empty(rows_of_chunk * max(64, self.budget // rows_of_chunk))
        self.further = [] if extra is None else [extra]

    def run(self, attention: Tensor) -> None:  # [M, D], or [0, D] without gradients
        gathers = any(block.attention is not None for block in (self.own, *self.further))
        if self.general or gathers:
            self._general(attention)
        else:
            self._plain(attention)

    def _plain(self, attention: Tensor) -> None:
        """One round: blocks merge as they pass by."""
        attention.zero_()
        for block in self.exchange.blocks(self.own, self.further):
            for begin, end, queries, rows in self._chunks():
                for first, keys in self._parts(block, end - begin):
                    logits = self._similarities(queries, keys)
                    rescale = logits.new_empty(end - begin, 1)
                    pairs, own = self._pairs(keys, begin, end), self._own(block, begin, first)
                    self.prim.softmax_rows_(logits, keys.scale, rows, rescale, pairs, own, self.tau)
                    if len(attention):
                        out = attention[begin:end]
                        torch.addmm(out.mul_(rescale), logits, keys.keys, out=out)
        if len(attention):
            self._dots(attention, Attention.UNNORMALISED)

    def _general(self, attention: Tensor) -> None:
        """Two rounds: sums of rows and columns, then the normalised weights."""
        if self.form.both:
            self.own.sums = self.own.keys.new_zeros(3, len(self.own.keys), dtype=torch.float64)
            self.own.sums[0] = -torch.inf
        gathered, self.own.attention = self.own.attention, None  # only the second round gathers
        for block in self.exchange.blocks(self.own, self.further):
            for begin, end, queries, rows in self._chunks():
                for first, keys in self._parts(block, end - begin):
                    logits = self._similarities(queries, keys)
                    pairs, own = self._pairs(keys, begin, end), self._own(block, begin, first)
                    self.prim.softmax_stats_(logits, keys.scale, rows, pairs, self.form, own, self.tau)
                    if keys.sums is not None:
                        self._add_columns(keys, logits, pairs)
        if self.form.both:
            self.rows[[Row.COL_MAX, Row.COL_OTHERS, Row.COL_POSITIVE_SUM]] = self.own.sums
            self.own.sums = None
        if not len(attention):
            return
        if self.form.both:
            self.own.cols = self.own.keys.new_empty(2, len(self.own.keys))
            self.prim.col_factors(self.rows, self.own.cols, self.tau)
        self.own.attention = gathered
        attention.zero_()
        for block in self.exchange.blocks(self.own, self.further):
            for begin, end, queries, rows in self._chunks():
                units = queries * rows[Row.INV_PRED].to(queries.dtype).unsqueeze(1)
                for first, keys in self._parts(block, end - begin):
                    logits = self._similarities(queries, keys)
                    pairs, own = self._pairs(keys, begin, end), self._own(block, begin, first)
                    cols = logits.new_empty(2, 0) if keys.cols is None else keys.cols
                    self.prim.softmax_weights_(logits, keys.scale, rows, cols, pairs, self.form, own, True, self.tau)
                    attention[begin:end].addmm_(logits, keys.keys)
                    if keys.attention is not None:
                        keys.attention.addmm_(logits.mT, units)
        self._dots(attention, Attention.NORMALISED)

    def _chunks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Begin, end, queries and row scalars of the chunks of the group's rows."""
        size = self.rows.shape[1]
        for begin in range(0, size, CHUNK_ROWS):
            end = min(size, begin + CHUNK_ROWS)
            yield begin, end, self.p.chunk(self.group, begin, end), self.rows[:, begin:end]

    def _parts(self, block: Keys, rows: int) -> Iterator[tuple[int, Keys]]:
        """The block in parts whose similarities with so many rows fit the budget, each with its first key's number."""
        step = max(64, self.budget // rows)
        for first in range(0, len(block.keys), step):
            part = slice(first, first + step)
            yield (
                first,
                Keys(
                    block.keys[part],
                    block.scale[part],
                    None if block.ids is None else block.ids[part],
                    block.own,
                    *(None if x is None else x[:, part] for x in (block.sums, block.cols)),
                    None if block.attention is None else block.attention[part],
                ),
            )

    def _similarities(self, queries: Tensor, keys: Keys) -> Tensor:  # [M, K]
        shape = (len(queries), len(keys.keys))
        return torch.mm(queries, keys.keys.mT, out=self.scratch[: shape[0] * shape[1]].view(shape))

    def _own(self, block: Keys, begin: int, first: int) -> int:
        """Column of the own key of a chunk's first row; out of reach in a block that has none."""
        return begin - first if block.own else -self.rows.shape[1]

    def _pairs(self, keys: Keys, begin: int, end: int) -> Pairs:
        row_ids = None if keys.ids is None else self.own.ids[begin:end]
        guide = None
        if self.margin is not None:
            guide = self.t.chunk(self.group, begin, end) @ keys.keys.mT
        return Pairs(row_ids, keys.ids, guide, -1.0 if self.margin is None else self.margin)

    def _add_columns(self, keys: Keys, logits: Tensor, pairs: Pairs) -> None:
        rows = logits.new_zeros(len(Row), logits.shape[1], dtype=torch.float64)
        columns = [Row.COL_MAX, Row.COL_OTHERS, Row.COL_POSITIVE_SUM]
        rows[columns] = keys.sums
        self.prim.softmax_cols(logits, rows, pairs, self.form)
        keys.sums.copy_(rows[columns])

    def _dots(self, attention: Tensor, held: Attention) -> None:
        for begin, end, queries, rows in self._chunks():
            targets = self.t.chunk(self.group, begin, end)
            self.prim.row_dots(queries, targets, attention[begin:end], rows, held, self.form, self.tau)


def backward(
    prim: Primitives,
    saved: Saved,
    grad_values: Tensor,  # [m]
    pred: Tensor,
    target: Tensor,
    *,
    extra_negatives: Tensor | None = None,
    needs: frozenset[str] = frozenset(),
) -> dict[str, Tensor]:
    """Gradients of what needs one, by name, for the incoming gradients of the values."""
    options, real = saved.options, saved.attention.dtype
    weights = grad_values.to(real).contiguous()
    terms = TermList(options.terms, tuple(term not in options.monitor for term in options.terms))
    p, t = (_Rows(x, options, real) for x in (pred, target))

    def combine(like, x, y, rows, attention, columns, terms):
        grad = torch.empty_like(like, memory_format=torch.contiguous_format)
        grouped = to_groups(grad, x.options.negatives, like.dim() - 1)
        groups, size, _ = grouped.shape
        for group in range(groups):
            for begin in range(0, size, CHUNK_ROWS):
                end = min(size, begin + CHUNK_ROWS)
                part = slice(group * size + begin, group * size + end)
                out = grouped[group, begin:end]
                result = out if out.dtype == real else torch.empty(out.shape, dtype=real, device=out.device)
                of_group = attention[part] if len(attention) else attention
                x_rows, y_rows = x.chunk(group, begin, end), y.chunk(group, begin, end)
                prim.row_combine(weights, x_rows, y_rows, of_group, columns, rows[:, part], terms, saved.tau, result)
                if result is not out:
                    out.copy_(result)
        return grad

    gradients = {}
    if "pred" in needs:
        gradients["pred"] = combine(pred, p, t, saved.rows, saved.attention, saved.columns, terms)
    if "target" in needs:
        mirrored = torch.empty_like(saved.columns)
        if len(mirrored):
            prim.mirror_columns(saved.columns, mirrored)
        attention = saved.attention if saved.target_attention is None else saved.target_attention
        gradients["target"] = combine(target, t, p, saved.target_rows, attention, mirrored, terms)
    if "extra_negatives" in needs:
        if saved.extra_attention is None:
            gradients["extra_negatives"] = torch.zeros_like(extra_negatives)
        else:
            keys = _Rows(extra_negatives, LossOptions(), real)
            alone = TermList(terms.names, tuple(terms.sends(name) and name == "infonce" for name in terms.names))
            rows, attention = saved.extra_rows, saved.extra_attention
            gradients["extra_negatives"] = combine(
                extra_negatives, keys, keys, rows, attention, saved.columns[:0], alone
            )
    if "temperature" in needs:
        tau, total = saved.tau.learned, weights.new_zeros((), dtype=torch.float64)
        if len(saved.attention):
            along = saved.rows[Row.WEIGHT] * saved.rows[Row.INV_PRED] * saved.rows[Row.PRED_ATT]
            total = -along.sum() / tau.double().square() * weights[terms.names.index("infonce")]
        gradients["temperature"] = total.to(tau.dtype)
    return gradients
