"""The plain PyTorch definition against formulas written out in loops, and its rules for special rows."""

import itertools
import math

import numpy as np
import pytest
import torch
from error_rule import make_rows

from amn_kernels import functional
from amn_kernels.options import TERMS, LossOptions
from amn_kernels.reference import term_outputs

B, T, D = 3, 4, 5  # all different, so that no mixed up dimension goes unseen
TAU = 0.3


def only(term, **options):
    return LossOptions(**({"mse": 0.0} | {term: 1.0}), temperature=TAU, **options)


def value_of(term, pred, target, *, mask=None, extra_negatives=None, ids=None, **options):
    return term_outputs(
        pred, target, only(term, **options), mask=mask, extra_negatives=extra_negatives, ids=ids
    ).values.squeeze(0)


def unit(x):
    return x / np.sqrt(sum(v * v for v in x))


def log_sum_exp(numbers):
    return math.log(sum(math.exp(x) for x in numbers))


def mse_loops(pred, target, rows):
    return sum((pred[r][k] - target[r][k]) ** 2 for r in rows for k in range(D)) / (len(rows) * D)


def cosine_loops(pred, target, rows):
    return sum(1 - unit(pred[r]) @ unit(target[r]) for r in rows) / len(rows)


def deviation(column):
    mean = sum(column) / len(column)
    return math.sqrt(sum((x - mean) ** 2 for x in column) / (len(column) - 1)) if len(column) > 1 else 0.0


def moment_loops(pred, target, rows):
    total = 0.0
    for k in range(D):
        p, t = [pred[r][k] for r in rows], [target[r][k] for r in rows]
        total += (sum(p) / len(p) - sum(t) / len(t)) ** 2 + (deviation(p) - deviation(t)) ** 2
    return total / D


def variance_loops(pred, target, rows, gamma=None):
    total = 0.0
    for k in range(D):
        wanted = deviation([unit(target[r])[k] for r in rows]) if gamma is None else gamma
        total += max(0.0, wanted - deviation([unit(pred[r])[k] for r in rows]))
    return total / D


def infonce_loops(pred, target, rows, negatives, extra=(), ids=None, both=False):
    """Value, share of rows retrieved and mean chance level; a row is a pair (b, t)."""

    def negatives_of(r):
        together = {
            "all": lambda s: True,
            "step": lambda s: s[1] == r[1],
            "sequence": lambda s: s[0] == r[0],
        }[negatives]
        return [s for s in rows if s != r and together(s) and (ids is None or ids[s] != ids[r])]

    def logit(r, key):
        return unit(pred[r]) @ unit(key) / TAU

    losses, retrieved, chance = [], [], []
    for r in rows:
        own = logit(r, target[r])
        others = [logit(r, target[s]) for s in negatives_of(r)] + [logit(r, key) for key in extra]
        loss = log_sum_exp([own, *others]) - own
        if both:
            loss = (loss + log_sum_exp([own] + [logit(s, target[r]) for s in negatives_of(r)]) - own) / 2
        losses.append(loss)
        retrieved.append(all(own > other for other in others))
        chance.append(math.log(1 + len(others)))
    return tuple(sum(x) / len(rows) for x in (losses, retrieved, chance))


@pytest.fixture
def case():
    """pred, target, a mask whose masked rows are NaN in copies, ids with repeats, extra negatives."""
    pred, target = make_rows(B, T, D, dtype=torch.float64)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 2] = mask[2, 0] = mask[2, 3] = False
    ids = torch.tensor([[1, 2, 3, 1], [1, 4, 4, 5], [6, 2, 7, 8]])
    extra, _ = make_rows(6, D, dtype=torch.float64, seed=1)
    return pred, target, mask, ids, extra


def poison(x, mask):
    return torch.where(mask.unsqueeze(-1), x, torch.nan)


def all_rows(mask):
    return [(b, t) for b in range(B) for t in range(T) if mask is None or mask[b, t]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("term", ["mse", "cosine", "moment", "variance"])
def test_row_and_column_terms(case, term, masked):
    pred, target, mask, _, _ = case
    loops = {"mse": mse_loops, "cosine": cosine_loops, "moment": moment_loops, "variance": variance_loops}[term]
    wanted = loops(pred.numpy(), target.numpy(), all_rows(mask if masked else None))
    assert wanted > 0
    if masked:
        got = value_of(term, poison(pred, mask), poison(target, mask), mask=mask)
    else:
        got = value_of(term, pred, target)
    assert got.item() == pytest.approx(wanted, rel=1e-12)  # float64 rounding


@pytest.mark.parametrize("gamma", [0.2, 2.0])  # below the deviation in some dimensions, above it in all
def test_variance_with_a_given_target(case, gamma):
    pred, target = case[:2]
    wanted = variance_loops(pred.numpy(), target.numpy(), all_rows(None), gamma)
    got = value_of("variance", 0.1 * pred, target, variance_target=gamma)
    assert got.item() == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("term", ["moment", "variance"])
def test_one_row_has_no_deviation(case, term):
    pred, target = case[0][0, :1], case[1][0, :1]
    leaf = pred.clone().requires_grad_()
    value = value_of(term, leaf, target)
    (grad,) = torch.autograd.grad(value, leaf)
    if term == "moment":
        assert value.item() == pytest.approx((pred - target).square().mean().item(), rel=1e-12)
        torch.testing.assert_close(grad, 2 / D * (pred - target))
    else:
        assert value == 0
        assert grad.count_nonzero() == 0


INFONCE_CASES = list(
    itertools.product(("all", "step", "sequence"), ("pred_to_target", "both"), *itertools.repeat((False, True), 3))
)


@pytest.mark.parametrize(("negatives", "direction", "masked", "with_extra", "with_ids"), INFONCE_CASES)
def test_infonce(case, negatives, direction, masked, with_extra, with_ids):
    pred, target, mask, ids, extra = case
    mask, ids, extra = (mask if masked else None), (ids if with_ids else None), (extra if with_extra else None)
    value, top1, chance = infonce_loops(
        pred.numpy(),
        target.numpy(),
        all_rows(mask),
        negatives,
        () if extra is None else extra.numpy(),
        None if ids is None else ids.numpy(),
        direction == "both",
    )
    if masked:
        pred, target = poison(pred, mask), poison(target, mask)
    options = only("infonce", negatives=negatives, direction=direction)
    got = term_outputs(pred, target, options, mask=mask, extra_negatives=extra, ids=ids)
    assert got.values.item() == pytest.approx(value, rel=1e-12)  # float64 rounding
    assert got.metrics[1].item() == pytest.approx(top1, rel=1e-12)
    assert got.metrics[2].item() == pytest.approx(chance, rel=1e-12)


def test_rows_of_two_dimensional_input(case):
    pred, target = case[0].flatten(0, 1), case[1].flatten(0, 1)
    wanted, *_ = infonce_loops(case[0].numpy(), case[1].numpy(), all_rows(None), "all")
    assert value_of("infonce", pred, target).item() == pytest.approx(wanted, rel=1e-12)


def test_temperature_as_a_tensor(case):
    pred, target = case[:2]
    options = LossOptions(mse=0.0, infonce=1.0, temperature=99.0)
    temperature = torch.tensor(TAU, dtype=torch.float64)
    got = term_outputs(pred, target, options, temperature=temperature).values
    torch.testing.assert_close(got.squeeze(0), value_of("infonce", pred, target))


@pytest.mark.parametrize("masked", [False, True])
def test_metrics(case, masked):
    pred, target, mask, _, _ = case
    rows = all_rows(mask if masked else None)
    p, t = pred.numpy(), target.numpy()
    if masked:
        pred, target = poison(pred, mask), poison(target, mask)
    got = term_outputs(pred, target, only("mse"), mask=mask if masked else None).metrics
    wanted = [
        sum(unit(p[r]) @ unit(t[r]) for r in rows) / len(rows),
        0,
        0,  # top1 and chance belong to infonce
        sum(math.sqrt(p[r] @ p[r]) for r in rows) / len(rows),
        sum(math.sqrt(t[r] @ t[r]) for r in rows) / len(rows),
    ]
    assert got.tolist() == pytest.approx(wanted, rel=1e-12)


GRADIENT_OPTIONS = {
    "mse": [{}],
    "cosine": [{}],
    "moment": [{}],
    "variance": [{"variance_target": 0.5}, {}],
    "infonce": [
        {"negatives": negatives, "direction": direction}
        for negatives in ("all", "step", "sequence")
        for direction in ("pred_to_target", "both")
    ],
}
GRADIENT_CASES = [(term, options) for term in TERMS for options in GRADIENT_OPTIONS[term]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("term", "options"), GRADIENT_CASES)
def test_gradients(case, term, options, masked):
    pred, target, mask, ids, extra = case
    is_infonce = term == "infonce"
    temperature = torch.tensor(TAU, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (pred, target, extra, temperature)]
    # The targets' own deviation is a constant by definition: no gradient flows through it.
    inputs[1].requires_grad_(term != "variance")

    def value(pred, target, extra, temperature):
        return term_outputs(
            pred,
            target,
            only(term, **options),
            temperature=temperature,
            mask=mask if masked else None,
            extra_negatives=extra if is_infonce else None,
            ids=ids if is_infonce and masked else None,
        ).values

    assert torch.autograd.gradcheck(value, inputs)
    grads = torch.autograd.grad(value(*inputs).sum(), [x for x in inputs if x.requires_grad], allow_unused=True)
    assert grads[0].count_nonzero() > 0
    if masked:
        assert grads[0][~mask].count_nonzero() == 0


@pytest.mark.parametrize("term", TERMS)
def test_masked_rows_may_hold_nan(case, term):
    pred, target, mask, _, _ = case
    value = value_of(term, pred, target, mask=mask)
    leaves = [poison(x, mask).requires_grad_() for x in (pred, target)]
    poisoned = value_of(term, *leaves, mask=mask)
    assert torch.equal(poisoned, value)
    grads = [g for g in torch.autograd.grad(poisoned, leaves, allow_unused=True) if g is not None]
    assert grads
    for grad in grads:
        assert grad.isfinite().all()
        assert grad[~mask].count_nonzero() == 0


@pytest.mark.parametrize("term", TERMS)
def test_all_rows_masked(case, term):
    nan = torch.full((B, T, D), torch.nan, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(B, T, dtype=torch.bool)
    loss, stats = functional.seq_loss(nan, nan.detach(), mask=none, backend="reference", **{"mse": 0.0, term: 1.0})
    (grad,) = torch.autograd.grad(loss, nan)
    assert loss == 0
    assert grad.count_nonzero() == 0
    assert stats.metrics.count_nonzero() == 0


@pytest.mark.parametrize("length", [0.0, 1e-9])  # both are below 1e-8
@pytest.mark.parametrize("of", ["pred", "target", "both"])
@pytest.mark.parametrize("term", ["mse", "cosine", "infonce"])
def test_zero_vectors(case, term, of, length):
    pred, target = (x.flatten(0, 1).clone() for x in case[:2])
    n, row = len(pred), 3
    if of != "target":
        pred[row] *= length / pred[row].norm()
    if of != "pred":
        target[row] *= length / target[row].norm()
    leaves = [x.requires_grad_() for x in (pred, target)]
    value = value_of(term, *leaves)
    grad, grad_target = torch.autograd.grad(value, leaves)
    others = torch.arange(n) != row
    p, t = pred.detach(), target.detach()
    if term == "mse":
        torch.testing.assert_close(value.detach(), (p - t).square().mean())
        torch.testing.assert_close(grad, 2 / (n * D) * (p - t))
        return
    assert grad[row].count_nonzero() == 0
    assert torch.all(grad[others].norm(dim=1) > 0)
    if of != "pred":
        assert grad_target[row].count_nonzero() == 0
    c = torch.nn.functional.normalize(p, eps=1e-8) @ torch.nn.functional.normalize(t, eps=1e-8).T
    if of != "target":
        c[row] = 0
    if of != "pred":
        c[:, row] = 0
    c[row, row] = 0
    if term == "cosine":
        assert value.item() == pytest.approx((1 - c.diagonal()).mean().item(), rel=1e-12)
    else:
        assert value.item() == pytest.approx(
            torch.nn.functional.cross_entropy(c / TAU, torch.arange(n)).item(), rel=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("term", TERMS)
def test_half_precision_is_computed_in_float32(term, dtype):
    pred, target = make_rows(B, T, D, dtype=dtype)
    half, single = pred.clone().requires_grad_(), pred.float().requires_grad_()
    value, wanted = value_of(term, half, target), value_of(term, single, target.float())
    assert value.dtype == torch.float32
    assert torch.equal(value, wanted)
    (grad,), (wanted_grad,) = torch.autograd.grad(value, half), torch.autograd.grad(wanted, single)
    assert torch.equal(grad, wanted_grad.to(dtype))


def test_steps_are_separate_calls(case):
    """negatives="step" on [B, T, D] is T calls on [B, D], each counting as many rows as it has."""
    pred, target, mask, _, _ = case
    steps = [value_of("infonce", pred[:, t], target[:, t], mask=mask[:, t]) for t in range(T)]
    counts = mask.sum(dim=0)
    assert len(set(counts.tolist())) > 1
    wanted = sum(value * n for value, n in zip(steps, counts, strict=True)) / mask.sum()
    torch.testing.assert_close(value_of("infonce", pred, target, mask=mask, negatives="step"), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_are_misses(dtype):
    pred, target = make_rows(40, 16, dtype=dtype, distance=0.01)
    assert functional.seq_loss(pred, target, infonce=1.0, backend="reference")[1].top1 == 1
    target[7] = 3 * target[2]  # the same direction: each is as near to either prediction
    top1 = functional.seq_loss(pred, target, infonce=1.0, backend="reference")[1].top1
    assert top1.item() == pytest.approx(38 / 40)


def test_chance_counts_the_keys_of_each_row(case):
    pred, target, mask, ids, extra = case
    options = {"mse": 0.0, "infonce": 1.0, "backend": "reference"}

    def chance(**arguments):
        return functional.seq_loss(pred, target, **options, **arguments)[1].chance.item()

    assert chance() == pytest.approx(math.log(12))
    assert chance(negatives="step") == pytest.approx(math.log(3))
    assert chance(extra_negatives=extra) == pytest.approx(math.log(18))
    assert chance(mask=mask) == pytest.approx(math.log(9))
    # 1 stands three times, 2 and 4 twice.
    wanted = (3 * math.log(10) + 4 * math.log(11) + 5 * math.log(12)) / 12
    assert chance(ids=ids) == pytest.approx(wanted)


def test_monitored_terms_send_no_gradient(case):
    pred, target = case[0].clone().requires_grad_(), case[1]
    both = term_outputs(pred, target, LossOptions(mse=1.0, monitor=("infonce",), temperature=TAU)).values
    assert both[1] == value_of("infonce", pred, target)
    (grad,) = torch.autograd.grad(both.sum(), pred)
    torch.testing.assert_close(grad, 2 / (B * T * D) * (pred.detach() - target))


@pytest.mark.parametrize(("factor", "counts"), [(1 - 1e-12, False), (1 + 1e-12, True)])
@pytest.mark.parametrize(
    ("term", "of"),
    [("cosine", "pred"), ("cosine", "target"), ("infonce", "pred"), ("infonce", "target"), ("infonce", "extra")],
)
def test_a_vector_counts_from_a_norm_of_1e_8_on(case, term, of, factor, counts):
    """Then it is worth as much as its direction, and its gradient is that of the unit vector over its length."""
    rows = {"pred": case[0].flatten(0, 1), "target": case[1].flatten(0, 1), "extra": case[4]}

    def run(length):
        leaves = {name: x.clone() for name, x in rows.items()}
        leaves[of][3] *= length / leaves[of][3].norm()
        leaf = leaves[of].requires_grad_()
        extra = leaves["extra"] if term == "infonce" else None
        value = value_of(term, leaves["pred"], leaves["target"], extra_negatives=extra)
        return value.item(), torch.autograd.grad(value, leaf)[0]

    length = factor * 1e-8
    value, gradient = run(length)
    wanted, unit = run(1.0 if counts else 0.0)
    assert value == pytest.approx(wanted, rel=1e-12)
    others = torch.arange(len(gradient)) != 3
    torch.testing.assert_close(gradient[others], unit[others], rtol=1e-10, atol=1e-15)
    if counts:
        assert unit[3].norm() > 1e-3
        torch.testing.assert_close(length * gradient[3], unit[3], rtol=1e-9, atol=1e-15)
    else:
        assert not gradient[3].any()
