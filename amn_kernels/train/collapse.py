"""The collapse panel: whether predictions are collapsed, unrelated to their targets, or healthy, and in words why.

A low cosine has several causes that ask for opposite cures. *Collapsed*: every context gets nearly the same prediction,
or all predictions lie along a few directions. *Uncorrelated*: predictions differ from context to context, but are no
nearer to their own target than to other windows' targets, as with weights loaded into another architecture or rows out
of step. *Weak*: they are nearer, but by less than half of what the untrained mean of the context has, as out of
distribution. Everything is measured on unit vectors u_i = p_i / |p_i| and v_i = t_i / |t_i|.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# A shorter prediction has no direction, as in the loss.
MIN_NORM = 1e-8
# Collapsed: spread or rank below this part of what the mean of the context has.
COLLAPSED = 0.1
# Uncorrelated, weak: lift below this part of that of the mean of the context.
UNCORRELATED, WEAK = 0.1, 0.5
# Standard deviations of chance that a lift has to exceed.
CHANCE_DEVIATIONS = 3.0
SUBSPACE_ENERGY = 0.9

Verdict = Literal["collapsed", "uncorrelated", "weak", "healthy", "not finite"]
# What to look for.
HINTS: dict[Verdict, str] = {
    "collapsed": "the loss has no term that keeps predictions apart, or the optimiser went too far",
    "uncorrelated": "this is no collapse: wrong weights for the class, or rows out of step, look like this",
}


@dataclass(frozen=True)
class Spread:
    """How a set of unit vectors [N, D] fills its space."""

    pairwise_cosine: float
    """Mean cosine over pairs of different rows: 1 if all are the same, 0 if they are isotropic."""
    effective_rank: float
    """exp of the entropy of the normalised singular values, 1 ... min(N, D) (Roy & Vetterli 2007); uncentred, as in
    RankMe (Garrido et al. 2023), so that one shared direction with a little noise counts as rank 1."""
    std: float
    """Mean over dimensions of the standard deviation, relative to the 1 / sqrt(D) of isotropic unit vectors."""


@dataclass(frozen=True)
class CollapsePanel:
    """What `CollapseCheck.panel` measures of one predictor on one set of windows."""

    pred: Spread
    target: Spread
    spread: float
    """(1 - pairwise cosine) of the predictions over that of the targets."""
    rank: float
    """(effective rank - 1) of the predictions over that of the targets."""
    order_sensitivity: float
    """Mean 1 - cosine between the predictions for a context and for the same vectors in another order."""
    lift: float
    """Mean cosine with the own target minus that with other windows' targets: what is lost when contexts are exchanged
    between windows."""
    reference_lift: float
    """The lift of the mean of the context."""
    chance_lift: float
    """What lift chance alone reaches: 3 standard deviations of it over random pairings of predictions and targets."""
    subspace: float
    """Part of the predictions' energy, mean |B^T u|^2, in the directions B that hold 90% of the training targets'."""
    target_subspace: float
    """The same of the targets: far below `subspace`, the model never leaves the text that it was trained on."""
    verdict: Verdict
    words: str


class TrainSubspace:
    """The fewest directions, uncentred principal components, that hold 90% of the training targets' energy."""

    def __init__(self, moment: Tensor) -> None:
        """moment: [D, D] float64, the sum of v v^T over unit training targets."""
        energy, vectors = torch.linalg.eigh(moment)
        energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)
        # Rounding must not ask for a direction more than holds everything.
        count = int((energy.cumsum(0) < (SUBSPACE_ENERGY - 1e-9) * energy.sum()).sum()) + 1
        self.basis = vectors[:, :count]  # [D, k]

    def energy(self, units: Tensor) -> float:
        """units: [N, D] float64 -> mean part of |u|^2 in the subspace."""
        return ((units @ self.basis).square().sum() / units.square().sum()).item()


class CollapseCheck:
    """What the panels of one set of windows share: the targets, and the mean of the context as the untrained level."""

    def __init__(self, targets: Tensor, mean_of_context: Tensor, independent: int, subspace: TrainSubspace) -> None:
        """targets, mean_of_context: [N, D] with N >= 2; independent: how many of the N windows share no vectors.

        Chance is that of so many rows. ValueError for a single row.
        """
        if len(targets) < 2:
            raise ValueError(f"targets must have at least 2 rows to be told apart, got {len(targets)}")
        self.units = _unit(targets)
        self.independent, self.subspace = independent, subspace
        self.target = measure_spread(self.units)
        reference = _unit(mean_of_context)
        spread = measure_spread(reference)
        self.spread_limit = COLLAPSED * min(1.0, _spread_ratio(spread, self.target))
        self.rank_limit = COLLAPSED * min(1.0, _rank_ratio(spread, self.target))
        self.reference_lift = lift(reference, self.units)

    def panel(self, pred: Tensor, reordered: Tensor) -> CollapsePanel:
        """pred: predictions [N, D]; reordered: [N, D], those for contexts whose vectors are in another order."""
        units = _unit(pred)
        spread = measure_spread(units)
        figures = {
            "pred": spread,
            "target": self.target,
            "spread": _spread_ratio(spread, self.target),
            "rank": _rank_ratio(spread, self.target),
            "order_sensitivity": max(0.0, 1 - (units * _unit(reordered)).sum(dim=1).mean().item()),
            "lift": lift(units, self.units),
            "reference_lift": self.reference_lift,
            "chance_lift": CHANCE_DEVIATIONS * chance_deviation(units, self.units) / math.sqrt(self.independent),
            "subspace": self.subspace.energy(units),
            "target_subspace": self.subspace.energy(self.units),
        }
        verdict, words = self._judge(units, **figures)
        return CollapsePanel(**figures, verdict=verdict, words=words)

    def _judge(self, units: Tensor, **figures) -> tuple[Verdict, str]:
        spread, rank, own = (figures[name] for name in ("spread", "rank", "lift"))
        needed = max(figures["chance_lift"], UNCORRELATED * self.reference_lift)
        if not units.isfinite().all():
            return "not finite", "some predictions are NaN or infinite"
        if (units == 0).all(dim=1).double().mean() > 0.5:
            return "collapsed", "most predictions are zero vectors"
        if spread < self.spread_limit:
            return "collapsed", (
                f"different contexts get nearly the same prediction: pairwise cosine "
                f"{figures['pred'].pairwise_cosine:.3f}, targets {self.target.pairwise_cosine:.3f}"
                + self._outside(figures)
            )
        if rank < self.rank_limit:
            return "collapsed", (
                f"predictions vary along {figures['pred'].effective_rank:.1f} directions only, "
                f"targets along {self.target.effective_rank:.0f}" + self._outside(figures)
            )
        if own < needed:
            return "uncorrelated", (
                f"varied (spread {spread:.2f}), but no nearer to the own target than to others' (lift {own:.3f}, below "
                f"{needed:.3f})" + self._outside(figures)
            )
        if own < WEAK * self.reference_lift:
            return "weak", (
                f"varied (spread {spread:.2f}) and related to the targets, but by {own / self.reference_lift:.0%} of "
                "what the untrained mean of the context has" + self._outside(figures)
            )
        return "healthy", f"varied (spread {spread:.2f}) and nearer to the own target than to others' (lift {own:.3f})"

    def _outside(self, figures: dict) -> str:
        """Says so where the targets leave the subspace of the training text and the predictions stay in it."""
        stays = figures["subspace"] - figures["target_subspace"]
        if stays < (1 - figures["target_subspace"]) / 2:
            return ""
        return (
            f"; it stays in the subspace of the training text ({figures['subspace']:.0%} of its energy, the targets "
            f"have {figures['target_subspace']:.0%} there)"
        )


def measure_spread(units: Tensor) -> Spread:
    """units: [N, D] float64, rows of norm 1 or 0; N >= 2."""
    count, dim = units.shape
    pairs = (units.sum(dim=0).square().sum() - units.square().sum()) / (count * (count - 1))
    # The smaller of the two Gram matrices has the same non-zero spectrum.
    gram = units.T @ units if dim <= count else units @ units.T
    # Of NaN no eigenvalues can be had.
    if not gram.isfinite().all():
        return Spread(math.nan, math.nan, math.nan)
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=MIN_NORM)
    entropy = -torch.special.xlogy(share, share).sum()
    std = units.std(dim=0, correction=0).mean() * math.sqrt(dim)
    return Spread(pairs.item(), entropy.exp().item(), std.item())


def lift(units: Tensor, targets: Tensor) -> float:
    """Mean of u_i . v_i minus the mean of u_i . v_j over j != i; both [N, D]."""
    count = len(units)
    own = (units * targets).sum()
    every = units.sum(dim=0) @ targets.sum(dim=0)
    return (own / count - (every - own) / (count * (count - 1))).item()


def chance_deviation(units: Tensor, targets: Tensor) -> float:
    """Standard deviation of one cosine over random pairings: sqrt(trace(cov(u) cov(v))), 1 / sqrt(D) where isotropic.

    The mean over N random pairs then has this over sqrt(N - 1) (Hoeffding 1951, the combinatorial limit theorem).
    """
    left, right = (rows - rows.mean(dim=0) for rows in (units, targets))
    covariances = ((rows.T @ rows) / len(rows) for rows in (left, right))
    first, second = covariances
    return (first * second).sum().clamp(min=0).sqrt().item()


def _unit(rows: Tensor) -> Tensor:
    """[N, D] -> float64 rows of norm 1; those without a direction are 0."""
    rows = rows.double()
    units = F.normalize(rows, dim=1)
    return units.masked_fill(rows.norm(dim=1, keepdim=True) < MIN_NORM, 0.0)


def _spread_ratio(spread: Spread, target: Spread) -> float:
    # Rounding can take the cosine of equal rows above 1.
    return max(0.0, 1 - spread.pairwise_cosine) / max(1 - target.pairwise_cosine, MIN_NORM)


def _rank_ratio(spread: Spread, target: Spread) -> float:
    return (spread.effective_rank - 1) / max(target.effective_rank - 1, MIN_NORM)
