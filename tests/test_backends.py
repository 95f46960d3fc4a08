"""Which backend serves a call, and that it is the same loss whichever does."""

import json
import re

import pytest
import torch
from error_rule import make_rows

from amn_kernels import FusedSeqLoss, backends, functional, ops, reference
from amn_kernels.options import LossOptions

B, T, D = 4, 5, 6


@pytest.fixture
def rows():
    return make_rows(B, T, D)


@pytest.fixture
def served(monkeypatch):
    """Names of the backends that computed, in order."""
    names = []

    def spy(backend):
        def run(call):
            names.append(backend.name)
            return backend.run(call)

        return backends.Backend(backend.name, backend.summary, backend.why_unavailable, backend.why_unsupported, run)

    monkeypatch.setattr(backends, "BACKENDS", {name: spy(backend) for name, backend in backends.BACKENDS.items()})
    return names


def features():
    """Name: (options, tensors) of what goes beyond mse, cosine and infonce."""
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 2] = False
    infonce = {"infonce": 0.5}
    return {
        "moment": ({"moment": 0.5}, {}),
        "variance": ({"variance": 0.5}, {}),
        "monitored moment": ({"monitor": ("moment",)}, {}),
        "both": ({**infonce, "direction": "both"}, {}),
        "step": ({**infonce, "negatives": "step"}, {}),
        "sequence": ({**infonce, "negatives": "sequence"}, {}),
        "mask": (infonce, {"mask": mask}),
        "extra_negatives": (infonce, {"extra_negatives": make_rows(3, D, seed=1)[0]}),
        "ids": (infonce, {"ids": torch.arange(B * T).view(B, T) // 3}),
    }


def test_the_environment_is_read_when_the_loss_is_made(rows, served, monkeypatch):
    criterion = FusedSeqLoss(infonce=1.0, weighting="fixed")
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    criterion(*rows)
    FusedSeqLoss(infonce=1.0, weighting="fixed")(*rows)
    assert served == ["cpu", "reference"]


@pytest.mark.parametrize("feature", features())
def test_automatic_choice_serves_every_feature(rows, served, feature):
    pred, target = rows
    options, tensors = features()[feature]
    pred.requires_grad_()
    loss, _ = functional.seq_loss(pred, target, weighting="fixed", **options, **tensors)
    assert served == ["cpu"]
    (grad,) = torch.autograd.grad(loss, pred)
    checked = LossOptions(**options)
    wanted = reference.term_outputs(pred.double(), target.double(), checked, **tensors).values
    wanted = wanted @ torch.tensor(checked.lambdas, dtype=torch.float64)
    (wanted_grad,) = torch.autograd.grad(wanted, pred)
    # Float32 rounding with logits up to 1/0.07; the sizes are about 1 and 0.1.
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, wanted_grad, rtol=0, atol=1e-6)
    # The feature does something: without it the loss differs, except for a monitored term.
    if feature != "monitored moment":
        plain, _ = functional.seq_loss(pred, target, weighting="fixed", infonce=options.get("infonce", 0.0))
        assert abs(plain - loss) > 1e-3


@pytest.mark.parametrize("feature", features())
def test_a_derivative_of_functions_is_the_reference(rows, served, feature):
    """A C++ function does not see torch.func: an explicit choice declines, the automatic one falls back."""
    pred, target = rows
    options, tensors = features()[feature]

    def value(pred, **options_):
        return functional.seq_loss(pred, target, weighting="fixed", **options, **tensors, **options_)[0]

    with pytest.raises(ValueError, match=r"backend='cpu' can't serve this call: torch\.func transforms"):
        torch.func.grad(lambda x: value(x, backend="cpu"))(pred)
    assert served == []
    torch.func.grad(value)(pred)
    assert served == ["reference"]


def test_learnable_temperature(rows, served):
    pred, target = rows
    options = {"infonce": 1.0, "temperature": 0.3, "weighting": "fixed"}
    fixed = functional.seq_loss(pred, target, backend="reference", **options)[0]
    criterion = FusedSeqLoss(learnable_temperature=True, **options)
    torch.testing.assert_close(criterion(pred, target), fixed)
    assert served == ["reference", "cpu"]


def test_target_with_gradient(rows, served):
    pred, target = rows
    target.requires_grad_()
    loss, _ = functional.seq_loss(pred, target, cosine=1.0, infonce=1.0, weighting="fixed")
    (grad,) = torch.autograd.grad(loss, target)
    twin = target.detach().double().requires_grad_()
    wanted, _ = functional.seq_loss(
        pred.double(), twin, cosine=1.0, infonce=1.0, weighting="fixed", backend="reference"
    )
    torch.testing.assert_close(grad.double(), torch.autograd.grad(wanted, twin)[0], rtol=0, atol=1e-6)
    assert served == ["cpu", "reference"]


def test_the_fused_terms_are_fused(rows, served):
    functional.seq_loss(*rows, mse=1.0, cosine=1.0, infonce=1.0)
    assert served == ["cpu"]


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_environment_chooses(rows, served, monkeypatch, name):
    monkeypatch.setenv("AMN_KERNELS_BACKEND", name)
    functional.seq_loss(*rows, infonce=1.0)
    FusedSeqLoss(infonce=1.0)(*rows)
    assert served == [name, name]


def test_argument_wins_over_environment(rows, served, monkeypatch):
    monkeypatch.setenv("AMN_KERNELS_BACKEND", "cpu")
    functional.seq_loss(*rows, backend="reference")
    FusedSeqLoss(backend="reference")(*rows)
    assert served == ["reference", "reference"]


def test_empty_environment_is_none(rows, served, monkeypatch):
    monkeypatch.setenv("AMN_KERNELS_BACKEND", "")
    functional.seq_loss(*rows)
    assert served == ["cpu"]


def test_unknown_environment(rows, monkeypatch):
    monkeypatch.setenv("AMN_KERNELS_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"AMN_KERNELS_BACKEND must be one of .*cpu.*'tpu'"):
        functional.seq_loss(*rows)


def test_environment_that_cannot_be_met(rows, monkeypatch):
    pred, target = rows
    monkeypatch.setenv("AMN_KERNELS_BACKEND", "cpu")
    with pytest.raises(ValueError, match="'cpu' can't serve this call: pred is on meta"):
        functional.seq_loss(pred.to("meta"), target.to("meta"))


def test_other_devices_are_served_by_the_reference(rows, served):
    pred, target = rows
    loss, _ = functional.seq_loss(pred.to("meta"), target.to("meta"))
    assert loss.device.type == "meta"
    assert served == ["reference"]


def test_info(monkeypatch):
    report = backends.info()
    for name, backend in backends.BACKENDS.items():
        reason = backend.why_unavailable()
        said = f"not available: {reason}" if reason else f"available: {backend.summary}"
        assert f"{name:<10} {said}" in report
    assert ops.cpu_isa() in report
    assert f"torch {torch.__version__}" in report
    assert "AMN_KERNELS_BACKEND: not set" in report
    assert "moment                   cpu" in report
    assert "torch.func transforms    reference" in report
    monkeypatch.setenv("AMN_KERNELS_BACKEND", "cpu")
    assert "AMN_KERNELS_BACKEND: cpu" in backends.info()
    monkeypatch.setenv("AMN_KERNELS_BACKEND", "reference")
    assert re.findall(r"^  moment +(.*)$", backends.info(), flags=re.M) == ["reference"]


MISSING_EXTENSION = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "amn_kernels._C":
            raise ImportError("no such library here")
sys.meta_path.insert(0, Blocker())
import torch
from amn_kernels import FusedSeqLoss, backends, functional
from error_rule import make_rows
pred, target = make_rows(20, 6)
criterion = FusedSeqLoss(cosine=0.5, infonce=0.25, weighting="fixed")
loss = criterion(pred.requires_grad_(), target)
loss.backward()
compiled = torch.compile(FusedSeqLoss(cosine=0.5, infonce=0.25), fullgraph=True, backend="eager")(pred, target)
errors = []
for call in (lambda: FusedSeqLoss(backend="cpu"), lambda: functional.seq_loss(pred, target, backend="cpu")):
    try:
        call()
    except ValueError as error:
        errors.append(str(error))
losses = {"loss": loss.item(), "compiled": compiled.item()}
print(json.dumps({**losses, "grad": pred.grad.tolist(), "errors": errors, "info": backends.info()}))
"""


def test_without_the_compiled_extension(run_python):
    process = run_python(MISSING_EXTENSION)
    assert process.returncode == 0, process.stderr
    got = json.loads(process.stdout)
    pred, target = make_rows(20, 6)
    loss, _ = functional.seq_loss(
        pred.requires_grad_(), target, cosine=0.5, infonce=0.25, weighting="fixed", backend="reference"
    )
    loss.backward()
    assert got["loss"] == loss.item()
    assert got["grad"] == pred.grad.tolist()
    balanced = FusedSeqLoss(cosine=0.5, infonce=0.25, backend="reference")(pred, target)
    assert got["compiled"] == pytest.approx(balanced.item(), rel=1e-6)
    assert len(got["errors"]) == 2
    for text in (*got["errors"], got["info"]):
        assert "the compiled extension did not load (no such library here)" in text
    assert "'cpu' is not available" in got["errors"][0]


def test_terms_that_no_kernel_knows_go_to_the_reference(rows):
    options = LossOptions()
    object.__setattr__(options, "fused", False)  # as a term of TERMS that is not one of FUSED_TERMS makes it
    call = backends.Call(*rows, options)
    assert backends.choose(call, None).name == "reference"
    with pytest.raises(
        ValueError, match=r"backend='cpu' can't serve this call: terms other than mse, .* are not fused"
    ):
        backends.choose(call, "cpu")
    assert LossOptions(mse=1, cosine=1, infonce=1, moment=1, variance=1).fused
