"""Weights by which each term pulls as hard as its λ asks, from running means of norms or values.

One tiny step on the device without a host read; the compiled op `_balance` is its twin.
"""

import math

import torch
from torch import Tensor

SPIKE = 9.0
"""An update counts as at most this many times the running mean of the squared norm (3 times the norm) ..."""
SPIKE_AFTER = 10
"""... once the running mean has seen this many updates."""
LEAST, MOST = 1e-6, 1e6
"""Bounds of weight / λ."""


def balance(
    values: Tensor,  # [m]
    gram: Tensor | None,  # [m, m]
    mean: Tensor,  # [m] float32, before bias correction; updated in place, as the other three
    updates: Tensor,  # [m] int64
    calls: Tensor,  # [] int64
    skipped: Tensor,  # [m] int64
    lambdas: Tensor,  # [m] float64
    most: Tensor,  # [m] float32: the largest weight / λ
    anchor: int,
    decay: float,
    update_every: int,
    by_value: bool,
    update: bool,
) -> Tensor:  # [m] in the dtype of the values
    """See `amn_kernels.weighting.BalancedWeighting`, which states the formula and keeps the state."""
    observed = values if by_value else None if gram is None else gram.diagonal()
    if observed is not None:
        observed = observed.float()
        if update:
            due = calls % update_every == 0
            usable = torch.isfinite(observed) & (observed > 0)
            on = lambdas > 0
            take = due & usable & on
            limit = torch.where(updates >= SPIKE_AFTER, SPIKE * _corrected(mean, updates, decay), math.inf)
            step = (1 - decay) * (torch.minimum(observed, limit) - mean)
            # Multiplied by a flag, a NaN would still get through.
            mean.add_(torch.where(take, step, 0.0))
            updates.add_(take)
            skipped.add_(due & ~usable & on)
            calls.add_(1)
    known = _corrected(mean, updates, decay)
    if by_value:
        ratio = known[anchor] / known
    else:
        norm = known.sqrt()
        current = norm if observed is None else observed.clamp(min=0).sqrt().nan_to_num(nan=0.0)
        ratio = norm[anchor] / torch.maximum(norm, current)
    seen = (updates > 0) & (updates[anchor] > 0)
    ratio = torch.where(seen, torch.minimum(ratio.clamp(min=LEAST), most), 1.0)
    ratio[anchor] = 1.0
    return (lambdas * ratio).to(values.dtype)


def bias(updates: Tensor, decay: float) -> Tensor:  # [m] int64 -> [m]
    """By what a running mean that began at 0 is divided. In float64, as for a decay near 1 it cancels; mps has none."""
    seen = updates.clamp(min=1)
    return 1 - decay ** (seen.float() if seen.device.type == "mps" else seen.double())


def _corrected(mean: Tensor, updates: Tensor, decay: float) -> Tensor:  # [m]; 0 without updates
    return (mean / bias(updates, decay)).to(mean.dtype)
