"""Every kernel of csrc/cuda once, in the order of a training step of the general form, each with memory of its own.

What is in the tensors is plausible, not right: this is for what looks at launches, not at values.
"""

from typing import NamedTuple

import torch

from amn_kernels.options import FUSED_TERMS
from amn_kernels.primitives import (
    COLUMN_SUMS,
    COLUMNS,
    MOMENTS,
    PLAIN_ROWS,
    Attention,
    InfonceForm,
    Pairs,
    Row,
    Temperature,
    TermList,
)

from .primitives import SimtPrimitives


class Sizes(NamedTuple):
    """Of one group: N rows of pred and target [N, D] and of similarities [N, K], of which C keys are columns."""

    rows: int
    dim: int
    keys: int
    columns: int
    sums: int
    """Rows that term_sums sums, more than 2,048 for both of its kernels."""


def run_every_kernel(primitives: SimtPrimitives, sizes: Sizes, dtype: torch.dtype) -> None:
    """All launchers; those whose kernels depend on options with each of them."""
    n, dim, keys, columns, sums = sizes
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype)

    pred, target, attention = random(n, dim, dtype=dtype), random(n, dim, dtype=dtype), random(n, dim)
    rows = _rows(n)
    plain, general = InfonceForm(False, False), InfonceForm(True, True)
    tau, learned = Temperature(0.1, None), Temperature(0.1, torch.tensor(0.1))
    pairs = Pairs(torch.arange(n), torch.arange(keys).view(1, keys) // 2, None, 0.0)
    no_pairs = Pairs(None, None, None, 0.0)
    scale = torch.rand(1, keys, generator=generator) + 0.5

    primitives.row_stats(pred, target, rows[:PLAIN_ROWS].clone(), torch.empty(n), plain, weight=1 / n)
    primitives.row_stats(pred, target, rows, torch.empty(n), general)

    for given in (no_pairs, pairs):
        logits = random(1, n, keys)
        weights = logits if dtype == torch.float32 else torch.empty(1, n, keys, dtype=dtype)
        primitives.softmax_rows_(logits, scale, rows.clone(), torch.empty(n, 1), given, 0, tau, weights)

    logits, key_rows = random(1, n, keys), _rows(columns)
    primitives.softmax_stats_(logits, scale, rows, pairs, general, 0, tau)
    primitives.softmax_cols(logits[..., :columns].contiguous(), key_rows[list(COLUMN_SUMS)][:, None], pairs, general)
    factors = [torch.empty(1, columns) for _ in range(2)]
    primitives.col_factors(key_rows, [x[0] for x in factors], learned)
    primitives.softmax_weights_(logits, scale, rows, factors, pairs, general, 0, False, tau, logits)

    primitives.row_dots(pred, target, attention, rows, Attention.NORMALISED, general, tau)
    moments, count = torch.zeros(MOMENTS, dim, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    of_columns, values = torch.empty(COLUMNS, dim), torch.empty(2, dtype=torch.float64)
    primitives.col_stats(pred, target, rows, moments, count)
    primitives.col_terms(moments, count, 1.0, of_columns, values)
    primitives.col_dots(pred, target, attention, of_columns, rows)

    terms = TermList(tuple(FUSED_TERMS), (True,) * len(FUSED_TERMS))
    results = [torch.empty(len(terms.names)), torch.empty(len(terms.names), len(terms.names)), torch.empty(5)]
    for summed in (n, sums):
        primitives.term_sums(_rows(summed), values, terms, general, dim, learned, *results)
    _balance(primitives, *results[:2])

    grads = torch.rand(len(terms.names), generator=generator)
    for given in (torch.empty(0, dim), of_columns):
        primitives.row_combine(grads, pred, target, attention, given, rows, terms, tau, torch.empty_like(pred))
    primitives.mirror_rows(rows, rows.clone())
    primitives.mirror_columns(of_columns, torch.empty_like(of_columns))
    primitives.temperature_grad(grads, rows, terms, learned, torch.empty(()))


def _rows(count: int) -> torch.Tensor:  # [len(Row), count]
    rows = torch.rand(len(Row), count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    rows[Row.WEIGHT] = 1 / count
    return rows


def _balance(primitives: SimtPrimitives, values: torch.Tensor, gram: torch.Tensor) -> None:
    m = len(values)
    state = {
        "mean": torch.ones(m),
        "updates": torch.ones(m, dtype=torch.int64),
        "calls": torch.zeros((), dtype=torch.int64),
        "skipped": torch.zeros(m, dtype=torch.int64),
        "lambdas": torch.ones(m, dtype=torch.float64),
        "most": torch.full((m,), 1e6),
    }
    primitives.balance(values, gram, state, (0, 0.9, 1, False, True), torch.empty(m), torch.empty(()))
