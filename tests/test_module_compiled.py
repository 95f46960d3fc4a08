"""FusedSeqLoss under torch.compile: no graph breaks, and compiled once."""

import pytest
import torch
from error_rule import make_rows, relative_error
from test_module import ALL, gradient
from torch._dynamo.testing import CompileCounterWithBackend

from amn_kernels import FusedSeqLoss, functional

SOME_REFERENCE = {"mse": 0.0, "moment": 1.0, "variance": 0.5, "weighting": "fixed"}


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(
    ("backend", "options", "compiler"),
    [
        ("cpu", ALL, "inductor"),
        ("cpu", {"mse": 1.0, "monitor": ("infonce",)}, "aot_eager"),
        ("reference", SOME_REFERENCE, "aot_eager"),
    ],
)
def test_compiled_without_graph_breaks(backend, options, compiler):
    pred, target = make_rows(65, 7)
    criterion = FusedSeqLoss(backend=backend, **options)
    loss, grad = gradient(criterion, pred, target)
    stats = criterion.stats.as_dict()
    compiled_criterion = FusedSeqLoss(backend=backend, **options)
    compiled = torch.compile(compiled_criterion, fullgraph=True, backend=compiler)
    for _ in range(2):
        got_loss, got_grad = gradient(compiled, pred, target)
        # The op is the same; a compiler may fuse the weighted sum around it: float32 rounding.
        torch.testing.assert_close(got_loss, loss, rtol=1e-6, atol=0)
        assert relative_error(got_grad, grad) <= 1e-6
        assert compiled_criterion.stats.as_dict() == pytest.approx(stats, rel=1e-6)


def inverse_norms(gram, values):
    """A weighting by a function."""
    return gram.diagonal().rsqrt()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("weighting", ["gradient", "value", inverse_norms])
def test_balanced_weights_compiled(weighting):
    """The backward too is by the weights of the call, and the state moves."""
    eager, criterion = (FusedSeqLoss(mse=0.5, infonce=0.5, weighting=weighting, backend="cpu") for _ in range(2))
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        rows = make_rows(40, 8, seed=seed)
        (got_loss, got_grad), (loss, grad) = (gradient(f, *rows) for f in (compiled, eager))
        torch.testing.assert_close(got_loss, loss, rtol=1e-6, atol=0)
        assert relative_error(got_grad, grad) <= 1e-6


@pytest.mark.usefixtures("_fresh_dynamo")
def test_every_option_compiles_without_graph_breaks():
    pred, target = make_rows(6, 5, 7)
    mask, ids = torch.arange(30).view(6, 5) % 7 > 0, torch.arange(30).view(6, 5) % 4
    options = {
        **ALL,
        "moment": 0.1,
        "variance": 0.1,
        "direction": "both",
        "negatives": "step",
        "positives": "ids",
        "false_negative_margin": 0.3,
        "learnable_temperature": True,
        "weighting": "fixed",
    }

    def run(criterion, original):
        leaves = [x.detach().clone().requires_grad_() for x in (pred, target, pred[0])]
        loss = criterion(leaves[0], leaves[1], mask=mask, ids=ids, extra_negatives=leaves[2])
        return loss.detach(), *torch.autograd.grad(loss, [*leaves, original.log_temperature])

    criterion = FusedSeqLoss(backend="cpu", **options)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(run(compiled, criterion), run(criterion, criterion), strict=True):
        assert relative_error(got, wanted) <= 1e-6


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_transforms_inside_of_what_is_compiled(transform):
    pred, target = make_rows(9, 4, dtype=torch.float64)

    def loss(x):
        return functional.seq_loss(x, target, mse=1.0, infonce=0.5, weighting="fixed")[0]

    transformed = {
        "grad": lambda x: torch.func.grad(loss)(x),
        "jvp": lambda x: torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1],
        "vmap": lambda x: torch.func.vmap(loss)(torch.stack((x, -x))),
    }[transform]
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pred), transformed(pred))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_once_for_any_number_of_rows():
    counter = CompileCounterWithBackend("aot_eager")
    criterion = FusedSeqLoss(backend="cpu", **ALL)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=counter)
    graphs = None
    for n in (65, 40, 1100):  # 1100 is more than one chunk
        pred, target = make_rows(n, 7)
        loss, grad = gradient(criterion, pred, target)
        got_loss, got_grad = gradient(compiled, pred, target)
        torch.testing.assert_close(got_loss, loss, rtol=1e-6, atol=0)
        assert relative_error(got_grad, grad) <= 1e-6
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs > 0
