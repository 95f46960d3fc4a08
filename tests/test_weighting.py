"""The weightings: formulas of `BalancedWeighting`, guards, state, and other people's weightings as callables."""

import copy
import importlib
import math

import pytest
import torch
from error_rule import make_rows
from host_reads import NoHostReads

from amn_kernels import FusedSeqLoss, backends, functional, ops
from amn_kernels.options import LossOptions
from amn_kernels.reference.balance import LEAST, MOST, SPIKE, SPIKE_AFTER, balance
from amn_kernels.weighting import BalancedWeighting


def balanced(weighting="gradient", **options):
    return BalancedWeighting(LossOptions(weighting=weighting, **options))


@pytest.fixture(autouse=True, params=["compiled", "plain"])
def step(request, monkeypatch):
    """Every test runs on the compiled step and on its twin in plain PyTorch, of modules too: these choose a backend."""
    if request.param == "plain":
        monkeypatch.setattr(ops, "balance", balance)
        monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    return request.param


def test_the_plain_step_is_taken_where_it_is_asked_for(step, monkeypatch):
    taken = []
    monkeypatch.setattr(ops, "balance", lambda *arguments: taken.append(True) or balance(*arguments))
    pred, target = make_rows(5, 3)
    FusedSeqLoss(infonce=1.0)(pred.requires_grad_(), target)
    assert bool(taken) == (step == "plain")


def observe(weighting, *observed):
    """Weights after a call that sees these squared norms (gradient) or values (value)."""
    observed = torch.tensor(observed)
    return weighting(observed, torch.diag(observed)).tolist()


def test_first_batch_is_balanced_already():
    # Squared norms 4 and 1e6: InfoNCE must pull 0.5/2 times as hard as MSE, whose weight stays 2.
    weighting = balanced(mse=2.0, infonce=0.5)
    mse, infonce = observe(weighting, 4.0, 1e6)
    assert mse == 2.0
    assert infonce * 1e3 == pytest.approx(0.5 * 2.0, rel=1e-6)


def test_running_mean_is_bias_corrected():
    weighting = balanced(mse=1.0, infonce=1.0, ema=0.9)
    observe(weighting, 1.0, 16.0)
    _, infonce = observe(weighting, 4.0, 16.0)
    # Weighted by 0.9 and 1: (0.9 * 1 + 4) / 1.9, as written out for two updates.
    assert infonce == pytest.approx(math.sqrt((0.9 * 1.0 + 4.0) / 1.9 / 16.0), rel=1e-5)


def test_constant_input_gives_its_own_mean_from_the_first_update_on():
    weighting = balanced(mse=1.0, infonce=1.0, ema=0.99)
    for _ in range(5):
        assert observe(weighting, 9.0, 1.0) == pytest.approx([1.0, 3.0], rel=1e-5)


def test_spike_of_a_term_does_not_exceed_its_share():
    weighting = balanced(mse=1.0, infonce=1.0)
    for _ in range(20):
        observe(weighting, 1.0, 1.0)
    _, infonce = observe(weighting, 1.0, 1e8)  # norm 1e4 in this batch: the weight is 1e-4 at once
    assert infonce * 1e4 <= 1.0 + 1e-4


def test_spike_is_winsorised_after_ten_updates_and_not_before():
    def mean_after(quiet):
        weighting = balanced(mse=1.0, infonce=1.0, ema=0.9)
        for _ in range(quiet):
            observe(weighting, 1.0, 1.0)
        observe(weighting, 1.0, 1e6)
        return (weighting.mean / (1 - weighting.decay**weighting.updates))[1].item()

    correction = 0.1 / (1 - 0.9 ** (SPIKE_AFTER + 1))
    assert mean_after(SPIKE_AFTER) == pytest.approx(1 + (SPIKE - 1) * correction, rel=1e-5)
    assert mean_after(SPIKE_AFTER - 1) > 1e4


@pytest.mark.parametrize(("squared", "bound"), [(1e-16, MOST), (1e16, LEAST)])
def test_weight_is_clamped_relative_to_lambda(squared, bound):
    _, infonce = observe(balanced(mse=1.0, infonce=0.5), 1.0, squared)
    assert infonce == pytest.approx(0.5 * bound, rel=1e-5)


@pytest.mark.parametrize(("value", "bound"), [(1e-12, MOST), (1e12, LEAST)])
def test_weights_by_value_are_clamped_too(value, bound):
    _, infonce = observe(balanced("value", mse=1.0, infonce=0.5), 1.0, value)
    assert infonce == pytest.approx(0.5 * bound, rel=1e-5)


@pytest.mark.parametrize("hinge", ["moment", "variance"])
def test_hinges_are_not_amplified_by_value_either(hinge):
    assert observe(balanced("value", mse=1.0, **{hinge: 0.5}), 1.0, 1e-8)[1] == 0.5
    assert observe(balanced("value", mse=1.0, **{hinge: 0.5}), 1.0, 100.0)[1] == pytest.approx(0.005, rel=1e-5)


@pytest.mark.parametrize("hinge", ["moment", "variance"])
def test_hinges_are_damped_but_never_amplified(hinge):
    assert observe(balanced(mse=1.0, **{hinge: 0.5}), 1.0, 1e-8)[1] == 0.5
    assert observe(balanced(mse=1.0, **{hinge: 0.5}), 1.0, 1e8)[1] == pytest.approx(0.5e-4, rel=1e-5)


def test_anchor_is_mse_or_the_first_term_or_the_one_named():
    assert observe(balanced(mse=1.0, cosine=1.0), 1.0, 4.0) == [1.0, 0.5]
    assert observe(balanced(mse=0.0, cosine=1.0, infonce=1.0), 1.0, 4.0) == [1.0, 0.5]
    assert observe(balanced(mse=1.0, cosine=1.0, anchor="cosine"), 1.0, 4.0) == [2.0, 1.0]


def test_value_weighting_balances_values():
    weighting = balanced("value", mse=1.0, infonce=0.5, ema=0.9)
    observe(weighting, 0.002, 1.4)
    _, infonce = observe(weighting, 0.004, 0.7)
    mean = [(0.9 * 0.002 + 0.004) / 1.9, (0.9 * 1.4 + 0.7) / 1.9]
    assert infonce == pytest.approx(0.5 * mean[0] / mean[1], rel=1e-5)


@pytest.mark.parametrize("unusable", [0.0, math.nan, math.inf])
def test_unusable_observation_is_counted_and_changes_no_state(unusable):
    weighting = balanced(mse=1.0, infonce=1.0)
    observe(weighting, 1.0, 4.0)
    before = weighting.mean.clone()
    observe(weighting, 1.0, unusable)
    assert weighting.mean[1] == before[1]
    assert weighting.skipped.tolist() == [0, 1]
    assert observe(weighting, 1.0, 4.0) == pytest.approx([1.0, 0.5], rel=1e-5)


def test_term_or_anchor_without_state_keeps_lambda():
    assert observe(balanced(mse=2.0, infonce=0.5), 1.0, 0.0) == [2.0, 0.5]
    assert observe(balanced(mse=2.0, infonce=0.5), 0.0, 1.0) == [2.0, 0.5]


def test_eval_mode_and_no_grad_freeze_the_state():
    criterion = FusedSeqLoss(mse=1.0, infonce=1.0, weighting="gradient")
    pred, target = make_rows(40, 8)
    criterion(pred.clone().requires_grad_(), target)
    frozen = copy.deepcopy(criterion.state_dict())
    weights = criterion.stats.weights.clone()
    criterion.eval()
    criterion((pred * 3).requires_grad_(), target)
    criterion.train()
    with torch.no_grad():
        criterion(pred * 3, target)  # no gradients, nothing to observe
    assert all(
        torch.equal(frozen[name], value) for name, value in criterion.state_dict().items() if "extra" not in name
    )
    torch.testing.assert_close(criterion.stats.weights, weights)


def test_update_every_so_many_calls():
    weighting = balanced(mse=1.0, infonce=1.0, update_every=3)
    for k in range(7):
        observe(weighting, 1.0 + k, 1.0)
    assert weighting.updates.tolist() == [3, 3]  # calls 0, 3 and 6
    assert weighting.calls.item() == 7


def test_shares_follow_the_lambdas_whatever_the_scale():
    pred, target = make_rows(64, 32)
    for scale in (1.0, 30.0, 0.03):
        criterion = FusedSeqLoss(mse=0.75, infonce=0.25, weighting="gradient")
        criterion((pred * scale).requires_grad_(), target * scale)
        numbers = criterion.stats.as_dict()
        assert numbers["share_mse"] == pytest.approx(0.75, rel=1e-4)
        assert numbers["share_infonce"] == pytest.approx(0.25, rel=1e-4)


def test_a_function_balances_each_call_alone():
    for scale in (1.0, 100.0):  # a state kept from the first would give the second other shares
        pred, target = make_rows(64, 32)
        _, stats = functional.seq_loss((scale * pred).requires_grad_(), target, mse=0.75, infonce=0.25)
        assert stats.share["infonce"].item() == pytest.approx(0.25, rel=1e-4)


def test_norms_never_see_the_scale_of_the_loss():
    pred, target = make_rows(64, 32)
    weights = []
    for scale in (1.0, 65536.0):
        criterion = FusedSeqLoss(mse=0.5, infonce=0.5, weighting="gradient")
        for _ in range(2):
            (criterion(pred.clone().requires_grad_(), target) * scale).backward()
        weights.append(criterion.stats.weights)
    assert torch.equal(*weights)


def test_gradient_is_the_weighted_sum_with_the_weights_held_constant():
    pred, target = make_rows(33, 7, dtype=torch.float64)
    criterion = FusedSeqLoss(mse=0.5, cosine=0.2, infonce=0.5, weighting="gradient", backend="cpu")
    leaf = pred.clone().requires_grad_()
    criterion(leaf, target).backward()
    weights = dict(zip(("mse", "cosine", "infonce"), criterion.stats.weights.tolist(), strict=True))
    truth = pred.clone().requires_grad_()
    FusedSeqLoss(**weights, weighting="fixed", backend="reference")(truth, target).backward()
    torch.testing.assert_close(leaf.grad, truth.grad, rtol=1e-9, atol=1e-15)


def test_backends_agree_on_the_weights():
    pred, target = make_rows(50, 9)
    weights = []
    for backend in ("cpu", "reference"):
        criterion = FusedSeqLoss(mse=0.5, cosine=0.1, infonce=0.5, weighting="gradient", backend=backend)
        for k in range(3):
            criterion((pred + 0.1 * k).requires_grad_(), target)
        weights.append(criterion.stats.weights)
    torch.testing.assert_close(*weights, rtol=1e-5, atol=0)  # float32 norms


@pytest.mark.parametrize("kind", ["gradient", "value"])
def test_options_of_the_state_reach_every_backend(kind):
    options = {"mse": 0.5, "cosine": 0.2, "infonce": 0.5, "weighting": kind}
    options |= {"anchor": "infonce", "update_every": 3, "ema": 0.8}
    ours, theirs = (FusedSeqLoss(**options, backend=backend) for backend in ("cpu", "reference"))
    for k in range(8):
        pred, target = make_rows(40, 8, seed=k)
        for criterion in (ours, theirs):
            criterion((pred * (1 + k)).requires_grad_(), target)
        torch.testing.assert_close(ours.stats.weights, theirs.stats.weights, rtol=1e-5, atol=0)
    assert ours.stats.weight["infonce"] == 0.5
    torch.testing.assert_close(ours.weighting.mean, theirs.weighting.mean, rtol=1e-5, atol=0)
    assert ours.weighting.updates.tolist() == [3, 3, 3]


def test_monitored_term_takes_no_part():
    pred, target = make_rows(40, 8)
    criterion = FusedSeqLoss(mse=1.0, cosine=1.0, weighting="gradient", monitor=("infonce",))
    criterion(pred.clone().requires_grad_(), target)
    assert criterion.stats.weight["infonce"] == 0
    assert criterion.weighting.skipped.tolist() == [0, 0, 0]
    assert "infonce" not in criterion.stats.share


@pytest.mark.parametrize("name", ["UPGradWeighting", "MGDAWeighting", "PCGradWeighting", "DualProjWeighting"])
def test_weightings_of_torchjd_are_callables(name):
    aggregation = importlib.import_module("torchjd.aggregation")
    torch.manual_seed(3)
    pred, target = make_rows(40, 8)
    weighting = getattr(aggregation, name)()
    seen = []

    def function(gramian, values):
        seen.append((gramian, values))
        return weighting(gramian)

    criterion = FusedSeqLoss(mse=0.5, infonce=2.0, monitor=("cosine",), weighting=function)
    torch.manual_seed(5)  # PCGrad draws a random order
    criterion(pred.clone().requires_grad_(), target).backward()
    (gramian, values), stats = seen[0], criterion.stats
    assert gramian.shape == (2, 2)
    torch.testing.assert_close(values, torch.stack([stats.value["mse"], stats.value["infonce"]]))
    torch.manual_seed(5)
    expected = weighting(gramian) * torch.tensor([0.5, 2.0])
    torch.testing.assert_close(torch.stack([stats.weight["mse"], stats.weight["infonce"]]), expected)
    assert stats.weight["cosine"] == 0


def test_callable_must_return_a_weight_per_term():
    criterion = FusedSeqLoss(mse=1.0, infonce=1.0, weighting=lambda gramian, values: values[:1])
    pred, target = make_rows(4, 3)
    with pytest.raises(ValueError, match=r"weighting must return .*\[2\].*got \[1\]"):
        criterion(pred.requires_grad_(), target)


def test_a_function_runs_outside_of_autocast():
    def function(gramian, values):
        return (gramian @ torch.ones_like(values)).rsqrt()

    pred, target = make_rows(40, 8)
    criterion = FusedSeqLoss(mse=0.5, infonce=2.0, weighting=function)
    criterion(pred.requires_grad_(), target)
    wanted = criterion.stats.weights
    with torch.autocast("cpu", torch.bfloat16):
        criterion(pred, target)
    assert torch.equal(criterion.stats.weights, wanted)


@pytest.mark.parametrize("kind", ["gradient", "value"])
def test_under_a_transform_the_state_moves_or_it_is_an_error(kind, step):
    pred, target = make_rows(12, 5)
    criterion = FusedSeqLoss(mse=0.5, infonce=0.5, weighting=kind)
    if step == "plain":
        with pytest.raises(ValueError, match=rf"'fixed', or the loss in eval mode, .* for cpu, got '{kind}'"):
            torch.func.grad(criterion)(pred, target)
    else:
        torch.func.grad(criterion)(pred, target)
        assert criterion.weighting.updates.tolist() == [1, 1]
    criterion.eval()
    got = torch.func.grad(criterion)(pred, target)
    leaf = pred.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(criterion(leaf, target), leaf)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def ones(gram, values):
    """A weighting by a function."""
    return torch.ones_like(values)


@pytest.mark.parametrize("weighting", ["fixed", "value", "gradient", ones])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_is_read_on_the_host(weighting, backend):
    pred, target = make_rows(40, 8)
    criterion = FusedSeqLoss(
        mse=0.5, cosine=0.1, infonce=0.5, weighting=weighting, backend=backend, monitor=("moment",)
    )
    with NoHostReads():
        for _ in range(2):
            criterion(pred.clone().requires_grad_(), target).backward()
        assert criterion.stats.share
        assert criterion.stats.grad_norm
        assert criterion.stats.gradient_cosine
    with pytest.raises(AssertionError, match="waits for the device"), NoHostReads():
        criterion.stats.weights.sum().item()  # the detector detects


def test_compiled_in_one_graph_with_its_state():
    torch._dynamo.reset()
    pred, target = make_rows(40, 8)
    eager = FusedSeqLoss(mse=0.5, infonce=0.5, weighting="gradient")
    criterion = copy.deepcopy(eager)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for k in range(3):
        eager((pred * (1 + k)).requires_grad_(), target)
        compiled((pred * (1 + k)).requires_grad_(), target)
    torch.testing.assert_close(criterion.stats.weights, eager.stats.weights)
    torch.testing.assert_close(criterion.weighting.mean, eager.weighting.mean)
    assert criterion.weighting.updates.tolist() == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["gradient", "value"])
def test_op_passes_opcheck(kind, dtype):
    weighting = balanced(kind, mse=1.0, infonce=0.5)
    values = torch.tensor([0.5, 3.0], dtype=dtype)
    arguments = (values, torch.diag(values), weighting.mean, weighting.updates, weighting.calls, weighting.skipped)
    constants = (*weighting.constants.on(values.device), 0, 0.9, 1, kind == "value", True)
    torch.library.opcheck(torch.ops.amn_kernels._balance.default, (*arguments, *constants))


def test_bias_correction_survives_a_slow_decay():
    # 1 - decay is below the resolution of float32 near 1.
    assert observe(balanced(mse=1.0, infonce=0.5, ema=1 - 1e-8), 4.0, 1.0) == pytest.approx([1.0, 1.0], rel=1e-6)
