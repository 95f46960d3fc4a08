"""The gradient of every term with respect to pred, written out: the table that fused code implements.

`term_gradients` agrees with automatic differentiation of `amn_kernels.reference.terms`; written out, it can be used
inside a forward pass that is itself traced or differentiated. Formulas with d = p - t, so that nothing cancels for p
near t.
"""

import torch
from torch import Tensor

from amn_kernels.reference import terms


def term_gradients(
    names: tuple[str, ...],  # m names of terms
    pred: Tensor,  # [G, M, D]: G groups of M rows that are each other's negatives
    target: Tensor,  # [G, M, D]
    mask: Tensor,  # [G, M] bool
    temperature: Tensor | float,
    *,
    ids: Tensor | None = None,  # [G, M]
    extra_negatives: Tensor | None = None,  # [K, D]
    both_directions: bool = False,
    positives_by_id: bool = False,
    false_negative_margin: float | None = None,
    gamma: float | None = None,
) -> Tensor:  # [m, G M, D]
    """Gradient with respect to pred of each term; arguments as in `amn_kernels.reference.terms`."""
    p, t, valid = pred.flatten(0, 1), target.flatten(0, 1), mask.flatten()
    gradients = {
        "mse": lambda: mse(p, t, valid),
        "cosine": lambda: cosine(p, t, valid),
        "infonce": lambda: infonce(
            pred,
            target,
            mask,
            temperature,
            ids=ids,
            extra_negatives=extra_negatives,
            both_directions=both_directions,
            positives_by_id=positives_by_id,
            false_negative_margin=false_negative_margin,
        ).flatten(0, 1),
        "moment": lambda: moment(p, t, valid),
        "variance": lambda: variance(p, t, valid, gamma),
    }
    return torch.stack([torch.where(valid.unsqueeze(-1), gradients[name](), 0) for name in names])


def mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:  # [N, D], [N, D], [N] -> [N, D]
    """``2/(nD) d``."""
    return 2 * (pred - target) / (_count(mask) * pred.shape[-1])


def cosine(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:  # [N, D], [N, D], [N] -> [N, D]
    """``1/n (d / (|p||t|) - ((1 - cos) + (|p| - |t|)/|t|) p / |p|²)``; 0 where either counts as zero.

    For norms that differ by half and more, ``1/n (cos p/|p|² - t / (|p||t|))``: there d loses the smaller vector.
    """
    inv_pred, inv_target = _inverse_norm(pred), _inverse_norm(target)
    d = pred - target
    norms = pred.norm(dim=-1, keepdim=True) + target.norm(dim=-1, keepdim=True)
    excess = (d * (pred + target)).sum(dim=-1, keepdim=True) / norms.clamp(min=terms.EPS) * inv_target
    one_minus_cos = ((d - excess * target) * inv_pred).square().sum(dim=-1, keepdim=True) / 2
    gradient = inv_pred * inv_target * d - inv_pred.square() * (one_minus_cos + excess) * pred
    p, t = pred * inv_pred, target * inv_target
    apart = inv_pred * ((p * t).sum(dim=-1, keepdim=True) * p - t)
    gradient = torch.where(excess.abs() < 0.5, gradient, apart)
    return torch.where((inv_pred != 0) & (inv_target != 0), gradient, 0) / _count(mask)


def infonce(
    pred: Tensor,  # [G, M, D]
    target: Tensor,  # [G, M, D]
    mask: Tensor,  # [G, M]
    temperature: Tensor | float,
    *,
    ids: Tensor | None = None,
    extra_negatives: Tensor | None = None,
    both_directions: bool = False,
    positives_by_id: bool = False,
    false_negative_margin: float | None = None,
) -> Tensor:  # [G, M, D]
    """``1/(nτ|p|) (o - (p.o)/|p|² p)`` with ``o = Σ_{j≠i} v_ij k_j/|k_j| - (Σ_{j≠i} v_ij) t/|t|``.

    v are the softmax weights, less ``1/|P(i)|`` at the positives; in both directions the mean of those of the rows and
    of the columns.
    """
    rows = pred.shape[1]
    p, keys = terms.normalize(pred), terms.normalize(target)
    both = (_inverse_norm(pred) != 0) & (_inverse_norm(target) != 0)  # [G, M, 1]: the other rows send no gradient
    valid, positive = terms.key_sets(
        target,
        mask,
        ids=ids,
        extra_negatives=extra_negatives,
        positives_by_id=positives_by_id,
        false_negative_margin=false_negative_margin,
    )
    logits = terms.infonce_logits(pred, target, valid, temperature, extra_negatives=extra_negatives)
    own = torch.eye(*logits.shape[1:], dtype=torch.bool, device=logits.device)
    wanted = positive.to(p.dtype) / positive.sum(dim=2, keepdim=True)
    by_row = (torch.softmax(logits, dim=2) - wanted).masked_fill(own, 0) * both  # [G, M, M + K]
    to_positive = by_row.sum(dim=2, keepdim=True)
    if both_directions:
        square = own[:, :rows]
        # Pairs of one id are as many seen from either side.
        by_column = torch.softmax(logits[..., :rows], dim=1) - wanted[..., :rows]
        by_column = by_column.masked_fill(square, 0) * both.mT
        to_positive = (to_positive + by_column.sum(dim=1).unsqueeze(-1)) / 2
        by_row = torch.cat([by_row[..., :rows] + by_column, by_row[..., rows:]], dim=2) / 2
    o = by_row[..., :rows] @ keys - to_positive * keys
    if extra_negatives is not None:
        o = o + by_row[..., rows:] @ terms.normalize(extra_negatives)
    along = (p * o).sum(dim=-1, keepdim=True)
    return _inverse_norm(pred) * (o - along * p) / temperature / _count(mask)


def moment(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:  # [N, D], [N, D], [N] -> [N, D]
    """``2/D ((μ_p - μ_t)/n + (sd_p - sd_t) (p - μ_p) / ((n - 1) sd_p))``."""
    (mean_p, sd_p), (mean_t, sd_t) = terms.column_moments(pred, mask), terms.column_moments(target, mask)
    spread = (sd_p - sd_t) * _sd_gradient(pred, mean_p, sd_p, mask)
    return 2 / pred.shape[-1] * ((mean_p - mean_t) / _count(mask) + spread)


def variance(pred: Tensor, target: Tensor, mask: Tensor, gamma: float | None) -> Tensor:  # -> [N, D]
    """``-1/D`` times the gradient of ``sd_k(p/|p|)`` for the dimensions k below γ_k, through the normalisation."""
    q = terms.normalize(pred)
    mean, sd = terms.column_moments(q, mask)
    wanted = terms.column_moments(terms.normalize(target), mask)[1] if gamma is None else gamma
    into_q = torch.where(sd < wanted, -_sd_gradient(q, mean, sd, mask) / pred.shape[-1], 0)
    into_q = torch.where(mask.unsqueeze(-1), into_q, 0)
    return _inverse_norm(pred) * (into_q - (into_q * q).sum(dim=-1, keepdim=True) * q)


def _sd_gradient(x: Tensor, mean: Tensor, sd: Tensor, mask: Tensor) -> Tensor:  # [N, D]
    """``(x - μ) / ((n - 1) sd)``; 0 for a constant column."""
    scaled = (x - mean) / ((mask.sum() - 1).clamp(min=1) * torch.where(sd > 0, sd, 1))
    return torch.where(sd > 0, scaled, 0)


def _inverse_norm(x: Tensor) -> Tensor:  # [..., D] -> [..., 1]
    """0 for a zero vector; NaN for a norm that is not finite, so that it can't pass for a zero vector."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm < terms.EPS, 0, torch.where(norm < torch.inf, 1 / norm, torch.nan))


def _count(mask: Tensor) -> Tensor:  # []
    return mask.sum().clamp(min=1)
