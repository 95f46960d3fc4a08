"""The definition of every term, in plain differentiable PyTorch: what all other code is tested against.

Symbols: p, t are a row of pred and of target; n the number of rows that count; D the dimension.
"""

import torch
from torch import Tensor

EPS = 1e-8
"""A vector whose norm is below this counts as zero: it normalises to the zero vector and gets no gradient by it."""


TIE = 8
"""Cosines closer than this many machine epsilons are a tie: matrix products round by about as much."""


def normalize(x: Tensor) -> Tensor:  # [..., D] -> [..., D]
    """``x / |x|``, and the zero vector with no gradient where ``|x| < EPS``."""
    nonzero = _nonzero(x)
    # The inner where keeps 0/0 out of the backward pass: a NaN there would survive the outer selection.
    norm = torch.where(nonzero, x, torch.ones_like(x)).norm(dim=-1, keepdim=True)
    return torch.where(nonzero, x / norm, torch.zeros_like(x))


def mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:  # [N, D], [N, D], [N] -> []
    """``1/(nD) Σ |p - t|²``."""
    return _row_mean((pred - target).square().mean(dim=-1), mask)


def cosine(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:  # [N, D], [N, D], [N] -> []
    """``1/n Σ (1 - cos(p, t))``, with ``1 - cos = |p/|p| - t/|t||² / 2``, which does not cancel for p near t."""
    return _row_mean(1 - cosine_similarity(pred, target), mask)


def cosine_similarity(pred: Tensor, target: Tensor) -> Tensor:  # [N, D], [N, D] -> [N]
    """Cosine of each row pair; 0, without gradient, where either vector counts as zero."""
    both = (_nonzero(pred) & _nonzero(target)).squeeze(-1)
    similarity = 1 - (normalize(pred) - normalize(target)).square().sum(dim=-1) / 2
    return torch.where(both, similarity, torch.zeros_like(similarity))


def infonce(
    pred: Tensor,  # [G, M, D]: G groups of M rows that are each other's negatives
    target: Tensor,  # [G, M, D]
    mask: Tensor,  # [G, M] bool; rows that are False are neither queries nor keys
    temperature: Tensor | float,
    *,
    ids: Tensor | None = None,  # [G, M]; rows of one group with one id are not each other's negatives
    extra_negatives: Tensor | None = None,  # [K, D] further keys for every row, positives of none
    both_directions: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # [], [G, M] bool, [G, M]
    """InfoNCE: ``1/n Σ_i (logsumexp_j s_ij - s_ii)`` with ``s_ij = cos(p_i, k_j) / τ`` over the valid keys j.

    Source: van den Oord et al. 2018 (arXiv:1807.03748), eq. 4; both directions as in CLIP, Radford et al. 2021
    (arXiv:2103.00020), fig. 3: the mean of the softmax over keys and of the softmax over queries, where
    extra_negatives take part in the first only. A row whose pred or target counts as zero has a value but sends no
    gradient.

    Returns:
        The value; per row, whether the own target has the highest similarity of all valid keys (a tie, to within
        `TIE`, is a miss); and per row the chance level of the value, ``ln(number of valid keys)``, in pred's dtype.
    """
    logits = infonce_logits(pred, target, mask, temperature, ids=ids, extra_negatives=extra_negatives)
    own = cosine_similarity(pred, target) / temperature  # [G, M]
    row_loss = torch.logsumexp(logits, dim=2) - own
    if both_directions:
        columns = logits[..., : pred.shape[1]].masked_fill(~valid_pairs(mask, ids), -torch.inf)
        row_loss = (row_loss + torch.logsumexp(columns, dim=1) - own) / 2
    both_nonzero = (_nonzero(pred) & _nonzero(target)).squeeze(-1)
    row_loss = torch.where(both_nonzero, row_loss, row_loss.detach())
    with torch.no_grad():
        others = logits.masked_fill(_diagonal(logits), -torch.inf)
        top1 = own - others.amax(dim=2) > TIE * torch.finfo(own.dtype).eps / temperature
        chance = torch.isneginf(logits).logical_not().sum(dim=2).to(pred.dtype).log()
    return _row_mean(row_loss, mask), top1, chance


def infonce_logits(
    pred: Tensor,  # [G, M, D]
    target: Tensor,  # [G, M, D]
    mask: Tensor,  # [G, M]
    temperature: Tensor | float,
    *,
    ids: Tensor | None = None,  # [G, M]
    extra_negatives: Tensor | None = None,  # [K, D]
) -> Tensor:  # [G, M, M + K]
    """``s_ij = cos(p_i, k_j) / τ`` over targets and extra negatives; -inf where key j does not count for row i."""
    keys, valid = normalize(target), valid_pairs(mask, ids)
    if extra_negatives is not None:
        k = extra_negatives.shape[0]
        keys = torch.cat([keys, normalize(extra_negatives).expand(pred.shape[0], k, -1)], dim=1)
        valid = torch.cat([valid, valid.new_ones(*valid.shape[:2], k)], dim=2)
    logits = (normalize(pred) @ keys.mT / temperature).masked_fill(~valid, -torch.inf)
    # The own logit comes from the row pair itself and not from the matrix product, where it would carry the rounding
    # of another summation order: equal vectors then tie exactly.
    own = cosine_similarity(pred, target) / temperature  # [G, M]
    return torch.where(_diagonal(logits), own.unsqueeze(-1), logits)


def moment(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:  # [N, D], [N, D], [N] -> []
    """``mean_k (μ_k(p) - μ_k(t))² + mean_k (sd_k(p) - sd_k(t))²`` over the rows, per dimension k.

    μ is the mean and sd the unbiased standard deviation, 0 for fewer than 2 rows.
    """
    (mean_p, sd_p), (mean_t, sd_t) = column_moments(pred, mask), column_moments(target, mask)
    return (mean_p - mean_t).square().mean() + (sd_p - sd_t).square().mean()


def variance(pred: Tensor, target: Tensor, mask: Tensor, gamma: float | None = None) -> Tensor:
    """``mean_k relu(γ_k - sd_k(p / |p|))``: a penalty on predictions that vary less than γ in a dimension.

    Source: the variance term of VICReg (Bardes et al. 2022, arXiv:2105.04906), in normalised space. There sd can't
    reach VICReg's γ = 1, so γ defaults to the deviation of the normalised targets in each dimension, detached.

    Args:
        pred: [N, D].
        target: [N, D].
        mask: [N] bool.
        gamma: One γ for all dimensions, or None.
    """
    _, sd = column_moments(normalize(pred), mask)
    if gamma is None:
        _, wanted = column_moments(normalize(target.detach()), mask)
    else:
        wanted = torch.full_like(sd, gamma)
    return torch.relu(wanted - sd).mean()


def _nonzero(x: Tensor) -> Tensor:  # [..., D] -> [..., 1] bool
    # Not "norm >= EPS": a NaN norm must stay in, so that it reaches the loss.
    return ~(x.detach().norm(dim=-1, keepdim=True) < EPS)


def _row_mean(rows: Tensor, mask: Tensor) -> Tensor:  # [...], [...] -> []
    """Mean over the rows that count; 0 if none does."""
    return torch.where(mask, rows, torch.zeros_like(rows)).sum() / mask.sum().clamp(min=1)


def column_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # [N, D], [N] -> [D], [D]
    """Mean and unbiased standard deviation over the rows that count; the deviation is 0 for fewer than 2 of them."""
    n = mask.sum()
    rows = mask.unsqueeze(-1)
    mean = torch.where(rows, x, 0).sum(dim=0) / n.clamp(min=1)
    squares = torch.where(rows, x - mean, 0).square().sum(dim=0) / (n - 1).clamp(min=1)
    # sqrt has no derivative at 0; a constant column has deviation 0 and gradient 0.
    positive = squares > 0
    sd = torch.where(positive, torch.where(positive, squares, 1).sqrt(), squares)
    return mean, sd


def valid_pairs(mask: Tensor, ids: Tensor | None) -> Tensor:  # [G, M] -> [G, M, M]
    """Whether key j counts for row i. The own key always does, so that no row is without a key."""
    valid = mask.unsqueeze(2) & mask.unsqueeze(1)
    if ids is not None:
        valid = valid & (ids.unsqueeze(2) != ids.unsqueeze(1))
    return valid | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)


def _diagonal(logits: Tensor) -> Tensor:  # [G, M, J] -> [M, J] bool
    return torch.eye(*logits.shape[1:], dtype=torch.bool, device=logits.device)
