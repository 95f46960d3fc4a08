"""What tests of the compiled op share: inputs, the float64 truth and the error rule.

The error rule: against the plain PyTorch definition in float64 on the same numbers, the relative error of the op (of
the loss, and norm-wise of the gradient) is at most twice that of the code people write today in the same dtype, plus 4
units in the last place of the result's dtype. The 4: both sides are a handful of roundings, and with few rows either
may be lucky.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from amn_kernels import LossStats, functional
from amn_kernels.reference import eager, terms

TERMS = {
    "mse": {"mse": 1.0},
    "cosine": {"mse": 0.0, "cosine": 1.0},
    "infonce": {"mse": 0.0, "infonce": 1.0},
    "all": {"mse": 1.0, "cosine": 0.5, "infonce": 0.25},
}
"""Options by the name under which a test runs them."""

WITHOUT_INFONCE = {
    "rows": {"mse": 1.0, "cosine": 0.5},
    "columns": {"mse": 0.0, "moment": 0.5, "variance": 0.5},
    "rows and columns": {"mse": 1.0, "cosine": 0.5, "moment": 0.5, "variance": 0.5},
}
"""Options under which no matrix product meets the rows."""

FLOOR_ULP = 4


class Result(NamedTuple):
    loss: Tensor  # []
    grad: Tensor  # shape and dtype of pred
    stats: LossStats | None


def make_rows(*shape, dtype=torch.float32, distance=None, seed=0):
    """Random pred and target; with ``distance``, pred is the target plus noise of that share of its norm."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(*shape, generator=generator, dtype=torch.float64)
    pred = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if distance is not None:
        pred = target + distance * pred
    return pred.to(dtype), target.to(dtype)


def rows_far_below(depth, temperature, dtype=torch.float32):
    """Two rows, of which the own logit of the first is `depth` below that of the other key."""
    own = torch.tensor([1 - depth * temperature, 1.0], dtype=torch.float64)  # cosines of the first row
    target = torch.stack([own, (1 - own.square()).sqrt()], dim=1)
    return target.flip(0)[[0, 0]].to(dtype), target.to(dtype)


def seq_loss(pred, target, incoming=1.0, **options) -> Result:
    """Loss, gradient of ``incoming * loss`` and stats; pred keeps its strides."""
    leaf = pred.detach().requires_grad_()
    loss, stats = functional.seq_loss(leaf, target, **{"weighting": "fixed", **options})
    (grad,) = torch.autograd.grad(loss, leaf, loss.new_tensor(incoming))
    return Result(loss.detach(), grad, stats)


def truth(pred, target, incoming=1.0, **options) -> Result:
    """The plain PyTorch definition on float64 copies."""
    return seq_loss(pred.double(), target.double(), incoming, **{**options, "backend": "reference"})


def eager_loss(pred, target, incoming=1.0, **options) -> Result:
    """The code people write today, in the dtype of its input; what autocast would widen is widened."""
    leaf = pred.detach().requires_grad_()
    dtype = torch.promote_types(pred.dtype, target.dtype)
    loss = eager.seq_loss(leaf.to(dtype).flatten(0, -2), target.to(dtype).flatten(0, -2), **options)
    (grad,) = torch.autograd.grad(loss, leaf, loss.new_tensor(incoming))
    return Result(loss.detach(), grad, None)


def relative_error(got, wanted) -> float:
    """Norm-wise; against a true zero, the norm of what was got."""
    wanted = wanted.double()
    scale = wanted.norm().item() or 1.0
    return (got.double() - wanted).norm().item() / scale


def assert_error_rule(draw, *, incoming=1.0, draws=1, backend="cpu", chunk_bytes=None, **options):
    """The error rule for ``draw(seed) -> (pred, target)``, in root mean square over ``draws`` seeds."""
    squares = torch.zeros(4, dtype=torch.float64)
    for seed in range(draws):
        pred, target = draw(seed)
        true = truth(pred, target, incoming, **options)
        ours = seq_loss(pred, target, incoming, backend=backend, chunk_bytes=chunk_bytes, **options)
        theirs = eager_loss(pred, target, incoming, **options)
        assert ours.grad.dtype == pred.dtype
        assert ours.grad.shape == pred.shape
        errors = [
            relative_error(ours.loss, true.loss),
            relative_error(theirs.loss, true.loss),
            relative_error(ours.grad, true.grad),
            relative_error(theirs.grad, true.grad),
        ]
        squares += torch.tensor(errors, dtype=torch.float64).square() / draws
    ours_loss, theirs_loss, ours_grad, theirs_grad = squares.sqrt().tolist()
    assert ours_loss <= 2 * theirs_loss + FLOOR_ULP * torch.finfo(ours.loss.dtype).eps
    assert ours_grad <= 2 * theirs_grad + FLOOR_ULP * torch.finfo(pred.dtype).eps


def assert_masked_rows_are_not_there(backend, weights, shape, negatives="all", device="cpu"):
    """Loss, gradients of both sides, Gram matrix and metrics, of rows of NaN and infinity under a mask."""
    pred, target = (x.to(device) for x in make_rows(*shape, distance=0.5))
    mask = (torch.arange(pred[..., 0].numel(), device=device) % 3 != 0).view(pred.shape[:-1])

    def run(pred, target, **options):
        leaves = [x.detach().clone().requires_grad_() for x in (pred, target)]
        loss, stats = functional.seq_loss(*leaves, **weights, weighting="fixed", backend=backend, **options)
        return loss.detach(), torch.autograd.grad(loss, leaves), stats

    loss, gradients, stats = run(pred[mask], target[mask])
    pred[~mask], target[~mask] = torch.nan, torch.inf
    got, found, told = run(pred, target, mask=mask, negatives=negatives)
    assert relative_error(got, loss) <= 3e-6
    for x, wanted in zip(found, gradients, strict=True):
        assert relative_error(x[mask], wanted) <= 3e-6
        assert not x[~mask].any()
    assert relative_error(told.gram, stats.gram) <= 3e-5
    assert relative_error(told.metrics, stats.metrics) <= 3e-6


AROUND = {
    "pred": (True, False),
    "target": (False, True),
    "both": (True, True),
    "crossed": (True, True),
}
"""On which side norms lie around the smallest one; crossed: a short row meets a zero one."""


def around_the_smallest(x):
    """Norms just below and above the smallest one that counts, half and twice of it, and the other rows as they are."""
    near = 64 * torch.finfo(x.dtype).eps  # more than a norm is rounded by
    factors = torch.tensor([1 - near, 1 + near, 0.5, 2.0], dtype=torch.float64)
    rows = x.double()
    rows[:4] *= terms.EPS * (factors / rows[:4].norm(dim=1)).unsqueeze(1)
    rows = rows.to(x.dtype)
    assert (rows.double().norm(dim=1) < terms.EPS)[:4].tolist() == [True, False, True, False]
    return rows


def check_norms_around_the_smallest(backend, side, dtype, *, device="cpu", keys_learn=True, **options):
    """Which rows count, loss, norms of the term gradients, and each row's gradient by its own size.

    keys_learn: extra negatives too, and gradients of target and of these.
    """
    pred, target = make_rows(33, 19, dtype=dtype)
    pred, target = (
        around_the_smallest(x) if is_short else x for x, is_short in zip((pred, target), AROUND[side], strict=True)
    )
    if side == "crossed":
        target = target.roll(1, dims=0)
    rows = {"pred": pred, "target": target}
    if keys_learn:
        rows["extra"] = around_the_smallest(make_rows(6, 19, dtype=dtype, seed=3)[0])
    tau = 0.3
    weights = {"mse": 0.0, "cosine": 0.5, "infonce": 0.25}
    options = {**weights, "temperature": tau, "weighting": "fixed", **options}

    def run(backend, given):
        leaves = {name: x.detach().requires_grad_(name == "pred" or keys_learn) for name, x in given.items()}
        extra = {"extra_negatives": leaves["extra"]} if keys_learn else {}
        loss, stats = functional.seq_loss(leaves["pred"], leaves["target"], backend=backend, **extra, **options)
        wanted = [x for x in leaves.values() if x.requires_grad]
        return loss.detach().cpu(), stats, [x.cpu() for x in torch.autograd.grad(loss, wanted)]

    loss, stats, gradients = run(backend, {name: x.to(device) for name, x in rows.items()})
    doubles = {name: x.double() for name, x in rows.items()}
    true_loss, true_stats, true_gradients = run("reference", doubles)
    rounding = 16 * torch.finfo(loss.dtype).eps / tau  # of logits up to 1/tau
    assert (loss.double() - true_loss).abs() <= rounding
    for name in ("cosine_similarity", "pred_norm", "target_norm"):
        got, wanted = (getattr(x, name).item() for x in (stats, true_stats))
        assert got == pytest.approx(wanted, rel=rounding, abs=rounding if name == "cosine_similarity" else 0), name
    own = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    for term in ("cosine", "infonce"):
        wanted = true_stats.grad_norm[term].item()
        assert stats.grad_norm[term].item() == pytest.approx(wanted, rel=4 * rounding + own), term

    # The vectors that a row's gradient is a sum of: a key has one of each row that looks at it.
    units = {name: terms.normalize(x) for name, x in doubles.items()}
    keys = torch.cat([x for name, x in units.items() if name != "pred"])
    looked_at = (units["pred"] @ keys.T / tau).softmax(dim=1).sum(dim=0)
    sizes = {"pred": torch.full((33,), 2.0), "target": 2 + looked_at[:33], "extra": 2 + looked_at[33:]}
    for (name, x), got, true in zip(doubles.items(), gradients, true_gradients, strict=False):
        norms = x.norm(dim=1)
        counts = norms >= terms.EPS
        assert got.dtype == dtype
        assert not got[~counts].any(), f"{name}: a row that counts as zero has a gradient"
        assert torch.equal(got.any(dim=1), true.any(dim=1)), f"{name}: which rows have a gradient"
        pull = (weights["cosine"] + weights["infonce"] / tau * sizes[name]) / (33 * norms)
        error = (got.double() - true).norm(dim=1)
        assert (error <= rounding * pull + own * true.norm(dim=1))[counts].all(), name
