"""The compiled op on special rows: zero, equal, tiny, huge, not finite."""

import math

import pytest
import torch
from error_rule import (
    AROUND,
    TERMS,
    check_norms_around_the_smallest,
    make_rows,
    relative_error,
    rows_far_below,
    seq_loss,
    truth,
)

from amn_kernels import functional

N, D = 33, 19  # one more than two vectors of float32; a tail in every row


def zero(*rows):
    def change(x):
        x = x.clone()
        x[list(rows)] = 0
        return x

    return change


def duplicate(x):
    x = x.clone()
    x[5], x[20] = x[2], -x[2]
    return x


def same(x):
    return x


def scaled(factor):
    return lambda x: x * factor


def identical(x):
    return x[:1].repeat(len(x), 1)


EDGES = {
    "zero rows in pred": (zero(0, 7, N - 1), same),
    "zero rows in target": (same, zero(0, 7, N - 1)),
    "zero rows in both, one in common": (zero(0, 7), zero(7, 9)),
    "zero pred": (zero(*range(N)), same),
    "zero target": (same, zero(*range(N))),
    "all zero": (zero(*range(N)), zero(*range(N))),
    "norms around the zero of 1e-8": (scaled(1e-9), scaled(1e-8)),
    "duplicate rows": (duplicate, duplicate),
    "identical targets": (same, identical),
    "identical rows": (identical, identical),
    "tiny": (scaled(1e-6), scaled(1e-6)),
    "huge": (scaled(1e15), scaled(1e15)),
    "tiny against huge": (scaled(1e-6), scaled(1e15)),
    "huge against tiny": (scaled(1e15), scaled(1e-6)),
}


def natural_gradient(pred, target, temperature, **weights):
    """Norm of the vectors that a gradient is the difference of: what rounding is relative to where they cancel."""
    norms = pred.double().norm(dim=1)
    lengths = torch.where((norms < 1e-8) | (target.double().norm(dim=1) < 1e-8), torch.inf, norms)
    directions = (1 / lengths).norm().item() / len(pred)
    mse = 2 * (pred.double() - target.double()).norm().item() / pred.numel()
    return (
        weights.get("mse", 1.0) * mse
        + (weights.get("cosine", 0.0) + weights.get("infonce", 0.0) / temperature) * directions
    )


def natural_value(term, true):
    """What rounding of a term's value is relative to: MSE is a sum of squares, the others are of cosines."""
    return true if term == "mse" else max(1.0, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 10.0])  # logits up to 100, as usual, nearly uniform weights
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("edge", EDGES)
def test_as_defined(edge, term, temperature, dtype):
    change_pred, change_target = EDGES[edge]
    pred, target = make_rows(N, D, dtype=dtype)
    pred, target = change_pred(pred), change_target(target)
    options = {**TERMS[term], "temperature": temperature}
    true = truth(pred, target, **options)
    ours = seq_loss(pred, target, backend="cpu", **options)
    eps = torch.finfo(dtype).eps
    # Logits up to 1/temperature carry a few units of rounding, 8 with the matrix product, into loss and weights.
    rounding = 8 * eps / min(1.0, temperature)
    assert true.loss.isfinite()
    allowed = 0.0
    for name, value in true.stats.value.items():
        tolerance = (rounding if name == "infonce" else 8 * eps) * natural_value(name, value.item())
        assert abs(ours.stats.value[name].item() - value.item()) <= tolerance, name
        allowed += options[name] * tolerance
    assert (ours.loss.double() - true.loss).abs() <= allowed + eps * true.loss.abs()
    difference = (ours.grad.double() - true.grad).norm().item()
    assert difference <= rounding * natural_gradient(pred, target, **options)
    assert torch.equal(ours.grad == 0, true.grad == 0) or "zero" not in edge
    assert ours.stats.cosine_similarity.item() == pytest.approx(
        true.stats.cosine_similarity.item(), rel=8 * eps, abs=8 * eps
    )
    for name in ("pred_norm", "target_norm"):
        assert getattr(ours.stats, name).item() == pytest.approx(getattr(true.stats, name).item(), rel=8 * eps, abs=0)
    if true.stats.top1 is not None:
        assert ours.stats.top1.item() == pytest.approx(true.stats.top1.item(), rel=eps)


@pytest.mark.parametrize("direction", ["pred_to_target", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("keys_learn", [False, True])
@pytest.mark.parametrize("side", AROUND)
def test_norms_just_around_the_smallest(side, keys_learn, dtype, direction):
    check_norms_around_the_smallest("cpu", side, dtype, keys_learn=keys_learn, direction=direction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", ["pred_to_target", "both"])
def test_rows_of_all_lengths_at_once(direction, dtype):
    """From 1e-6 to 1e6 in one batch: by the sizes of each row, as a norm over all shows the shortest alone."""
    pred, target = make_rows(N, D, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    pred, target = (x * 10.0 ** (12 * torch.rand(N, 1, generator=generator) - 6).to(dtype) for x in (pred, target))
    tau, n = 0.3, N
    eps = torch.finfo(dtype).eps
    units = [x.double() / x.double().norm(dim=1, keepdim=True) for x in (pred, target)]
    looked_at = (units[0] @ units[1].T / tau).softmax(dim=1).sum(dim=0)
    for term in ("mse", "cosine", "infonce"):
        options = {"mse": 0.0, term: 1.0, "temperature": tau, "direction": direction, "weighting": "fixed"}
        gradients = []
        for backend, rows in (("cpu", (pred, target)), ("reference", (pred.double(), target.double()))):
            leaves = [x.detach().requires_grad_() for x in rows]
            loss, _ = functional.seq_loss(*leaves, backend=backend, **options)
            gradients.append(torch.autograd.grad(loss, leaves))
        for x, looks, got, true in zip((pred, target), (torch.ones(n), 1 + looked_at), *gradients, strict=True):
            size = {
                "mse": 2 * (pred.double() - target.double()).norm(dim=1) / (n * D),
                "cosine": 1 / (n * x.double().norm(dim=1)),
                "infonce": 2 * looks / (n * tau * x.double().norm(dim=1)),
            }[term]
            error = (got.double() - true).norm(dim=1)
            assert (error <= 16 * eps / (tau if term == "infonce" else 1) * size).all(), term


@pytest.mark.parametrize("temperature", [0.01, 10.0])
def test_identical_rows_are_chance(temperature):
    pred, target = (identical(x) for x in make_rows(300, D))
    ours = seq_loss(pred, target, backend="cpu", mse=0.0, infonce=1.0, temperature=temperature)
    # The rounding of logits of at most 1/temperature.
    assert ours.loss.item() == pytest.approx(math.log(300), abs=4 * torch.finfo(torch.float32).eps / temperature + 1e-6)
    assert ours.stats.top1 == 0
    assert ours.stats.chance.item() == pytest.approx(math.log(300))


def test_temperature_decides_between_retrieval_and_chance():
    pred, target = make_rows(300, 64, distance=0.1)
    cold, warm = (
        seq_loss(pred, target, backend="cpu", mse=0.0, infonce=1.0, temperature=t).loss.item() for t in (0.01, 10.0)
    )
    # The own cosine is above 0.98 and 64 dimensions leave about 0.4 at most to others: e^-50 is left of them.
    assert 0 < cold < 1e-15
    # Cosines over 10 differ by 0.1 at most.
    assert warm == pytest.approx(math.log(300), abs=0.11)


@pytest.mark.parametrize("position", [(0, 0), (7, 15), (7, 16), (N - 1, D - 1)])  # ends of rows, vectors and tails
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", ["pred", "target", "both"])
@pytest.mark.parametrize("term", TERMS)
def test_a_row_that_is_not_finite_never_gives_a_finite_loss(term, of, bad, position):
    pred, target = make_rows(N, D)
    if of != "target":
        pred[position] = bad
    if of != "pred":
        target[position] = bad
    assert not functional.seq_loss(pred, target, backend="reference", **TERMS[term])[0].isfinite()
    assert not functional.seq_loss(pred, target, backend="cpu", **TERMS[term])[0].isfinite()
    ours = seq_loss(pred, target, backend="cpu", **TERMS[term])
    assert not ours.loss.isfinite()
    assert not ours.grad.isfinite().all()


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("of", ["pred", "target"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_single_row_that_is_not_finite(term, of, bad):
    """Without other keys infonce is 0, but not of a row that is no vector."""
    pred, target = make_rows(1, D)
    (pred if of == "pred" else target)[0, 3] = bad
    assert not functional.seq_loss(pred, target, backend="reference", **TERMS[term])[0].isfinite()
    assert not functional.seq_loss(pred, target, backend="cpu", **TERMS[term])[0].isfinite()


@pytest.mark.parametrize("length", [0.0, 1.0])
def test_one_row(length):
    pred, target = make_rows(1, D, dtype=torch.float64)
    pred *= length
    ours = seq_loss(pred, target, backend="cpu", **TERMS["all"])
    true = truth(pred, target, **TERMS["all"])
    assert ours.stats.value["infonce"] == 0
    assert ours.stats.chance == 0
    torch.testing.assert_close(ours.loss, true.loss, rtol=1e-14, atol=0)  # float64 rounding
    torch.testing.assert_close(ours.grad, true.grad, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("term", TERMS)
def test_float16_near_overflow(term):
    """Rows of norm 6e4: every square overflows float16, and sums of squares are 4e9."""
    pred, target = make_rows(N, 64, dtype=torch.float64)
    pred, target = (6e4 * x / x.norm(dim=1, keepdim=True) for x in (pred, target))
    pred, target = pred.half(), target.half()
    assert pred.isfinite().all()
    # The true gradient of cosine and infonce is about 1e-6: scaled to be no subnormal number.
    incoming = 1.0 if term in ("mse", "all") else 2.0**20
    true = truth(pred, target, incoming, **TERMS[term])
    ours = seq_loss(pred, target, incoming, backend="cpu", **TERMS[term])
    assert ours.loss.item() == pytest.approx(true.loss.item(), rel=1e-6)  # float32 logits of 1/0.07
    assert relative_error(ours.grad, true.grad) <= 0.51 * torch.finfo(torch.float16).eps  # rounded once, to float16


def test_gradient_of_far_keys_is_zero_not_nan():
    """Every other key is e^-200 away: all weights underflow in float32."""
    pred = torch.eye(D) + 0.01
    ours = seq_loss(pred, pred.clone(), backend="cpu", mse=0.0, infonce=1.0, temperature=0.005)
    true = truth(pred, pred, mse=0.0, infonce=1.0, temperature=0.005)
    assert true.loss < 1e-37
    assert 0 <= ours.loss < 1e-37
    assert ours.grad.norm() < 1e-30


def test_later_blocks_far_below_the_first():
    """Keys in descending similarity, 64 at a time: beside a later block, what was summed before is e^100 and more."""
    pred, target = make_rows(300, 8)
    pred = pred[:1] + 0.01 * pred
    cosines = (pred[:1] @ target.T).squeeze() / target.norm(dim=1)
    target = target[cosines.argsort(descending=True)]
    options = {"mse": 0.0, "infonce": 1.0, "temperature": 0.004}
    true = truth(pred, target, **options)
    ours = seq_loss(pred, target, backend="cpu", chunk_bytes=1, **options)
    rounding = 8 * torch.finfo(torch.float32).eps / 0.004  # of logits up to 250
    assert ours.loss.item() == pytest.approx(true.loss.item(), rel=rounding)
    assert relative_error(ours.grad, true.grad) <= rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_own_key_far_below_the_others(dtype):
    """The worst row there is: its target is opposite, another key is the same. exp(-200/0.07...) underflows."""
    pred, target = make_rows(N, D, dtype=dtype)
    target[3], target[4] = -pred[3], pred[3]
    options = {"mse": 0.0, "infonce": 1.0, "temperature": 0.002}  # the own logit is 1000 below the largest
    true = truth(pred, target, **options)
    ours = seq_loss(pred, target, backend="cpu", **options)
    rounding = 8 * torch.finfo(dtype).eps / 0.002  # of logits up to 500
    assert ours.loss.item() == pytest.approx(true.loss.item(), rel=rounding)
    assert relative_error(ours.grad, true.grad) <= rounding


@pytest.mark.parametrize("direction", ["pred_to_target", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [690, 708, 712, 720, 744, 760])  # exp is subnormal from 708.4 and 0 from 745.1 on
def test_own_key_whose_exp_is_subnormal(depth, dtype, direction):
    pred, target = rows_far_below(depth, 0.001, dtype)
    options = {"mse": 0.0, "infonce": 1.0, "temperature": 0.001, "direction": direction}
    true = truth(pred, target, **options)
    ours = seq_loss(pred, target, backend="cpu", **options)
    rounding = 8 * torch.finfo(dtype).eps / 0.001  # of logits up to 1,000
    assert ours.loss.item() == pytest.approx(true.loss.item(), rel=rounding)
    assert relative_error(ours.grad, true.grad) <= rounding
