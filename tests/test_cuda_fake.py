"""The CUDA backend as far as it can be seen without a device: what is registered, how it traces on fake tensors of
cuda:0, and when it is chosen.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from combinations import inputs_of, label, options_of, sample
from error_rule import make_rows
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from amn_kernels import FusedSeqLoss, backends, functional, ops
from amn_kernels.primitives import CompiledPrimitives
from amn_kernels.reference.seq_loss import compute_dtype

pytestmark = pytest.mark.skipif(ops.why_unavailable() is not None, reason=str(ops.why_unavailable()))

HALVES = ("_seq_loss_forward", "_seq_loss_backward", "_balance")
PRIMITIVES = tuple(
    f"_{name}" for name, of in vars(CompiledPrimitives).items() if callable(of) and not name.startswith("_")
)
HAS_CUDA = ops.has_cuda()
ALL = {"mse": 1.0, "cosine": 0.5, "infonce": 0.5}


@pytest.fixture
def available(monkeypatch):
    """The backend as it is where there is a device: tracing needs none."""
    backend = dataclasses.replace(backends.BACKENDS["cuda"], why_unavailable=lambda: None)
    monkeypatch.setitem(backends.BACKENDS, "cuda", backend)


@pytest.mark.skipif(not HAS_CUDA, reason="the extension was built without CUDA sources")
@pytest.mark.parametrize("name", [*HALVES, *PRIMITIVES])
def test_every_op_is_registered_for_cuda(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"amn_kernels::{name}", "CUDA")


@pytest.mark.skipif(torch.cuda.is_available() and HAS_CUDA, reason="the backend is available here")
def test_it_says_why_it_is_not_available():
    reason = ops.why_no_cuda()
    wanted = "there is no CUDA device" if HAS_CUDA else "the extension was built without CUDA sources ("
    assert reason.startswith(wanted)
    with pytest.raises(ValueError, match=r"backend='cuda' is not available: (the|there is) "):
        FusedSeqLoss(backend="cuda")
    assert f"cuda       not available: {reason}" in backends.info()


@pytest.mark.skipif(torch.cuda.is_available() and HAS_CUDA, reason="the backend is available here")
def test_a_run_that_requires_it_fails_and_says_why(pytestconfig):
    """What `make test-gpu` asks for: without it every test on a device is skipped, and the run is green."""
    folder = Path(__file__).parent / "gpu"
    command = [sys.executable, "-m", "pytest", "-q", str(folder), "--rootdir", str(pytestconfig.rootpath)]
    for required, code in {"cuda": pytest.ExitCode.USAGE_ERROR, "cpu": pytest.ExitCode.OK}.items():
        done = subprocess.run(
            [*command, "--collect-only", "--require", required], capture_output=True, text=True, check=False
        )
        assert done.returncode == code
        assert (f"backend 'cuda' is required and not available: {ops.why_no_cuda()}" in done.stderr) == (code != 0)


@pytest.mark.usefixtures("available")
def test_order_of_backends_on_a_cuda_device():
    assert [*backends.BACKENDS] == ["cpu", "cuda", "triton", "reference"]
    with FakeTensorMode():
        rows = torch.empty(4, 3, device="cuda:0")
        call = backends.Call(rows, rows, functional.LossOptions(**ALL))
        assert backends.choose(call, None).name == "cuda"
        assert backends.choose(call, "reference").name == "reference"
        with pytest.raises(ValueError, match="backend='cpu' can't serve this call: pred is on cuda:0"):
            backends.choose(call, "cpu")
    host = make_rows(4, 3)
    with pytest.raises(ValueError, match="backend='cuda' can't serve this call: pred is on cpu"):
        functional.seq_loss(*host, backend="cuda")


@pytest.mark.parametrize("case", sample(100)[:40], ids=label)
def test_fake_halves_are_those_of_the_cpu(case):
    """Results of both halves of the op: shape, dtype and strides as on the CPU, on the device of pred."""
    options = functional.LossOptions(**options_of(case))
    pred, target, tensors = inputs_of(case, "cpu")
    wanted = case["gradients"].split()
    extra = tensors.get("extra_negatives")
    temperature = torch.tensor(0.3, dtype=compute_dtype(pred, target)) if "temperature" in wanted else None
    given = (pred, target, tensors.get("mask"), tensors.get("ids"), extra, temperature)
    named = {"pred": pred, "target": target, "extra": extra, "temperature": temperature}
    bits = sum(1 << i for i, name in enumerate(named) if name in wanted and named[name] is not None)
    choices = ops.choices_of(options)
    weights = torch.ones(len(options.terms), dtype=compute_dtype(pred, target))

    def halves(weights, given):
        forward = torch.ops.amn_kernels._seq_loss_forward(
            *given[:2], weights, *given[2:], *choices, 1 << 20, bits
        )  # fmt: skip
        if not bits:
            return [*forward]
        gradients = torch.ops.amn_kernels._seq_loss_backward(
            forward[0], weights, None, *given, *forward[4:], *choices, bits
        )  # fmt: skip
        return [*forward, *gradients]

    on_host = halves(weights, given)
    with FakeTensorMode():

        def fake(x):
            return None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")

        on_device = halves(fake(weights), [fake(x) for x in given])
    for host, got in zip(on_host, on_device, strict=True):
        assert got.device == torch.device("cuda:0")
        assert (got.shape, got.dtype, got.stride()) == (host.shape, host.dtype, host.stride())


needs_cuda_torch = pytest.mark.skipif(
    torch.version.cuda is None, reason="fake CUDA tensors in an exported module need a CUDA build of torch"
)
needs_device = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="autograd's engine and autocast ask for a CUDA device, even of fake tensors"
)


def _ops_of(graph):
    return [
        str(node.target) for node in graph.nodes if node.op == "call_function" and "amn_kernels" in str(node.target)
    ]


@needs_device
@pytest.mark.usefixtures("available")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_traced_step_is_three_ops(dtype):
    """Forward, balance, backward, and nothing of the loss's arithmetic around them."""
    with FakeTensorMode():
        criterion = FusedSeqLoss(backend="cuda", **ALL).to("cuda:0")
        pred, target = (torch.empty(32, 24, device="cuda:0", dtype=dtype) for _ in range(2))

        def step(pred, target):
            pred = pred.detach().requires_grad_()
            return torch.autograd.grad(criterion(pred, target), pred)[0]

        traced = make_fx(step, tracing_mode="real")(pred, target)
    called = _ops_of(traced.graph)
    assert [name.split(".")[1] for name in called] == ["_seq_loss_forward", "_balance", "_seq_loss_backward"]
    others = {str(node.target).split(".")[1] for node in traced.graph.nodes if node.op == "call_function"} - {
        name.split(".")[1] for name in called
    }
    # What autograd starts from, and views; getitem takes results apart.
    assert others <= {"ones_like", "detach", "getitem>", "view", "getitem"}, others


@needs_device
@pytest.mark.usefixtures("available")
def test_autocast_leaves_rows_and_result_alone():
    """As on the CPU: the op reads rows in their dtype and returns float32, inside and outside of autocast."""
    with FakeTensorMode():
        criterion = FusedSeqLoss(backend="cuda", weighting="fixed", **ALL).to("cuda:0")
        pred = torch.empty(8, 6, device="cuda:0", dtype=torch.bfloat16, requires_grad=True)
        target = torch.empty(8, 6, device="cuda:0")
        with torch.autocast("cuda", dtype=torch.float16):
            loss = criterion(pred, target)
        (grad,) = torch.autograd.grad(loss, pred)
    assert (loss.dtype, grad.dtype) == (torch.float32, torch.bfloat16)


@needs_cuda_torch
@pytest.mark.usefixtures("available")
def test_exported_for_a_cuda_device():
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = FusedSeqLoss(backend="cuda", weighting="fixed", **ALL)

        def forward(self, pred, target):
            return self.criterion(pred, target)

    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = tuple(torch.empty(16, 8, device="cuda:0") for _ in range(2))
        program = torch.export.export(Loss().to("cuda:0"), rows)
    (name,) = _ops_of(program.graph)
    assert name.split(".")[1] in ("seq_loss_fixed", "_seq_loss_forward")
