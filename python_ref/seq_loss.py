"""The loss in plain PyTorch: every term of `amn_kernels.reference.terms` for one set of options."""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amn_kernels.reference import gradients, terms
from amn_kernels.stats import TermOutputs

if TYPE_CHECKING:
    from amn_kernels.options import LossOptions


def without_autocast(function):
    """Runs `function`, whose first argument is a tensor, with autocast off: it chooses its dtypes itself."""

    @functools.wraps(function)
    def run(pred, *arguments, **options):
        if not torch.amp.is_autocast_available(pred.device.type):
            return function(pred, *arguments, **options)
        with torch.autocast(pred.device.type, enabled=False):
            return function(pred, *arguments, **options)

    return run


@without_autocast
def term_outputs(
    pred: Tensor,  # [N, D] or [B, T, D]
    target: Tensor,  # same shape
    options: "LossOptions",
    *,
    temperature: Tensor | float | None = None,
    mask: Tensor | None = None,  # [N] or [B, T] bool
    extra_negatives: Tensor | None = None,  # [K, D]
    ids: Tensor | None = None,  # [N] or [B, T]
) -> TermOutputs:
    """Value of each of ``options.terms``, differentiable in every floating tensor given, Gram matrix and metrics.

    Half precision input is computed in float32, as in every backend.

    Args:
        pred: The predictions.
        target: The targets.
        options: What to compute.
        temperature: τ as a 0-dim tensor where it is learned; default ``options.temperature``.
        mask: Rows that count; default all.
        extra_negatives: Further keys for InfoNCE.
        ids: Rows with an equal id are not each other's negatives, or else positives, as the options say.
    """
    dtype = compute_dtype(pred, target)
    temperature = options.temperature if temperature is None else temperature
    if mask is None:
        mask = pred.new_ones(pred.shape[:-1], dtype=torch.bool)
    # Masked rows may hold NaN, and 0 * NaN is NaN: they are zeroed before anything is computed from them.
    pred, target = (torch.where(mask.unsqueeze(-1), x.to(dtype), 0) for x in (pred, target))
    rows, row_targets, row_mask = pred.flatten(0, -2), target.flatten(0, -2), mask.flatten()

    groups = [to_groups(x, options.negatives, mask.dim()) for x in (pred, target, mask)]  # [G, M, ...]
    infonce_options = {
        "ids": None if ids is None else to_groups(ids, options.negatives, mask.dim()),
        "extra_negatives": None if extra_negatives is None else extra_negatives.to(dtype),
        "both_directions": options.direction == "both",
        "positives_by_id": options.positives == "ids",
        "false_negative_margin": options.false_negative_margin,
    }
    top1 = chance = None
    values = []
    for term in options.terms:
        if term == "infonce":
            value, top1, chance = terms.infonce(*groups, temperature, **infonce_options)
            top1, chance = (from_groups(x, options.negatives, mask.shape) for x in (top1, chance))
        elif term == "variance":
            value = terms.variance(rows, row_targets, row_mask, options.variance_target)
        else:
            value = getattr(terms, term)(rows, row_targets, row_mask)
        # A monitored term has a value and no gradient.
        values.append(value.detach() if term in options.monitor else value)

    gram = None
    if pred.requires_grad and torch.is_grad_enabled():
        with torch.no_grad():
            g = gradients.term_gradients(
                options.enabled, *groups, temperature, **infonce_options, gamma=options.variance_target
            ).flatten(1)  # [enabled terms, N D]
            rows_of_terms = dict(zip(options.enabled, g.unbind(), strict=True))
            none = torch.zeros_like(g[0])  # what a monitored term sends
            g = torch.stack([rows_of_terms.get(term, none) for term in options.terms])
            gram = g @ g.mT

    with torch.no_grad():
        nothing = torch.zeros_like(row_mask, dtype=dtype)
        metrics = (
            terms.cosine_similarity(rows, row_targets),
            nothing if top1 is None else top1.flatten().to(dtype),
            nothing if chance is None else chance.flatten(),
            rows.norm(dim=-1),
            row_targets.norm(dim=-1),
        )
        means = torch.stack([torch.where(row_mask, x, 0).sum() / row_mask.sum().clamp(min=1) for x in metrics])
    return TermOutputs(torch.stack(values), gram, means)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def to_groups(x: Tensor, negatives: str, row_dims: int) -> Tensor:  # [N, ...] or [B, T, ...] -> [G, M, ...]
    """Rows by group of mutual negatives: one group of all rows, T groups of B (step), or B groups of T (sequence).

    Args:
        x: Per-row data whose first ``row_dims`` dimensions count the rows.
        negatives: ``"all"``, ``"step"`` or ``"sequence"``.
        row_dims: 1 for [N, ...], 2 for [B, T, ...].
    """
    if negatives == "all":
        return x.flatten(0, row_dims - 1).unsqueeze(0)
    return x.transpose(0, 1) if negatives == "step" else x


def from_groups(x: Tensor, negatives: str, shape: torch.Size) -> Tensor:  # [G, M] -> [N] or [B, T]
    """Undo `to_groups` for one number per row; ``shape`` is that of the rows."""
    return x.transpose(0, 1) if negatives == "step" else x.reshape(shape)
