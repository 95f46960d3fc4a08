"""The Triton backend's op as PyTorch sees it, without a GPU: schema, fakes, tracing. Its arithmetic is here that of the
compiled primitives, so that it runs on the CPU.
"""

import dataclasses
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from error_rule import make_rows, relative_error
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from amn_kernels import FusedSeqLoss, backends, ops, reference, triton, weighting
from amn_kernels.options import LossOptions

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif("ttsem.harness" in sys.modules, reason="under ttsem tensors say that they are on a CUDA device"),
    pytest.mark.skipif(ops.why_unavailable() is not None, reason=str(ops.why_unavailable())),
]

PLAIN = LossOptions(mse=1.0, cosine=0.5, infonce=0.25, temperature=0.3)
GENERAL = LossOptions(mse=1.0, infonce=0.25, moment=0.5, direction="both", monitor=("cosine",))


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    from amn_kernels.primitives import CompiledPrimitives
    from amn_kernels.triton import backend

    monkeypatch.setattr(backend, "_PRIMITIVES", CompiledPrimitives())
    return backend


@pytest.mark.parametrize("options", [PLAIN, GENERAL])
def test_opcheck(backend, options):
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    pred, target = make_rows(20, 8, dtype=torch.float64)
    extra, tau = make_rows(3, 8, dtype=torch.float64, seed=1)[0], torch.tensor(0.2, dtype=torch.float64)
    mask, ids = torch.arange(20) % 5 != 0, torch.arange(20) % 7
    for tensors, needs in (((None,) * 4, 1), ((mask, ids, extra, tau), 15), ((None, None, extra, None), 0)):
        forward = (pred, target, *tensors, *ops.choices_of(options))
        op = torch.ops.amn_kernels_triton._seq_loss_forward.default
        torch.library.opcheck(op, (*forward, 1 << 20, needs), test_utils=checks)
        *_, rows, attention, columns = op(*forward, 1 << 20, needs)
        saved = (pred, target, *tensors, rows, attention, columns, *ops.choices_of(options), needs)
        ones = torch.ones(len(options.terms), dtype=torch.float64)
        op = torch.ops.amn_kernels_triton._seq_loss_backward.default
        for incoming in ((None, None, ones), (ones[0].clone(), ones, None), (ones[0].clone(), ones, ones.clone())):
            torch.library.opcheck(op, (*incoming, *saved), test_utils=checks)


@pytest.mark.parametrize("options", [PLAIN, GENERAL])
def test_compiles_as_one_graph(backend, options):
    pred, target = (x.requires_grad_() for x in make_rows(20, 8))

    def loss(pred, target):
        return backend.term_outputs(pred * 2, target, options).values.square().sum()

    def plain(pred, target):
        return reference.term_outputs(pred * 2, target, options).values.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(pred, target), (pred, target))
    wanted = torch.autograd.grad(plain(pred.double(), target.double()), (pred, target))
    for x, y in zip(got, wanted, strict=True):
        assert relative_error(x, y) <= 1e-5


@pytest.fixture
def _a_device(monkeypatch):
    cuda = types.SimpleNamespace(is_available=lambda: True, get_device_capability=lambda device: (9, 0))
    monkeypatch.setattr(triton, "torch", types.SimpleNamespace(cuda=cuda))
    triton._asked.cache_clear()
    yield
    triton._asked.cache_clear()


@pytest.mark.usefixtures("_a_device")
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (12, 1)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_devices_that_triton_does_not_compile_for_are_served_otherwise(monkeypatch, capability, compiled):
    asked = []
    monkeypatch.delitem(backends.BACKENDS, "cuda")
    monkeypatch.setattr(ops, "_HAS_CUDA", False)
    monkeypatch.setattr(triton.torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    with FakeTensorMode():
        pred, target = (torch.empty(4, 3, device="cuda:0") for _ in "pt")

        def name(pred, target):
            return pred + ["triton", "reference"].index(backends.choose(backends.Call(pred, target, PLAIN), None).name)

        called = torch.compile(name, backend="eager", fullgraph=True) if compiled else name
        for _ in range(2):
            called(pred, target)
        call = backends.Call(pred, target, PLAIN)
        chosen = backends.choose(call, None).name
        assert chosen == ("triton" if capability >= (8, 0) else "reference")
        assert (weighting._step_for(pred.device) is reference.balance.balance) == (chosen == "reference")
        if chosen == "reference":
            with pytest.raises(ValueError, match=r"'triton' can't serve this call: cuda:0 has compute capability 7\.5"):
                backends.choose(call, "triton")
    assert len(asked) == 1  # and not at every call


@pytest.mark.usefixtures("_a_device")
def test_it_is_not_available_in_a_hip_build(monkeypatch):
    assert triton.why_unavailable() is None
    monkeypatch.setattr(triton, "_IS_HIP", True)
    assert "HIP build" in triton.why_unavailable()
    with pytest.raises(ValueError, match="'triton' is not available: this torch is a HIP build"):
        FusedSeqLoss(backend="triton")


@pytest.mark.usefixtures("_a_device")
@pytest.mark.parametrize("rows", [(32, 33, 128), (300, 301, 4000)], ids=["small groups", "chunks"])
@pytest.mark.parametrize("weighting", ["fixed", "gradient"])
def test_traced_once_on_a_cuda_device(weighting, rows):
    """On fake tensors: the backend is chosen inside the graph, which is one for any number of rows."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    with FakeTensorMode():
        criterion = FusedSeqLoss(infonce=0.5, weighting=weighting).to("cuda:0")
        compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=counter)
        for n in rows:
            compiled(*(torch.empty(n, 8, device="cuda:0") for _ in "pt"))
    (graph,) = counter.graphs
    op = "_small_groups_forward" if rows[0] <= 128 else "_seq_loss_forward"
    assert any(f"amn_kernels_triton.{op}" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.usefixtures("_a_device")
def test_the_module_compiles_as_one_graph(monkeypatch):
    """As on a CUDA device: with the choice of backend, the weighting and its state inside the graph."""
    served = dataclasses.replace(backends.BACKENDS["triton"], why_unsupported=lambda call: None)
    monkeypatch.setitem(backends.BACKENDS, "triton", served)
    pred, target = make_rows(20, 8)
    for options in ({"weighting": "fixed"}, {"weighting": "gradient"}):
        results = []
        for compile_it in (False, True):
            criterion = FusedSeqLoss(mse=1.0, infonce=0.5, backend="triton", chunk_bytes=1 << 20, **options)
            run = torch.compile(criterion, backend="aot_eager", fullgraph=True) if compile_it else criterion
            leaf = pred.clone().requires_grad_()
            for _ in range(3):
                loss = run(leaf, target)
            loss.backward()
            results.append((loss.detach(), leaf.grad, criterion.stats.weights))
        for got, wanted in zip(*results, strict=True):
            assert relative_error(got, wanted) <= 1e-6


def test_two_ranks():
    """The ring over Triton primitives, on gloo and under ttsem; NCCL needs GPUs."""
    pytest.importorskip("ttsem")
    folder = Path(__file__).parent
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "triton_ranks.py"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    assert "2 cases equal one process" in process.stdout


def test_checkpointing_and_retained_graphs(backend):
    """The backward may run twice, and on what is computed anew."""
    pred, target = make_rows(12, 6)
    pred.requires_grad_()
    values = backend.term_outputs(pred, target, PLAIN).values
    first, second = (torch.autograd.grad(values.sum(), pred, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    again = torch.utils.checkpoint.checkpoint(
        lambda x: backend.term_outputs(x, target, PLAIN).values.sum(), pred, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(again, pred)[0], first)
