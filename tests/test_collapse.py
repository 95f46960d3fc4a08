"""The collapse panel on constructed cases whose verdict is known, at several D and kinds of data."""

import math

import pytest
import torch
import torch.nn.functional as F

from amn_kernels.train.collapse import (
    COLLAPSED,
    WEAK,
    CollapseCheck,
    CollapsePanel,
    TrainSubspace,
    chance_deviation,
    lift,
    measure_spread,
)

ROWS = 600
DIMS = [4, 64, 384]


def unit(rows):
    return F.normalize(rows.double(), dim=1)


def make(dim: int, anisotropy: float = 0.0, rank: int | None = None, rows: int = ROWS):
    """Targets [N, D], a mean of the context that has half of them, and a generator.

    anisotropy: length of a direction that all share; rank: the targets lie in so many directions.
    """
    generator = torch.Generator().manual_seed(dim)
    basis = torch.randn(rank or dim, dim, generator=generator) if rank else torch.eye(dim)
    shared = anisotropy * F.normalize(torch.randn(1, dim, generator=generator)) * math.sqrt(rank or dim)
    targets = torch.randn(rows, len(basis), generator=generator) @ basis + shared
    noise = torch.randn(rows, len(basis), generator=generator) @ basis + shared
    return targets, targets + noise, generator


def judge(targets, mean, pred, reordered=None, independent=ROWS) -> CollapsePanel:
    units = unit(targets)
    check = CollapseCheck(targets, mean, independent, TrainSubspace(units.T @ units))
    return check.panel(pred, pred if reordered is None else reordered)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("anisotropy", [0.0, 1.0])
def test_the_verdicts_of_constructed_predictions(dim, anisotropy):
    targets, mean, generator = make(dim, anisotropy)
    noise = torch.randn(ROWS, dim, generator=generator)
    constant = F.normalize(torch.randn(1, dim, generator=generator)) * math.sqrt(dim)

    def verdict(pred):
        return judge(targets, mean, pred).verdict

    assert verdict(mean) == "healthy"
    assert verdict(targets) == "healthy"
    assert verdict(3 * mean + noise) == "healthy"
    # All but the same for every context, although what varies is right.
    assert verdict(constant + 0.02 * targets) == "collapsed"
    assert verdict(constant.expand(ROWS, dim)) == "collapsed"
    # As varied as the targets, but another window's.
    assert verdict(targets.roll(7, 0)) == "uncorrelated"
    assert verdict(noise) == "uncorrelated"
    assert verdict(0.25 * unit(targets).float() + unit(noise).float()) == "weak"


@pytest.mark.parametrize("dim", [64, 384])
def test_predictions_along_a_line_are_collapsed_although_they_are_spread(dim):
    targets, mean, generator = make(dim)
    line = torch.randn(1, dim, generator=generator)
    panel = judge(targets, mean, torch.where(targets[:, :1] > 0, line, -line))
    assert panel.spread > 0.9
    assert panel.pred.effective_rank == pytest.approx(1, abs=0.01)
    assert panel.verdict == "collapsed"
    assert "directions only" in panel.words


def test_limits_follow_the_data():
    # Targets of rank 3 in 64 dimensions: predictions of rank 3 are as they should be.
    targets, mean, _ = make(64, rank=3)
    assert judge(targets, mean, mean).verdict == "healthy"
    isotropic, half, _ = make(64)
    narrow = torch.zeros_like(isotropic)
    narrow[:, :3] = isotropic[:, :3]
    assert judge(isotropic, half, narrow).verdict == "collapsed"
    # Targets that are nearly all the same make a spread of a hundredth healthy, where isotropic ones do not.
    alike, mean, _ = make(64, anisotropy=10.0)
    panel = judge(alike, mean, mean)
    assert panel.pred.pairwise_cosine > 0.98
    assert panel.verdict == "healthy"
    assert judge(isotropic, half, mean).verdict == "collapsed"


@pytest.mark.parametrize("dim", DIMS)
def test_spread_limit_is_a_tenth_of_what_the_mean_of_the_context_has(dim):
    targets, mean, generator = make(dim)
    constant = F.normalize(torch.randn(1, dim, generator=generator)) * math.sqrt(dim)
    limit = COLLAPSED * judge(targets, mean, mean).spread
    verdicts = []
    for scale in torch.linspace(0.02, 1.5, 40).tolist():
        panel = judge(targets, mean, constant + scale * targets)
        verdicts.append((panel.spread, panel.verdict))
    assert {verdict for spread, verdict in verdicts if spread < 0.99 * limit} == {"collapsed"}
    above = [verdict for spread, verdict in verdicts if spread > 1.01 * limit]
    assert above.count("healthy") > len(above) / 2


@pytest.mark.parametrize("dim", DIMS)
def test_chance_depends_on_the_dimension_and_on_the_rows(dim):
    """The same lift of 0.3 is within chance in 4 dimensions and far above it in 64, where few rows tell it."""
    targets, _, generator = make(dim, rows=4000)
    noise = torch.randn(4000, dim, generator=generator)
    assert chance_deviation(unit(noise), unit(targets)) == pytest.approx(1 / math.sqrt(dim), rel=0.03)
    # A context that says nothing sets no level, so that chance alone decides.
    panel = judge(targets, noise.roll(1, 0), unit(noise) + 0.3 * unit(targets), independent=4000)
    assert panel.chance_lift == pytest.approx(3 / math.sqrt(dim * 4000), rel=0.05)
    assert panel.lift > panel.chance_lift
    assert panel.verdict == "healthy"
    few = judge(targets, noise.roll(1, 0), unit(noise) + 0.3 * unit(targets), independent=9)
    assert few.verdict == ("uncorrelated" if dim == 4 else "healthy")


def test_lifts_of_random_pairings_have_the_stated_deviation():
    targets, mean, generator = make(32, anisotropy=0.5, rows=80)
    left, right = unit(mean), unit(targets)
    lifts = torch.tensor([lift(left, right[torch.randperm(80, generator=generator)]) for _ in range(4000)])
    assert lifts.mean().abs() < 4 * lifts.std() / math.sqrt(4000)
    # lift subtracts the mean over the others, which stretches it by N / (N - 1).
    expected = chance_deviation(left, right) / math.sqrt(79) * 80 / 79
    assert lifts.std().item() == pytest.approx(expected, rel=0.04)


def test_figures_match_loops():
    targets, mean, generator = make(5, anisotropy=0.4, rows=12)
    pred, reordered = torch.randn(12, 5, generator=generator), torch.randn(12, 5, generator=generator)
    panel = judge(targets, mean, pred, reordered)
    u, v, w = unit(pred), unit(targets), unit(reordered)
    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    assert panel.pred.pairwise_cosine == pytest.approx(sum((u[i] @ u[j]).item() for i, j in pairs) / len(pairs))
    assert panel.target.pairwise_cosine == pytest.approx(sum((v[i] @ v[j]).item() for i, j in pairs) / len(pairs))
    own = sum((u[i] @ v[i]).item() for i in range(12)) / 12
    assert panel.lift == pytest.approx(own - sum((u[i] @ v[j]).item() for i, j in pairs) / len(pairs))
    assert panel.order_sensitivity == pytest.approx(1 - sum((u[i] @ w[i]).item() for i in range(12)) / 12)
    singular = torch.linalg.svdvals(u)
    share = singular / singular.sum()
    assert panel.pred.effective_rank == pytest.approx(math.exp(-(share * share.log()).sum().item()))
    assert panel.pred.std == pytest.approx(u.std(dim=0, correction=0).mean().item() * math.sqrt(5))


def test_rank_is_that_of_either_gram_matrix():
    wide = unit(torch.randn(10, 40, generator=torch.Generator().manual_seed(0)))
    singular = torch.linalg.svdvals(wide)
    share = singular / singular.sum()
    assert measure_spread(wide).effective_rank == pytest.approx(math.exp(-(share * share.log()).sum().item()))


def test_subspace_has_the_fewest_directions_with_nine_tenths_of_the_energy():
    energy = torch.tensor([50.0, 25.0, 10.0, 5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    subspace = TrainSubspace(rotation @ energy.diag() @ rotation.T)
    assert subspace.basis.shape == (8, 4)
    assert subspace.energy(rotation[:, :4].T) == pytest.approx(1)
    assert subspace.energy(rotation.T) == pytest.approx(0.5)


def test_words_say_that_predictions_stay_in_the_subspace_of_the_training_text():
    """Trained in the first 16 of 64 dimensions, tested on targets in all of them."""
    targets, mean, generator = make(64)
    train = torch.randn(ROWS, 16, generator=generator)
    units = unit(F.pad(train, (0, 48)))
    check = CollapseCheck(targets, mean, ROWS, TrainSubspace(units.T @ units))
    weak = 0.3 * targets + torch.randn(ROWS, 64, generator=generator)
    assert "subspace of the training text" not in check.panel(weak, weak).words
    weak[:, 16:] = 0
    panel = check.panel(weak, weak)
    assert panel.lift < WEAK * panel.reference_lift
    assert "it stays in the subspace of the training text (88% of its energy, the targets have 2" in panel.words


def test_predictions_without_a_direction_or_a_number():
    targets, mean, _ = make(64)
    zeros = judge(targets, mean, torch.zeros_like(targets))
    assert (zeros.verdict, zeros.words) == ("collapsed", "most predictions are zero vectors")
    broken = mean.clone()
    broken[3, 2] = math.nan
    assert judge(targets, mean, broken).verdict == "not finite"
    with pytest.raises(ValueError, match="at least 2 rows to be told apart, got 1"):
        judge(targets[:1], mean[:1], mean[:1])
