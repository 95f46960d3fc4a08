"""The algorithm of csrc/seq_loss.cpp in Python, over any primitives, with keys that may come from other processes.

`forward` and `backward` are the two halves; how the rows are gone through is in `amn_kernels.rows`, InfoNCE in
`amn_kernels.infonce`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from amn_kernels.infonce import Exchange, Infonce, Keys
from amn_kernels.options import LossOptions, scratch_bytes
from amn_kernels.primitives import (
    COLUMNS,
    MOMENTS,
    PLAIN_ROWS,
    Attention,
    InfonceForm,
    Primitives,
    Row,
    Temperature,
    TermList,
)
from amn_kernels.reference.seq_loss import compute_dtype, to_groups
from amn_kernels.rows import CHUNK_ROWS, Rows, chunks_of
from amn_kernels.stats import METRICS


class Saved(NamedTuple):
    """What the backward needs, in sections for pred, target and extra negatives as far as they need a gradient.

    Rows are numbered group after group; K is 0 without InfoNCE.
    """

    rows: Tensor  # [len(Row) or PLAIN_ROWS, N + N + K] float64
    attention: Tensor  # [N + N + K, D] o, or [0, D] without gradients of InfoNCE; that of pred for temperature too
    columns: Tensor  # [COLUMNS, D], or [0, D] without terms of columns

    def sections(self, rows: int, needs: frozenset[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Row scalars and attention outputs of pred, target and extra_negatives."""
        target = rows if "target" in needs else 0
        attending = attending_rows(rows, needs)

        def cut(first: int) -> tuple[slice, slice, slice]:
            return slice(0, first), slice(first, first + target), slice(first + target, None)

        bounds = zip(cut(rows), cut(attending), strict=True)
        return {
            name: (self.rows[:, scalars], self.attention[attention])
            for name, (scalars, attention) in zip(("pred", "target", "extra_negatives"), bounds, strict=True)
        }


def attending_rows(rows: int, needs: frozenset[str]) -> int:
    """How many rows of pred have an o: all, or none where only keys need a gradient."""
    return 0 if needs.isdisjoint(("pred", "temperature")) else rows


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
    form = InfonceForm(options.direction == "both", options.positives == "ids")
    tau = Temperature(options.temperature, temperature)
    has_infonce, has_columns = "infonce" in terms.names, not {"moment", "variance"}.isdisjoint(terms.names)
    attends = bool(needs) and terms.sends("infonce")
    dtype = None if prim.reads_any_dtype else real
    # Primitives that read any dtype read no masked row either; matrix products do.
    zeroed = mask if has_infonce or not prim.reads_any_dtype else None
    p, t = (Rows(x, options, dtype, zeroed) for x in (pred, target))
    groups, size, dim = p.grouped.shape
    n = groups * size
    doubles = {"dtype": torch.float64, "device": pred.device}
    reals = {"dtype": real, "device": pred.device}

    def chunks():
        return chunks_of(groups, size, n if p.direct and t.direct else CHUNK_ROWS)

    plain_rows = not (form.both or form.positives_by_id or has_columns or "target" in needs)
    key_rows = n if "target" in needs else 0
    if attends and "extra_negatives" in needs:
        key_rows += len(extra_negatives)
    make, scalars = (torch.empty, PLAIN_ROWS) if plain_rows else (torch.zeros, len(Row))
    saved = Saved(
        make(scalars, n + key_rows, **doubles),
        torch.empty(attending_rows(n, needs) + key_rows if attends else 0, dim, **reals),
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
        extra_keys = extra_negatives.detach().to(dtype or extra_negatives.dtype).contiguous()
        extra = Keys(extra_keys.unsqueeze(0), torch.empty(1, len(extra_keys), **reals))
        if len(extra_attention):
            extra.attention = extra_attention.zero_().unsqueeze(0)
        else:
            extra_rows = torch.empty(len(rows), len(extra_keys), **doubles)
        extra_rows[Row.WEIGHT].fill_(1)
        prim.row_stats(extra_keys, extra_keys, extra_rows, extra.scale[0], form)
        extra_rows[Row.WEIGHT].copy_(1 / total)
    if has_infonce:
        group_ids = None if ids is None else to_groups(ids, options.negatives, ids.dim()).long().contiguous()
        keys_learn = not needs.isdisjoint(("target", "extra_negatives"))
        budget = scratch_bytes(options, prim.chunk_bytes, keys_learn) // real.itemsize
        budget //= 1 if options.false_negative_margin is None else 2  # the guide takes as much as the similarities
        most_keys = max(size, 0 if extra is None else extra.keys.shape[1])
        for whole in chunks_of(groups, size, max(size, budget // most_keys)):
            own = Keys(
                t.of(whole), scale[whole.groups], None if group_ids is None else group_ids[whole.groups], own=True
            )
            if len(target_attention):
                own.attention = whole.view(target_attention).zero_()
            infonce = Infonce(prim, exchange, options, form, tau, p, t, whole, rows, own, extra, budget)
            infonce.run(attention)
    if len(extra_attention):
        prim.row_dots(extra_keys, extra_keys, extra_attention, extra_rows, Attention.BY_KEY, form, tau)
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
            o = chunk.view(attention) if len(attention) else attention
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
    p, t = (Rows(x, options, dtype) for x in (pred, target))

    def combine(like, x, y, rows, attention, columns, terms):
        grad = torch.empty_like(like, memory_format=torch.contiguous_format)
        out = Rows(grad, x.options)
        groups, size, _ = out.grouped.shape
        writes = prim.reads_any_dtype or grad.dtype == real
        for chunk in chunks_of(groups, size, groups * size if writes and x.direct and y.direct else CHUNK_ROWS):
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
            keys = Rows(extra_negatives, LossOptions(), dtype)
            alone = TermList(terms.names, tuple(terms.sends(name) and name == "infonce" for name in terms.names))
            gradients["extra_negatives"] = combine(
                extra_negatives, keys, keys, *sections["extra_negatives"], saved.columns[:0], alone
            )
        else:
            gradients["extra_negatives"] = extra_negatives.new_zeros(extra_negatives.shape)
    if "temperature" in needs:
        total = weights.new_zeros((), dtype=torch.float64)
        if len(saved.attention):
            rows, _ = sections["pred"]
            along = rows[Row.WEIGHT] * rows[Row.INV_PRED] * rows[Row.PRED_ATT]
            total = -along.sum() / temperature.double().square() * weights[terms.names.index("infonce")]
        gradients["temperature"] = total.to(temperature.dtype)
    return gradients
