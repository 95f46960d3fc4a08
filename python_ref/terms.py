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
    ids: Tensor | None = None,  # [G, M]
    extra_negatives: Tensor | None = None,  # [K, D] further keys for every row, positives of none
    both_directions: bool = False,
    positives_by_id: bool = False,
    false_negative_margin: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # [], [G, M] bool, [G, M]
    """InfoNCE: ``1/n Σ_i (logsumexp_j s_ij - mean_{j in P(i)} s_ij)`` with ``s_ij = cos(p_i, k_j) / τ``, keys j valid.

    Source: van den Oord et al. 2018 (arXiv:1807.03748), eq. 4, where P(i) is the own target alone; with several
    positives, the L_out of SupCon, Khosla et al. 2020 (arXiv:2004.11362), eq. 2. Both directions as in CLIP, Radford et
    al. 2021 (arXiv:2103.00020), fig. 3: the mean of the softmax over keys and of the softmax over queries, where
    extra_negatives take part in the first only. Which keys are valid and which are positives: `key_sets`. A row whose
    pred or target counts as zero has a value but sends no gradient.

    Returns:
        The value; per row, whether a positive has the highest similarity of all valid keys (a tie, to within `TIE`, is
        a miss); and per row ``ln(number of valid keys)``, the chance level of this direction, in pred's dtype.
    """
    valid, positive = key_sets(
        target,
        mask,
        ids=ids,
        extra_negatives=extra_negatives,
        positives_by_id=positives_by_id,
        false_negative_margin=false_negative_margin,
    )
    logits = infonce_logits(pred, target, valid, temperature, extra_negatives=extra_negatives)
    row_loss = torch.logsumexp(logits, dim=2) - _mean_where(positive, logits, dim=2)
    if both_directions:
        columns, of_column = (x[..., : pred.shape[1]] for x in (logits, positive))
        row_loss = (row_loss + torch.logsumexp(columns, dim=1) - _mean_where(of_column, columns, dim=1)) / 2
    both_nonzero = (_nonzero(pred) & _nonzero(target)).squeeze(-1)
    row_loss = torch.where(both_nonzero, row_loss, row_loss.detach())
    with torch.no_grad():
        best, rival = (logits.masked_fill(~keys, -torch.inf).amax(dim=2) for keys in (positive, valid & ~positive))
        top1 = best - rival > TIE * torch.finfo(logits.dtype).eps / temperature
        chance = valid.sum(dim=2).to(pred.dtype).log()
    return _row_mean(row_loss, mask), top1, chance


def infonce_logits(
    pred: Tensor,  # [G, M, D]
    target: Tensor,  # [G, M, D]
    valid: Tensor,  # [G, M, M + K] bool
    temperature: Tensor | float,
    *,
    extra_negatives: Tensor | None = None,  # [K, D]
) -> Tensor:  # [G, M, M + K]
    """``s_ij = cos(p_i, k_j) / τ`` over targets and extra negatives; -inf where key j does not count for row i."""
    keys = _with_extra(normalize(target), extra_negatives)
    logits = (normalize(pred) @ keys.mT / temperature).masked_fill(~valid, -torch.inf)
    # The own logit comes from the row pair itself and not from the matrix product, where it would carry the rounding
    # of another summation order: equal vectors then tie exactly.
    own = cosine_similarity(pred, target) / temperature  # [G, M]
    return torch.where(_diagonal(logits), own.unsqueeze(-1), logits)


@torch.no_grad()
def key_sets(
    target: Tensor,  # [G, M, D]
    mask: Tensor,  # [G, M]
    *,
    ids: Tensor | None = None,  # [G, M]
    extra_negatives: Tensor | None = None,  # [K, D]
    positives_by_id: bool = False,
    false_negative_margin: float | None = None,
) -> tuple[Tensor, Tensor]:  # [G, M, M + K] bool, twice
    """Whether key j counts for row i, and whether it is a positive of it. The own key always is both.

    Masked rows are neither. Rows of one group with one id are positives of each other (``positives_by_id``), or else
    not each other's negatives. With a margin, a key with ``1 - cos(t_i, k_j) < margin`` that is no positive does not
    count: GISTEmbed, Solatorio 2024 (arXiv:2402.16829), with the targets as guide.
    """
    groups, rows = mask.shape
    extra = 0 if extra_negatives is None else extra_negatives.shape[0]
    own = torch.eye(rows, rows + extra, dtype=torch.bool, device=mask.device)
    counts = torch.cat([mask, mask.new_ones(groups, extra)], dim=1)  # keys
    valid = mask.unsqueeze(2) & counts.unsqueeze(1)
    same_id = torch.zeros_like(valid)
    if ids is not None:
        same_id[..., :rows] = ids.unsqueeze(2) == ids.unsqueeze(1)
    positive = own | (same_id & valid) if positives_by_id else own.expand_as(valid)
    if not positives_by_id:
        valid = valid & ~same_id
    if false_negative_margin is not None:
        similarity = normalize(target) @ _with_extra(normalize(target), extra_negatives).mT
        valid = valid & ~(1 - similarity < false_negative_margin)
    return valid | positive, positive


def moment(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:  # [N, D], [N, D], [N] -> []
    """``mean_k (μ_k(p) - μ_k(t))² + mean_k (sd_k(p) - sd_k(t))²`` over the rows, per dimension k.

    μ is the mean and sd the unbiased standard deviation, 0 for fewer than 2 rows.
    """
    (mean_p, sd_p), (mean_t, sd_t) = column_moments(pred, mask), column_moments(target, mask)
    return (mean_p - mean_t).square().mean() + (sd_p - sd_t).square().mean()


def variance(pred: Tensor, target: Tensor, mask: Tensor, gamma: float | None = None) -> Tensor:
    """``mean_k relu(γ_k - sd_k(p / |p|))``: a penalty on predictions that vary less than γ in a dimension.

    Source: the variance term of VICReg (Bardes et al. 2022, arXiv:2105.04906), in normalised space. There sd can't
    reach VICReg's γ = 1, so γ defaults to the deviation of the normalised targets in each dimension, detached. 0 if no
    row counts.

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
        wanted = gamma
    return torch.relu(wanted - sd).mean() * mask.any()


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
    mean = torch.where(rows, x, 0).sum(dim=0).detach() / n.clamp(min=1)
    # Of what that rounding left, once more: the mean of equal numbers is then that number.
    mean = mean + torch.where(rows, x - mean, 0).sum(dim=0) / n.clamp(min=1)
    squares = torch.where(rows, x - mean, 0).square().sum(dim=0) / (n - 1).clamp(min=1)
    # sqrt has no derivative at 0; a constant column has deviation 0 and gradient 0.
    positive = squares > 0
    sd = torch.where(positive, torch.where(positive, squares, 1).sqrt(), squares)
    return mean, sd


def _with_extra(keys: Tensor, extra_negatives: Tensor | None) -> Tensor:  # [G, M, D], [K, D] -> [G, M + K, D]
    if extra_negatives is None:
        return keys
    return torch.cat([keys, normalize(extra_negatives).expand(keys.shape[0], -1, -1)], dim=1)


def _mean_where(keep: Tensor, x: Tensor, dim: int) -> Tensor:
    return torch.where(keep, x, 0).sum(dim=dim) / keep.sum(dim=dim)


def _diagonal(logits: Tensor) -> Tensor:  # [G, M, J] -> [M, J] bool
    return torch.eye(*logits.shape[1:], dtype=torch.bool, device=logits.device)
