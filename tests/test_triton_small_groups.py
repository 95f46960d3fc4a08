"""Small groups in one Triton launch: values, gradients and the state of the weighting.

On a CUDA device, or without one under ttsem: `make test-triton`.
"""

import pytest
import torch
from error_rule import FLOOR_ULP, TERMS, eager_loss, make_rows, relative_error, rows_far_below, truth

from amn_kernels import FusedSeqLoss, functional
from amn_kernels.triton import why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=f"{why_unavailable()}; see make test-triton")

# Tiles of 16, 32, 64 and 128 rows, full and not; one block of dimensions, several, and a part of one.
SHAPES = [(1, 3), (2, 1), (16, 64), (31, 100), (63, 7), (65, 130), (128, 64)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(pred, target, incoming=1.0, **options):
    """Loss, gradient and stats on the device, back on the CPU."""
    inputs = {name: options.pop(name).cuda() for name in ("mask", "ids") if name in options}
    leaf = pred.detach().cuda().requires_grad_()
    options = {"weighting": "fixed", "backend": "triton", **options}
    loss, stats = functional.seq_loss(leaf, target.cuda(), **inputs, **options)
    (grad,) = torch.autograd.grad(loss, leaf, loss.new_tensor(incoming))
    return loss.detach().cpu(), grad.cpu(), stats


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("distance", [None, 1e-2], ids=["far", "near"])
def test_error_rule(shape, dtype, distance):
    pred, target = make_rows(*shape, dtype=dtype, distance=distance)
    loss, grad, stats = run(pred, target, incoming=3.0, **TERMS["all"])
    true, theirs = truth(pred, target, 3.0, **TERMS["all"]), eager_loss(pred, target, 3.0, **TERMS["all"])
    assert relative_error(loss, true.loss) <= 2 * relative_error(theirs.loss, true.loss) + FLOOR_ULP * 2**-23
    assert grad.dtype == dtype
    floor = FLOOR_ULP * torch.finfo(dtype).eps
    assert relative_error(grad, true.grad) <= 2 * relative_error(theirs.grad, true.grad) + floor
    torch.testing.assert_close(stats.metrics.cpu().double(), true.stats.metrics, rtol=1e-5, atol=1e-6)
    # Weights are rounded to the input's dtype before the product that o comes from.
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    scale = true.stats.gram.diagonal().sqrt()
    error = (stats.gram.cpu().double() - true.stats.gram) / (scale.unsqueeze(1) * scale).clamp(min=1e-30)
    assert error.abs().max() < tolerance or shape == (2, 1)  # one dimension: no gradient but rounding


OPTIONS = {
    "both": ((40, 24), {"infonce": 1.0, "direction": "both"}),
    "step": ((7, 3, 20), {**TERMS["all"], "negatives": "step"}),
    "sequence": ((3, 7, 20), {**TERMS["all"], "negatives": "sequence"}),
    "both, sequence": ((3, 18, 20), {"mse": 1.0, "infonce": 0.1, "direction": "both", "negatives": "sequence"}),
    "all of a grid": ((3, 7, 20), {**TERMS["all"], "negatives": "all"}),
    "monitor": ((12, 20), {"mse": 1.0, "cosine": 0.0, "monitor": ("cosine", "infonce")}),
    "without infonce": ((12, 20), {"mse": 1.0, "cosine": 1.0}),
    "cold": ((12, 20), {"infonce": 1.0, "temperature": 0.005}),
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_against_the_definition(name, masked):
    shape, options = OPTIONS[name]
    # Cold and unrelated: the others decide, with similarities far above the range of exp.
    pred, target = make_rows(*shape, distance=None if name == "cold" else 0.5)
    if masked:
        generator = torch.Generator().manual_seed(1)
        mask = torch.rand(shape[:-1], generator=generator) < 0.7
        ids = torch.randint(4, shape[:-1], generator=generator)
        options = {**options, "mask": mask}
        if name != "without infonce":
            options["ids"] = ids
        pred = pred.masked_fill(~mask.unsqueeze(-1), torch.nan)
    loss, grad, stats = run(pred, target, **options)
    true = truth(pred, target, **options)
    torch.testing.assert_close(loss.double(), true.loss, rtol=1e-5, atol=1e-7)
    assert relative_error(grad, true.grad) < 3e-6
    torch.testing.assert_close(stats.values.cpu().double(), true.stats.values, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(stats.gram.cpu().double(), true.stats.gram, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(stats.metrics.cpu().double(), true.stats.metrics, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["both", "step", "both, sequence"])
@pytest.mark.parametrize("masked", [False, True])
def test_options_in_half_precision(name, dtype, masked):
    shape, options = OPTIONS[name]
    pred, target = make_rows(*shape, dtype=dtype, distance=0.5)
    if masked:
        generator = torch.Generator().manual_seed(1)
        mask = torch.rand(shape[:-1], generator=generator) < 0.7
        options = {**options, "mask": mask, "ids": torch.randint(4, shape[:-1], generator=generator)}
        pred = pred.masked_fill(~mask.unsqueeze(-1), torch.nan)
    loss, grad, _ = run(pred, target, incoming=64.0, **options)
    true = truth(pred, target, 64.0, **options)
    assert relative_error(loss, true.loss) < 3e-6
    assert relative_error(grad, true.grad) < torch.finfo(dtype).eps


@pytest.mark.parametrize(("shape", "masked"), [((40, 3, 8), False), ((90, 12, 4), True)], ids=["groups", "mask"])
def test_more_than_is_summed_at_a_time(shape, masked):
    """More than 32 groups, and a mask of more than 1,024 rows."""
    pred, target = make_rows(*shape, distance=0.5)
    options = {**TERMS["all"], "negatives": "sequence"}
    if masked:
        options["mask"] = torch.arange(shape[0] * shape[1]).view(shape[:-1]) % 3 > 0
    loss, grad, stats = run(pred, target, **options)
    true = truth(pred, target, **options)
    for got, wanted in ((loss, true.loss), (grad, true.grad), (stats.metrics.cpu(), true.stats.metrics)):
        assert relative_error(got, wanted) < 3e-6


def test_strided_rows_and_different_dtypes():
    pred, target = make_rows(24, 40)
    pred = torch.cat([pred, pred], dim=1)[:, :40]  # rows further apart
    target = target.half().mT.contiguous().mT  # dimensions apart
    _, grad, _ = run(pred, target, **TERMS["all"])
    assert relative_error(grad, truth(pred, target, **TERMS["all"]).grad) < 3e-6


def test_special_rows():
    pred, target = make_rows(20, 16)
    pred[3], target[5] = 0, 0
    pred[7] *= 1e18
    target[8] = 1e-3 * pred[8]
    _, grad, stats = run(pred, target, mse=0.0, cosine=1.0, infonce=1.0)
    true = truth(pred, target, mse=0.0, cosine=1.0, infonce=1.0)
    assert relative_error(grad, true.grad) < 3e-6
    assert grad[3].eq(0).all()
    torch.testing.assert_close(stats.values.cpu().double(), true.stats.values, rtol=1e-5, atol=1e-7)


def test_all_rows_masked_is_zero_and_a_nan_is_seen():
    pred, target = make_rows(8, 16)
    loss, grad, _ = run(pred, target, mask=torch.zeros(8, dtype=torch.bool), **TERMS["all"])
    assert loss == 0
    assert grad.eq(0).all()
    target[2, 3] = torch.nan
    assert run(pred, target, **TERMS["all"])[0].isnan()


@pytest.mark.parametrize("weighting", ["gradient", "value"])
@pytest.mark.parametrize("shape", [(1, 12, 8), (3, 6, 8)], ids=str)
def test_balance_moves_its_state_as_the_reference_does(weighting, shape):
    options = {**TERMS["all"], "weighting": weighting, "ema": 0.9, "update_every": 2, "negatives": "sequence"}
    ours, theirs = FusedSeqLoss(**options, backend="triton").cuda(), FusedSeqLoss(**options, backend="reference")
    for step in range(13):  # past the number of updates from which spikes are cut
        pred, target = make_rows(*shape, distance=100.0 if step == 12 else 1.0, seed=step)
        leaf = pred.cuda().requires_grad_()
        ours(leaf, target.cuda()).backward()
        theirs(pred.double().requires_grad_(), target.double())
        torch.testing.assert_close(
            ours.stats.weights.cpu().double(), theirs.stats.weights.double(), rtol=1e-4, atol=1e-7
        )
    for name in ("mean", "updates", "calls", "skipped"):
        got, wanted = getattr(ours.weighting, name).cpu(), getattr(theirs.weighting, name)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=0)
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        ours(leaf, target.cuda())
        theirs(pred.double(), target.double())
    assert ours.weighting.calls == 13
    torch.testing.assert_close(ours.stats.weights.cpu().double(), theirs.stats.weights.double(), rtol=1e-4, atol=0)


def test_callable_weighting_and_gradients_of_values():
    pred, target = make_rows(12, 16, distance=0.5)
    options = {**TERMS["all"], "weighting": lambda gram, values: 1 / gram.diagonal().sqrt()}
    _, grad, _ = run(pred, target, **options)
    assert relative_error(grad, truth(pred, target, **options).grad) < 1e-5


def test_double_backward():
    pred, target = make_rows(6, 8, distance=0.5)
    second = []
    for device, dtype, backend in (("cuda", torch.float32, "triton"), ("cpu", torch.float64, "reference")):
        leaf = pred.to(device, dtype).requires_grad_()
        loss, _ = functional.seq_loss(
            leaf, target.to(device, dtype), weighting="fixed", backend=backend, **TERMS["all"]
        )
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), leaf)[0].cpu())
    assert relative_error(second[0], second[1]) < 1e-4


def test_without_gradients_nothing_is_kept_of_the_attention():
    pred, target = make_rows(12, 16)
    with torch.no_grad():
        loss, stats = functional.seq_loss(
            pred.cuda(), target.cuda(), backend="triton", weighting="fixed", **TERMS["all"]
        )
    assert stats.gram is None
    torch.testing.assert_close(loss.cpu().double(), truth(pred, target, **TERMS["all"]).loss, rtol=1e-6, atol=0)


def test_twice_the_same_bits():
    pred, target = make_rows(65, 130, dtype=torch.bfloat16)
    first, second = (run(pred, target, **TERMS["all"]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("depth", [690, 720, 760])  # exp is subnormal from 708.4 and 0 from 745.1 on
def test_own_key_whose_exp_is_subnormal(depth):
    pred, target = rows_far_below(depth, 0.001)
    options = {"mse": 0.0, "infonce": 1.0, "temperature": 0.001}
    true = truth(pred, target, **options)
    loss, grad, _ = run(pred, target, **options)
    rounding = 8 * torch.finfo(torch.float32).eps / 0.001  # of logits up to 1,000
    assert loss.item() == pytest.approx(true.loss.item(), rel=rounding)
    assert relative_error(grad, true.grad) <= rounding


def test_a_row_that_sends_nothing_is_a_negative_of_the_columns():
    """In both directions its pred has a gradient though its target is zero; here it has all of one column's."""
    pred = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    target = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    options = {"mse": 0.0, "infonce": 1.0, "temperature": 0.3, "direction": "both"}
    _, grad, stats = run(pred, target, **options)
    true = truth(pred, target, **options)
    assert true.grad[0].norm() > 1e-2
    for got, wanted in zip(grad, true.grad, strict=True):
        assert relative_error(got, wanted) < 3e-6
    torch.testing.assert_close(stats.gram.cpu().double(), true.stats.gram, rtol=1e-5, atol=0)


@pytest.mark.parametrize("direction", ["pred_to_target", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_target_of_tiny_norm_leaves_the_others_their_digits(dtype, direction):
    """Its 1/|k| is 10^6 times that of the others, which is more than the range of float16 weights."""
    pred, target = make_rows(16, 64, dtype=torch.float64)
    target[0] *= 1e-6
    pred, target = pred.to(dtype), target.to(dtype)
    options = {"mse": 0.0, "infonce": 1.0, "direction": direction}
    _, grad, _ = run(pred, target, **options)
    # Weights and the result are rounded.
    assert relative_error(grad, truth(pred, target, **options).grad) <= 4 * torch.finfo(dtype).eps
