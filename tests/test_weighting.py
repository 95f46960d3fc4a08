"""The weightings: formulas of `BalancedWeighting`, guards, state, and other people's weightings as callables."""

import copy
import importlib
import math
import warnings

import pytest
import torch
from error_rule import make_rows
from host_reads import NoHostReads
from safetensors import torch as safetensors

from amn_kernels import FusedSeqLoss, backends, extra_state, functional, ops
from amn_kernels.options import LossOptions
from amn_kernels.reference.balance import LEAST, MOST, SPIKE, SPIKE_AFTER, balance
from amn_kernels.stats import DominanceWarning, UnbalancedWarning
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


def test_state_round_trip_continues_as_if_uninterrupted():
    pred, target = make_rows(40, 8)

    def run(criterion, steps):
        for k in steps:
            criterion((pred * (1 + k)).requires_grad_(), target)
        return criterion.stats.weights

    options = {"mse": 0.5, "infonce": 0.5, "weighting": "gradient"}
    whole = run(FusedSeqLoss(**options), range(12))
    first, second = FusedSeqLoss(**options), FusedSeqLoss(**options)
    run(first, range(6))
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(second, range(6, 12)), whole)


def test_state_is_of_tensors_alone_and_survives_safetensors(tmp_path):
    first, second = (FusedSeqLoss(mse=0.5, infonce=0.5) for _ in range(2))
    pred, target = make_rows(20, 8)
    first(pred.requires_grad_(), target)
    safetensors.save_file(first.state_dict(), tmp_path / "loss.safetensors")
    second.load_state_dict(safetensors.load_file(tmp_path / "loss.safetensors"))
    assert second.weighting.updates.tolist() == [1, 1]
    assert torch.equal(second.weighting.mean, first.weighting.mean)


def test_state_of_other_terms_or_another_weighting_is_refused():
    state = FusedSeqLoss(mse=1.0, infonce=1.0, weighting="gradient").state_dict()
    with pytest.raises(ValueError, match=r"mse, infonce.*mse, cosine"):
        FusedSeqLoss(mse=1.0, cosine=1.0, weighting="gradient").load_state_dict(state)
    with pytest.raises(ValueError, match=r"'gradient'.*'value'"):
        FusedSeqLoss(mse=1.0, infonce=1.0, weighting="value").load_state_dict(state)


def test_a_state_that_is_refused_changes_nothing():
    foreign, criterion = FusedSeqLoss(mse=1.0, infonce=1.0), FusedSeqLoss(mse=1.0, cosine=1.0)
    pred, target = make_rows(20, 8)
    foreign(pred.clone().requires_grad_(), target)
    with pytest.raises(ValueError, match="mse, infonce"):
        criterion.load_state_dict(foreign.state_dict())
    assert criterion.weighting.updates.tolist() == [0, 0]
    assert criterion.weighting.mean.tolist() == [0.0, 0.0]


def test_a_state_is_loaded_whatever_the_default_device_is():
    first, second = (FusedSeqLoss(mse=0.5, infonce=0.5) for _ in range(2))
    with torch.device("meta"):
        second.load_state_dict(first.state_dict())
        assert first.state_dict()["weighting._extra_state"].device.type == "cpu"


@pytest.mark.parametrize("cast", [lambda x: x.half(), lambda x: x.type(torch.float16)], ids=["half", "type"])
def test_half_precision_module_keeps_its_state(cast):
    weighting = balanced(mse=1.0, infonce=1.0)
    observe(weighting, 1e-12, 1e9)  # both outside the range of float16
    cast(weighting)
    assert weighting.mean.dtype == torch.float32
    assert weighting.mean.tolist() == pytest.approx([1e-14, 1e7], rel=1e-5)  # 1 - ema = 0.01 of what was seen
    assert {buffer.dtype for buffer in weighting.buffers() if buffer is not weighting.mean} == {torch.int64}


def test_a_state_that_was_cast_is_loaded_as_numbers_of_the_right_dtype():
    weighting = balanced(mse=1.0, infonce=1.0)
    observe(weighting, 1.0, 4.0)
    cast = {name: x if "extra" in name else x.to(torch.bfloat16) for name, x in weighting.state_dict().items()}
    weighting.load_state_dict(cast, assign=True)
    assert observe(weighting, 1.0, 4.0) == pytest.approx([1.0, 0.5], rel=0.01)
    assert weighting.updates.tolist() == [2, 2]


def fill_one_by_one(weighting, state):
    """As transformers does."""
    for name in sorted(state):
        if name == "_extra_state":
            weighting.set_extra_state(state[name])
        else:
            setattr(weighting, name, state[name].clone())


@pytest.mark.parametrize("fill", [lambda weighting, state: weighting.load_state_dict(state), fill_one_by_one])
@pytest.mark.parametrize("updates", [0, 1, 30])
@pytest.mark.parametrize(("old", "new"), [(0.99, 0.1), (0.0, 0.999), (1 - 1e-8, 0.5)])
def test_a_mean_of_another_decay_is_converted(old, new, updates, fill):
    """The corrected mean is what it was: constant input, so it is known."""
    weighting, other = (balanced(mse=1.0, infonce=1.0, ema=ema) for ema in (old, new))
    for _ in range(updates):
        observe(weighting, 1.0, 4.0)
    fill(other, weighting.state_dict())
    again = balanced(mse=1.0, infonce=1.0, ema=new)
    again.load_state_dict(other.state_dict())  # before it was used
    for loaded in (other, again):
        loaded.eval()
        # Smaller than what was seen, so that it is the mean that counts.
        assert observe(loaded, 0.1, 0.1) == pytest.approx([1.0, 0.5] if updates else [1.0, 1.0], rel=1e-5)
        corrected = loaded.mean / (1 - new ** loaded.updates.clamp(min=1).double())
        assert corrected.tolist() == pytest.approx([1.0, 4.0] if updates else [0.0, 0.0], rel=1e-5)


def test_a_state_that_names_no_decay_is_taken_as_it_is():
    weighting, other = (balanced(mse=1.0, infonce=1.0, ema=ema) for ema in (0.99, 0.9))
    observe(weighting, 1.0, 4.0)
    state = weighting.state_dict()
    state["_extra_state"] = extra_state.pack({"terms": ["mse", "infonce"], "weighting": "gradient"})
    other.load_state_dict(state)
    observe(other.eval(), 1.0, 4.0)
    assert torch.equal(other.mean, weighting.mean)


def test_reset_fills_what_no_checkpoint_does():
    with torch.device("meta"):
        criterion = FusedSeqLoss(infonce=0.5, temperature=0.2, learnable_temperature=True)
    criterion.to_empty(device="cpu")
    for tensor in (*criterion.parameters(), *criterion.buffers()):
        tensor.data.fill_(7)
    criterion.reset_parameters()
    criterion.weighting.reset_parameters()
    fresh = FusedSeqLoss(infonce=0.5, temperature=0.2, learnable_temperature=True).state_dict()
    assert all(torch.equal(x, fresh[name]) for name, x in criterion.state_dict().items())


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


def test_balanced_weights_are_not_warned_of(recwarn):
    pred, target = make_rows(64, 32)
    criterion = FusedSeqLoss(mse=0.5, infonce=0.5, weighting="gradient")
    criterion((pred / 50).requires_grad_(), target / 50)
    criterion.stats.as_dict()
    assert not recwarn.list


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
