"""The audit: its figures against automatic differentiation, its verdict, and that it changes nothing."""

import copy
import dataclasses
import importlib
import itertools
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import amn_kernels
from amn_kernels import FusedSeqLoss
from amn_kernels.audit import DROWNS, audit, calibrate

measuring = importlib.import_module("amn_kernels.audit")  # the package has the function under this name

DIM = 16
CLIFF = {"mse": 0.5, "infonce": 0.5, "weighting": "fixed"}


def batches(count=1, rows=32, scale=0.05):
    """Short vectors: their MSE is small beside InfoNCE, which sees directions alone."""
    generator = torch.Generator().manual_seed(1)
    return [tuple(scale * torch.randn(2, rows, DIM, generator=generator)) for _ in range(count)]


def linear() -> nn.Linear:
    return nn.Linear(DIM, DIM, bias=False)


def by_autograd(pred, target, temperature=0.07):
    """Values and gradients [N, D] of the three terms, from their formulas."""
    pred = pred.detach().requires_grad_()
    logits = F.normalize(pred, dim=1) @ F.normalize(target, dim=1).T / temperature
    losses = {
        "mse": F.mse_loss(pred, target),
        "cosine": 1 - F.cosine_similarity(pred, target).mean(),
        "infonce": F.cross_entropy(logits, torch.arange(len(pred))),
    }
    gradients = {name: torch.autograd.grad(loss, pred, retain_graph=True)[0] for name, loss in losses.items()}
    return {name: loss.item() for name, loss in losses.items()}, gradients


def test_figures_of_a_linear_model_are_those_of_autograd():
    model, data = linear(), batches(3)
    criterion = FusedSeqLoss(mse=2.0, cosine=0.5, infonce=0.25, weighting="fixed")
    start = audit(model, data, criterion, probe_steps=0).start
    measured = [by_autograd(model(context), target) for context, target in data]
    lambdas = {"mse": 2.0, "cosine": 0.5, "infonce": 0.25}
    norms = {name: sum(gradients[name].norm().item() for _, gradients in measured) / 3 for name in lambdas}
    pulls = {name: lambdas[name] * norms[name] for name in lambdas}
    for name, term in start.terms.items():
        value = sum(values[name] for values, _ in measured) / 3
        assert term.value == pytest.approx(value, rel=1e-4)
        assert term.weight == pytest.approx(lambdas[name])
        assert term.contribution == pytest.approx(lambdas[name] * value, rel=1e-4)
        assert term.grad_norm == pytest.approx(norms[name], rel=1e-4)
        assert term.ratio == pytest.approx(pulls[name] / pulls["mse"], rel=1e-4)
        assert term.share == pytest.approx(pulls[name] / sum(pulls.values()), rel=1e-4)
    cosines = {
        pair: sum(
            F.cosine_similarity(*(gradients[name].flatten() for name in pair), dim=0) for _, gradients in measured
        )
        for pair in itertools.combinations(lambdas, 2)
    }
    pair = min(cosines, key=cosines.get)
    assert start.conflict_pair == pair
    assert start.conflict == pytest.approx(cosines[pair].item() / 3, abs=1e-4)
    assert start.chance == pytest.approx(torch.tensor(32.0).log().item())
    cosine = torch.stack([F.cosine_similarity(model(context), target).mean() for context, target in data]).mean()
    assert start.cosine_similarity == pytest.approx(cosine.item(), rel=1e-4)


def test_the_historic_setting_is_dominated_and_balance_is_not():
    model, data = linear(), batches(8)
    cliff = audit(model, data, FusedSeqLoss(**CLIFF))
    assert cliff.dominated
    assert cliff.start.terms["infonce"].ratio > DROWNS
    share = f"{100 * cliff.start.terms['infonce'].share:.2f}".rstrip("0")
    assert f"infonce would drive {share}% of the update" in cliff.verdict
    assert "mse is drowned" in cliff.verdict
    assert "weighting='gradient'" in cliff.verdict
    assert f"infonce={cliff.calibrated['infonce']:.3g}" in cliff.verdict

    balanced = audit(model, data, FusedSeqLoss(**CLIFF | {"weighting": "gradient"}))
    assert not balanced.dominated
    for measurement in (balanced.start, balanced.after_probe):
        assert measurement.terms["infonce"].share == pytest.approx(0.5, abs=0.05)
    assert "No term drowns another" in balanced.verdict
    assert "Recommended" not in balanced.verdict


def test_a_small_share_that_was_asked_for_is_not_domination():
    report = audit(linear(), batches(), FusedSeqLoss(mse=0.98, infonce=0.02, weighting="gradient"), probe_steps=0)
    assert report.start.terms["mse"].share == pytest.approx(0.98, abs=1e-3)
    assert not report.dominated
    # Nor is a tiny fixed weight: the gradients are so far apart that it is the λ that is fair.
    report = audit(linear(), batches(), FusedSeqLoss(mse=1.0, infonce=1e-9, weighting="fixed"), probe_steps=0)
    assert not report.dominated


@pytest.mark.parametrize(("excess", "dominated"), [(0.9 * DROWNS, False), (1.1 * DROWNS, True)])
def test_the_threshold_is_the_documented_one(excess, dominated):
    model, data = linear(), batches()
    ratio = audit(model, data, FusedSeqLoss(mse=1.0, cosine=1.0, weighting="fixed"), probe_steps=0)
    ratio = ratio.start.terms["cosine"].ratio
    # The gradients are far enough apart that a λ which asks for little makes cosine pull `excess` times as hard.
    assert ratio > 2 * DROWNS
    report = audit(model, data, FusedSeqLoss(mse=1.0, cosine=excess / ratio, weighting="fixed"), probe_steps=0)
    assert report.start.terms["cosine"].ratio == pytest.approx(excess, rel=1e-4)
    assert report.dominated is dominated


def test_recommended_lambdas_give_the_asked_shares_as_fixed_weights():
    model, data = linear(), batches()
    lambdas = {"mse": 0.5, "cosine": 0.2, "infonce": 0.3}
    report = audit(model, data, FusedSeqLoss(**lambdas, weighting="fixed"), probe_steps=0)
    assert report.dominated
    again = audit(model, data, FusedSeqLoss(**report.calibrated, weighting="fixed"), probe_steps=0)
    for name, share in lambdas.items():
        assert again.start.terms[name].share == pytest.approx(share, rel=0.05)
    assert not again.dominated


def test_calibration_never_amplifies_a_hinge_nor_divides_by_a_missing_gradient():
    lambdas = {"mse": 1.0, "infonce": 0.5, "moment": 0.1, "variance": 0.2}
    norms = {"mse": 1.0, "infonce": 0.0, "moment": 0.01, "variance": 10.0}
    expected = {"mse": 1.0, "infonce": 0.5, "moment": 0.1, "variance": 0.02}
    assert calibrate(lambdas, norms, "mse") == pytest.approx(expected)


def test_a_hinge_that_has_faded_is_not_drowned():
    criterion = FusedSeqLoss(mse=1.0, variance=1.0, variance_target=1e-3, weighting="fixed")
    report = audit(linear(), batches(scale=1.0), criterion, probe_steps=0)
    assert not report.dominated
    assert "variance sends no gradient" in report.verdict
    # Wrong rows whose moments all but match.
    target = torch.randn(64, DIM)
    criterion = FusedSeqLoss(mse=1.0, moment=1.0, weighting="fixed")
    report = audit(lambda _: target.roll(1, dims=0) * 1.001, [(None, target)], criterion)
    assert 0 < report.start.terms["moment"].ratio < 1 / DROWNS
    assert not report.dominated


def test_opposed_terms_are_named():
    # Wrong and too short: MSE would have it shorter still, moment would have it spread as the targets are.
    target = torch.randn(64, DIM)
    pred = target.roll(1, dims=0) * 0.7
    report = audit(lambda _: pred, [(None, target)], FusedSeqLoss(mse=1.0, moment=1.0, weighting="fixed"))
    assert report.start.conflict < 0
    assert "mse and moment pull against each other" in report.verdict


def test_model_criterion_and_random_numbers_are_left_as_they_are():
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM), nn.Dropout(0.5), linear()).eval()
    criterion = FusedSeqLoss(**CLIFF | {"weighting": "gradient"})
    criterion(torch.randn(4, DIM, requires_grad=True), torch.randn(4, DIM))
    criterion.eval()

    def tensors() -> list:
        named = model.state_dict() | criterion.state_dict()
        state = [tensor for tensor in named.values() if isinstance(tensor, torch.Tensor)]
        return [*state, criterion.stats.values, torch.get_rng_state()]

    before = copy.deepcopy(tensors())
    report = audit(model, batches(4), criterion)
    after = tensors()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in (*model.modules(), *criterion.modules()))
    # And yet the probe moved: the copy was trained.
    assert report.after_probe.terms["mse"].value != report.start.terms["mse"].value


def test_random_numbers_of_a_loader_are_put_back():
    model, rows = linear(), torch.randn(64, DIM)
    loader = torch.utils.data.DataLoader(list(zip(rows, rows, strict=True)), batch_size=8, shuffle=True)
    before = torch.get_rng_state()
    audit(model, loader, FusedSeqLoss(mse=1.0), probe_steps=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (-0.012, -0.003, "rose from -0.012 to -0.003"),
        (-0.05, -0.10, "fell from -0.050 to -0.100"),
        (-0.0004, 0.0004, "stayed at 0.000"),
        (0.55, 0.297, "fell from 0.550 to 0.297"),
    ],
)
def test_the_verdict_says_which_way_the_cosine_went(monkeypatch, before, after, says):
    measure, cosines = measuring._measure, iter((before, after))

    def measured(*arguments):
        return dataclasses.replace(measure(*arguments), cosine_similarity=next(cosines))

    monkeypatch.setattr(measuring, "_measure", measured)
    report = audit(linear(), batches(2), FusedSeqLoss(mse=1.0), probe_steps=2)
    assert f"In 2 steps the cosine between prediction and target {says}." in report.verdict


def test_probe_takes_the_steps_of_a_training():
    model, data = linear(), batches(8)
    # Towards the context itself, so that a few small steps show in the cosine.
    data = [(context, context) for context, _ in data]
    report = audit(model, data, FusedSeqLoss(mse=1.0), probe_steps=12)
    trained = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4)
    for step in range(12):
        context, target = data[step % 8]
        optimizer.zero_grad()
        F.mse_loss(trained(context), target).backward()
        optimizer.step()
    value = torch.stack([F.mse_loss(trained(context), target) for context, target in data]).mean().item()
    assert report.after_probe.terms["mse"].value == pytest.approx(value, rel=1e-4)
    assert report.after_probe.terms["mse"].value < report.start.terms["mse"].value
    assert "mse is the only term" in report.verdict
    assert "In 12 steps the cosine between prediction and target rose" in report.verdict


def test_a_function_is_measured_and_not_probed():
    report = audit(lambda context: context[:, 0], ((x[:, None], y) for x, y in batches(2)), FusedSeqLoss(**CLIFF))
    assert report.after_probe is None
    assert report.probe_steps == 0
    assert report.dominated


def test_the_loader_is_read_no_further_than_needed():
    read = []
    loader = (read.append(number) or batch for number, batch in enumerate(itertools.cycle(batches())))
    audit(linear(), loader, FusedSeqLoss(mse=1.0), probe_steps=3)
    assert len(read) <= 9


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="loader gave no batch"):
        audit(linear(), [], FusedSeqLoss())
    with pytest.raises(ValueError, match="probe_steps must be a whole number >= 0, got -1"):
        audit(linear(), batches(), FusedSeqLoss(), probe_steps=-1)
    broken = torch.full((4, DIM), float("nan"))
    with pytest.raises(FloatingPointError, match="of mse that isn't finite"):
        audit(lambda context: context, [(broken, broken)], FusedSeqLoss())


def test_report_as_json_and_as_table():
    from rich import console as rich_console

    report = audit(linear(), batches(2), FusedSeqLoss(**CLIFF))
    assert json.loads(json.dumps(report.as_dict()))["start"]["terms"]["infonce"]["share"] > 0.9
    assert str(report) == report.verdict
    console = rich_console.Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    text = console.export_text()
    assert "█" in text
    assert "…" not in text
    assert "after 20 steps" in text
    assert f"{100 * report.start.terms['infonce'].share:.2f}"[:4] in text


def test_audit_needs_torch_alone(monkeypatch):
    for name in ("rich", "matplotlib", "tyro", "safetensors"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "amn_kernels.audit")
    # Importing a module again rebinds its name in the package; this brings the first one back afterwards.
    monkeypatch.setattr(amn_kernels, "audit", None, raising=False)
    report = importlib.import_module("amn_kernels.audit").audit(linear(), batches(), FusedSeqLoss(mse=1.0))
    assert "only term" in str(report)
