"""What a call reports, and what the user is told once."""

import math
import warnings

import pytest
import torch
from error_rule import TERMS, make_rows, truth
from test_module import ALL

from amn_kernels import FusedSeqLoss, functional
from amn_kernels.stats import METRICS, DominanceWarning, UnbalancedWarning


def test_stats_as_dict():
    pred, target = make_rows(33, 7)
    loss, stats = functional.seq_loss(
        pred.requires_grad_(), target, backend="cpu", cosine=0.5, monitor=("infonce",), weighting="fixed"
    )
    flat = stats.as_dict()
    of_term = {f"{what}_{term}" for what in ("loss", "weight", "contribution") for term in ("mse", "cosine", "infonce")}
    of_gradient = {f"{what}_{term}" for what in ("grad_norm", "share") for term in ("mse", "cosine")}
    assert set(flat) == of_term | of_gradient | {"gradient_cosine_mse_cosine"} | set(METRICS)
    true = {term: truth(pred, target, **TERMS[term]) for term in ("mse", "cosine", "infonce")}
    for term, weight in {"mse": 1.0, "cosine": 0.5, "infonce": 0.0}.items():
        value = true[term].loss.item()
        assert flat[f"loss_{term}"] == pytest.approx(value, rel=1e-6)
        assert flat[f"weight_{term}"] == weight
        assert flat[f"contribution_{term}"] == pytest.approx(weight * value, rel=1e-6)
    for term in ("mse", "cosine"):
        assert flat[f"grad_norm_{term}"] == pytest.approx(true[term].grad.norm().item(), rel=1e-6)
    mse_grad, cosine_grad = true["mse"].grad.flatten(), true["cosine"].grad.flatten()
    pulls = mse_grad.norm() + 0.5 * cosine_grad.norm()
    assert flat["share_mse"] == pytest.approx((mse_grad.norm() / pulls).item(), rel=1e-6)
    assert flat["share_cosine"] == pytest.approx((0.5 * cosine_grad.norm() / pulls).item(), rel=1e-6)
    angle = torch.nn.functional.cosine_similarity(mse_grad, cosine_grad, dim=0).item()
    assert flat["gradient_cosine_mse_cosine"] == pytest.approx(angle, rel=1e-6)
    contributions = sum(value for name, value in flat.items() if name.startswith("contribution"))
    assert contributions == pytest.approx(loss.item(), rel=1e-6)
    assert all(isinstance(value, float) for value in flat.values())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_was_not_computed_is_absent(backend):
    pred, target = make_rows(33, 7)
    _, stats = functional.seq_loss(pred, target, backend=backend, mse=0.0, cosine=1.0)
    assert set(stats.value) == set(stats.weight) == set(stats.contribution) == {"cosine"}
    assert stats.grad_norm == {}
    assert stats.top1 is None
    assert stats.chance is None
    assert set(stats.as_dict()) == {
        "loss_cosine", "weight_cosine", "contribution_cosine", "cosine_similarity", "pred_norm", "target_norm",
    }  # fmt: skip


def test_stats_hold_no_graph():
    pred, target = make_rows(33, 7)
    for backend in ("cpu", "reference"):
        _, stats = functional.seq_loss(pred.requires_grad_(), target, backend=backend, **ALL)
        tensors = [stats.values, stats.weights, stats.metrics] + ([] if stats.gram is None else [stats.gram])
        assert not any(x.requires_grad for x in tensors)


def test_stats_before_a_call():
    with pytest.raises(RuntimeError, match="not been called"):
        FusedSeqLoss().stats  # noqa: B018


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_shares_and_angles_without_a_gradient_are_no_numbers(backend):
    pred, target = make_rows(12, 5)
    options = {"mse": 1.0, "variance": 1.0, "variance_target": 1e-6, "weighting": "fixed", "backend": backend}
    _, stats = functional.seq_loss(pred.clone().requires_grad_(), target, **options)
    assert stats.share["mse"] == 1  # the hinge is met
    assert stats.share["variance"] == 0
    assert stats.gradient_cosine["mse", "variance"].isnan()
    _, stats = functional.seq_loss(target.clone().requires_grad_(), target, **options)
    assert all(share.isnan() for share in stats.share.values())
    numbers = stats.as_dict()
    assert all(math.isnan(numbers[name]) for name in ("share_mse", "share_variance", "gradient_cosine_mse_variance"))


def test_drowning_under_fixed_weights_is_told_once():
    pred, target = make_rows(64, 32)
    pred, target = pred / 50, target / 50  # unit-like norms: the gradient of mse is thousands of times smaller
    criterion = FusedSeqLoss(mse=0.5, infonce=0.5, weighting="fixed")
    criterion(pred.requires_grad_(), target)
    with pytest.warns(DominanceWarning, match=r"infonce is [\d,]+ times that of mse.*weighting='gradient'"):
        criterion.stats.as_dict()
    criterion(pred, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion.stats.as_dict()


@pytest.mark.parametrize(("scale", "drowns"), [(1.0, False), (1 / 50, True)])
def test_a_pull_that_was_asked_for_is_no_drowning(scale, drowns, recwarn):
    pred, target = make_rows(64, 32)
    criterion = FusedSeqLoss(mse=0.001, infonce=1.0, weighting="fixed")
    criterion((pred * scale).requires_grad_(), target * scale)
    shares = criterion.stats.share
    assert shares["infonce"] / shares["mse"] > 1000  # what λ ask for
    criterion.stats.as_dict()
    assert [warning.category for warning in recwarn] == [DominanceWarning] * drowns


def test_a_target_trained_against_a_fixed_pred_is_told_once():
    pred, target = make_rows(20, 8)
    criterion = FusedSeqLoss(mse=0.5, infonce=0.5, weighting="gradient")
    with pytest.warns(UnbalancedWarning, match="balances gradients at pred, and pred requires none"):
        criterion(pred, target.requires_grad_())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(pred, target)
        fresh = FusedSeqLoss(mse=0.5, infonce=0.5, weighting="gradient")
        fresh(pred, target.detach())
        fresh(pred.requires_grad_(), target)
        FusedSeqLoss(mse=0.5, infonce=0.5, weighting="value")(pred.detach(), target)
        FusedSeqLoss(mse=0.0, infonce=0.5)(pred.detach(), target)
        FusedSeqLoss(mse=0.5, infonce=0.5, learnable_temperature=True)(pred.detach(), target.detach())


@pytest.mark.parametrize("loss", [FusedSeqLoss(infonce=0.5), lambda *rows: functional.seq_loss(*rows, infonce=0.5)])
def test_the_warning_points_at_the_call(loss):
    pred, target = make_rows(20, 8)
    with pytest.warns(UnbalancedWarning) as told:
        loss(pred, target.requires_grad_())
    assert [warning.filename for warning in told] == [__file__]


def test_balanced_weights_are_not_warned_of(recwarn):
    pred, target = make_rows(64, 32)
    criterion = FusedSeqLoss(mse=0.5, infonce=0.5, weighting="gradient")
    criterion((pred / 50).requires_grad_(), target / 50)
    criterion.stats.as_dict()
    assert not recwarn.list
