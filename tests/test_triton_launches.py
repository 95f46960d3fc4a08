"""How many launches a training step of small groups takes. Nothing is launched: calls are counted, on CPU tensors."""

import contextlib
import dataclasses
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from error_rule import TERMS, make_rows
from triton.runtime.jit import JITFunction

from amn_kernels import FusedSeqLoss, ops, triton
from amn_kernels.backends import BACKENDS, Call
from amn_kernels.options import LossOptions
from amn_kernels.triton import backend, small_groups
from amn_kernels.weighting import make_weighting

pytestmark = pytest.mark.skipif("ttsem.sanitize" in sys.modules, reason="ttsem's own operators would be counted")

IMPLEMENTATIONS = {
    "amn_kernels_triton::_small_groups_forward": small_groups.forward,
    "amn_kernels_triton::_small_groups_backward": small_groups.backward,
    "amn_kernels_triton::_seq_loss_forward": backend._forward,
    "amn_kernels_triton::_seq_loss_backward": backend._backward,
}


class Operators(TorchDispatchMode):
    """Notes the operators that would launch something: all but views and allocations."""

    def __init__(self, launched):
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().split(".")[0]
        if implementation := IMPLEMENTATIONS.get(name):
            with self:  # what the op itself calls counts as well
                return implementation(*args, **(kwargs or {}))
        if not (operator.is_view or "empty" in name or name in ("aten::detach", "aten::alias")):
            self.launched.append(name)
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def launches_of(monkeypatch):
    """Names of the kernels and operators of a step whose incoming gradient is at hand."""

    def count(shape, **options):
        launched = []
        monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: launched.append(self.fn.__name__))
        pred, target = make_rows(*shape)
        leaf, incoming = pred.requires_grad_(), torch.ones(())
        options = LossOptions(**TERMS["all"], **options)
        weights = torch.tensor(options.lambdas, dtype=torch.float32)
        call = Call(leaf, target, options, weights, make_weighting(options))
        with Operators(launched):
            torch.autograd.grad(BACKENDS["triton"].run(call).loss, leaf, incoming)
        return launched

    return count


@pytest.mark.parametrize("weighting", ["fixed", "gradient", "value"])
@pytest.mark.parametrize("rows", [1, 32, 128])
def test_one_group_is_two_launches(launches_of, weighting, rows):
    assert launches_of((rows, 16), weighting=weighting) == ["small_groups_kernel", "row_combine_kernel"]


@pytest.mark.parametrize("weighting", ["fixed", "gradient", "value"])
@pytest.mark.parametrize("negatives", ["step", "sequence"])
def test_several_groups_are_three_launches(launches_of, weighting, negatives):
    wanted = ["small_groups_kernel", "finish_groups_kernel", "row_combine_kernel"]
    assert launches_of((8, 6, 16), weighting=weighting, negatives=negatives) == wanted


def test_what_is_no_kernel_of_ours_is_counted(launches_of):
    launched = launches_of((32, 16), weighting="fixed", chunk_bytes=1 << 20)
    assert "aten::bmm" in launched
    assert "row_stats_kernel" in launched
    assert launches_of((129, 16), weighting="fixed")[:3] != ["small_groups_kernel"]


@pytest.mark.parametrize("options", [{}, {"chunk_bytes": 1 << 20}], ids=["small", "chunks"])
def test_kernels_are_launched_on_the_device_of_the_tensors(monkeypatch, options):
    """Which need not be the current one."""
    guarded, launched = [], []

    @contextlib.contextmanager
    def device_of(x):
        guarded.append(x)
        yield
        guarded.pop()

    def run(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        assert guarded, f"{launched[-1]} is launched on the current device"

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(JITFunction, "run", run)
    pred, target = make_rows(12, 16)
    options = LossOptions(**TERMS["all"], **options)
    weighting = make_weighting(options)
    loss, outputs, _ = BACKENDS["triton"].run(Call(pred.requires_grad_(), target, options, None, weighting))
    torch.autograd.grad(loss, pred)
    # For tensors on the CPU the weighting takes the compiled twin.
    backend.balance(outputs.values.detach(), outputs.gram, *weighting.arguments(pred.device))
    assert {"row_combine_kernel", "balance_kernel"} <= set(launched)


@pytest.mark.skipif("ttsem.harness" in sys.modules, reason="under ttsem tensors say that they are on a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("weighting", ["gradient", lambda gram, values: 1 / gram.diagonal().sqrt()])
def test_what_the_backward_is_given(monkeypatch, weighting, compiled):
    """The weights of a loss that has a gradient; torch.compile makes up one where the loss is the caller's own."""
    given = []

    def run(self, *args, **kwargs):
        if self.fn.__name__ == "row_combine_kernel":
            given.append(args[:3])

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(triton, "torch", types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: True)))
    served = dataclasses.replace(BACKENDS["triton"], why_unsupported=lambda call: None)
    monkeypatch.setitem(BACKENDS, "triton", served)
    criterion = FusedSeqLoss(mse=1.0, infonce=0.5, backend="triton", weighting=weighting)
    step = torch.compile(criterion, backend="aot_eager", fullgraph=True) if compiled else criterion
    pred, target = make_rows(20, 8)
    step(pred.requires_grad_(), target).backward()
    ((grad_loss, weights, grad_values),) = given
    if weighting == "gradient":
        assert (grad_loss.numel(), weights.numel()) == (1, 2)
    else:
        assert (grad_loss, weights) == (None, None)
        assert grad_values.numel() == 2


@pytest.mark.parametrize(
    ("reason", "shape", "options", "inputs"),
    [
        ("more than 128", (129, 8), {"infonce": 1.0}, {}),
        ("more than 64", (65, 8), {"infonce": 1.0, "direction": "both"}, {}),
        ("more than 64", (65, 8), {"infonce": 1.0}, {"ids": torch.arange(65)}),
        ("sums over columns", (8, 8), {"moment": 1.0}, {}),
        ("keys of all groups", (8, 8), {"infonce": 1.0}, {"extra_negatives": torch.ones(2, 8)}),
        ("more sums", (8, 8), {"infonce": 1.0, "positives": "ids"}, {"ids": torch.arange(8)}),
        ("second similarity tile", (8, 8), {"infonce": 1.0, "false_negative_margin": 0.1}, {}),
        ("is learned", (8, 8), {"infonce": 1.0}, {"temperature": torch.ones(())}),
        ("asks for chunks", (8, 8), {"infonce": 1.0, "chunk_bytes": 1}, {}),
        (
            "rows of a long mask",  # 1,025 programs of 64 rows
            (1025, 64, 1),
            {"infonce": 1.0, "negatives": "sequence"},
            {"mask": torch.ones(1025, 64, dtype=torch.bool)},
        ),
    ],
)
def test_other_calls_take_the_path_of_chunks(reason, shape, options, inputs):
    pred, target = make_rows(*shape)
    assert reason in small_groups.why_unsupported(Call(pred, target, LossOptions(**options), **inputs))


@pytest.mark.parametrize("groups", [1024, 1025])
def test_groups_of_a_mask_that_is_short_or_of_none_stay(groups):
    pred, target = make_rows(groups, 64, 1)
    mask = torch.ones(groups, 64, dtype=torch.bool) if groups == 1024 else None
    options = LossOptions(infonce=1.0, negatives="sequence")
    assert small_groups.why_unsupported(Call(pred, target, options, mask=mask)) is None


def test_fakes_have_the_shapes_of_the_results(monkeypatch):
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: None)
    for options in (TERMS["all"], {**TERMS["all"], "direction": "both"}, TERMS["mse"]):
        for needs in (True, False):
            choices = ops.choices_of(LossOptions(**options))[:5]
            balance = ("fixed", 0, 0.0, 1, False)
            call = [*make_rows(8, 16), None, None, torch.ones(3), *(None,) * 6, *choices, needs, *balance]
            real = torch.ops.amn_kernels_triton._small_groups_forward(*call)
            call[:2] = (x.to("meta") for x in call[:2])
            fake = torch.ops.amn_kernels_triton._small_groups_forward(*call)
            assert [(x.shape, x.dtype, x.stride()) for x in real] == [(x.shape, x.dtype, x.stride()) for x in fake]
