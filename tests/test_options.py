"""Options of the compiled op one at a time: the error rule over shapes, special rows, masks, repeatability, properties.

What options do together is in test_combinations.py.
"""

import math

import pytest
import torch
from error_rule import (
    FLOOR_ULP,
    WITHOUT_INFONCE,
    assert_masked_rows_are_not_there,
    make_rows,
    relative_error,
)
from hypothesis import given
from hypothesis import strategies as st

from amn_kernels import functional, infonce, ops
from amn_kernels.options import DEFAULT_CHUNK_BYTES, LossOptions

INFONCE = {"mse": 0.0, "infonce": 1.0}
OPTIONS = {
    "both": {**INFONCE, "direction": "both"},
    "step": {**INFONCE, "negatives": "step"},
    "by id": {**INFONCE, "positives": "ids"},
    "by id, both": {**INFONCE, "positives": "ids", "direction": "both"},
    "margin": {**INFONCE, "false_negative_margin": 0.9},
    "moment": {"mse": 0.0, "moment": 1.0},
    "variance": {"mse": 0.0, "variance": 1.0},
}


def run(pred, target, incoming=1.0, *, steps=1, **options):
    """Loss and gradients of pred and target, multiplied by `incoming`; with negatives="step", of so many steps."""
    leaves = [x.detach().requires_grad_() for x in (pred, target)]
    if options.get("positives") == "ids":
        ids = torch.arange(pred.shape[:-1].numel()).view(pred.shape[:-1])
        options.setdefault("ids", ids % max(2, ids.numel() // 3))
    if options.get("negatives") == "step" and pred.dim() == 2:
        leaves = [x.view(-1, steps, x.shape[-1]) for x in leaves]
    loss, _ = functional.seq_loss(*leaves, weighting="fixed", **options)
    gradients = [None] * 2
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, leaves, loss.new_tensor(incoming), allow_unused=True)
    return loss.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True))


SHAPES = [(1, 64), (2, 7), (31, 1000), (63, 3), (65, 768), (257, 384), (1000, 64), (257, 1), (1000, 7)]
FULL_SHAPES = [(n, d) for n in (1, 2, 31, 63, 65, 257, 1000, 4097) for d in (1, 3, 7, 64, 384, 768, 1000, 1536)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", [None, 0.3])
@pytest.mark.parametrize(
    ("n", "dim"), [*SHAPES, *(pytest.param(*shape, marks=pytest.mark.full) for shape in FULL_SHAPES)]
)
@pytest.mark.parametrize("option", OPTIONS)
def test_error_rule(option, n, dim, distance, dtype):
    """At most twice the error of plain PyTorch in the same dtype, plus a floor; both against float64."""
    if dim == 1 and option not in ("moment",):
        distance = None  # in one dimension only signs count, and near rows have no gradient at all
    pred, target = make_rows(n, dim, dtype=dtype, distance=distance)
    if option == "step" and n % 5 == 0:
        pred, target = (x.view(-1, 5, dim) for x in (pred, target))
    options, incoming = OPTIONS[option], 1024.0 if dtype == torch.float16 else 1.0
    true = run(pred.double(), target.double(), incoming, **options, backend="reference")
    ours = run(pred, target, incoming, **options, backend="cpu")
    theirs = run(pred, target, incoming, **options, backend="reference")
    # What gradients are rounded against where they cancel: the size of one row's pull along one key.
    smallest = (
        (1 / pred.double().norm(dim=-1)).norm().item() / n * incoming * (1e-7 if dtype != torch.float64 else 1e-15)
    )
    for name, got, plain, wanted in zip(("loss", "pred", "target"), ours, theirs, true, strict=True):
        eps = torch.finfo(got.dtype).eps
        size = wanted.double().norm().item()
        error = (got.double() - wanted.double()).norm().item()
        allowed = 2 * (plain.double() - wanted.double()).norm().item() + FLOOR_ULP * eps * size
        assert error <= allowed + 4 * smallest / 0.07, name


EDGES = {
    "zero pred": lambda p, t: (torch.where(torch.arange(33).unsqueeze(1) % 5 > 0, p, 0), t),
    "zero target": lambda p, t: (p, torch.where(torch.arange(33).unsqueeze(1) % 4 > 0, t, 0)),
    "all zero": lambda p, t: (0 * p, 0 * t),
    "identical rows": lambda p, t: (p[:1].expand_as(p).contiguous(), t[:1].expand_as(t).contiguous()),
    "duplicates": lambda p, t: (p[torch.arange(33) // 2], t[torch.arange(33) // 2]),
    "tiny": lambda p, t: (1e-6 * p, 1e-6 * t),
    "huge": lambda p, t: (1e15 * p, 1e15 * t),
    "tiny against huge": lambda p, t: (1e-6 * p, 1e15 * t),
}


def natural_loss(option, pred, target, true):
    """What rounding of the value is relative to: of moment, which has the scale of the rows, the sizes it subtracts."""
    if option != "moment":
        return max(1.0, true)
    moments = [[f(x.double(), dim=0).abs() for x in (pred, target)] for f in (torch.mean, torch.std)]
    return sum((a + b).square().mean().item() for a, b in moments)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("option", OPTIONS)
def test_special_rows(option, edge, dtype, temperature):
    pred, target = EDGES[edge](*make_rows(33, 19, dtype=dtype))
    options = {**OPTIONS[option], "temperature": temperature}
    true = run(pred.double(), target.double(), **options, backend="reference", steps=3)
    ours = run(pred, target, **options, backend="cpu", steps=3)
    rounding = 16 * torch.finfo(dtype).eps / min(1.0, temperature)
    assert all(x.isfinite().all() for x in true)
    assert (ours[0].double() - true[0]).abs() <= rounding * natural_loss(option, pred, target, true[0].item())
    for got, wanted, x in zip(ours[1:], true[1:], (pred, target), strict=True):
        norms = x.double().norm(dim=1)
        pull = (1 / norms[norms > 1e-8]).norm().item() / len(x) / min(1.0, temperature) if norms.max() > 1e-8 else 0
        if option in ("moment", "variance"):
            pull = wanted.norm().item() if edge != "identical rows" else math.inf  # of columns without deviation
        assert (got.double() - wanted).norm() <= rounding * max(pull, wanted.norm().item())
        assert got.isfinite().all()


@pytest.mark.parametrize("n", [2, 33, 200])  # of one block of rows, and of several
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [1e-6, 1.1, 1e6])
def test_a_constant_column_has_no_deviation(length, dtype, n):
    """Whatever its size, variance, whose hinge misses all of it, does not pull."""
    pred, target = make_rows(n, 19, dtype=torch.float64)
    pred, target = ((length * x).to(dtype) for x in (pred[:1].expand_as(pred), target))
    loss, grad, _ = run(pred, target, mse=0.0, variance=1.0, backend="cpu")
    assert loss.item() > 0.1
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("option", OPTIONS)
def test_half_precision_near_overflow(option, dtype):
    """Rows of norm 6e4, whose squares overflow float16, and of norm 1e15 in bfloat16; gradients of both sides."""
    pred, target = make_rows(33, 64, dtype=torch.float64)
    norm = 6e4 if dtype is torch.float16 else 1e15
    pred, target = ((norm * x / x.norm(dim=1, keepdim=True)).to(dtype) for x in (pred, target))
    incoming = 1.0 if option == "moment" else 16 * norm  # true gradients of 1: no subnormal numbers
    true = run(pred.double(), target.double(), incoming, **OPTIONS[option], backend="reference", steps=3)
    ours = run(pred, target, incoming, **OPTIONS[option], backend="cpu", steps=3)
    assert ours[0].item() == pytest.approx(true[0].item(), rel=2e-6)  # float32 logits of 1/0.07
    for got, wanted in zip(ours[1:], true[1:], strict=True):
        assert relative_error(got, wanted) <= 0.51 * torch.finfo(dtype).eps  # rounded once


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("counting", [0, 1, 2])
def test_few_rows_that_count(option, counting):
    """All rows masked: loss 0 and gradient 0; else as if the others were not there."""
    pred, target = make_rows(9, 7, dtype=torch.float64)
    mask = torch.zeros(9, dtype=torch.bool)
    mask[3 : 3 + counting] = True
    pred[~mask] = math.nan
    target[~mask] = math.inf
    options = {key: value for key, value in OPTIONS[option].items() if key != "negatives"}
    ids = {"ids": torch.zeros(9, dtype=torch.int64)} if "positives" in options else {}
    leaf = pred.clone().requires_grad_()
    loss, stats = functional.seq_loss(leaf, target, mask=mask, **ids, **options, weighting="fixed", backend="cpu")
    (grad,) = torch.autograd.grad(loss, leaf)
    assert not grad[~mask].any()
    assert all(math.isfinite(value) for name, value in stats.as_dict().items() if "share" not in name)
    if counting == 0:
        assert loss == 0
        return
    few = pred[mask].requires_grad_()
    ids = {name: x[mask] for name, x in ids.items()}
    wanted, _ = functional.seq_loss(few, target[mask], **ids, **options, weighting="fixed", backend="cpu")
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grad[mask], torch.autograd.grad(wanted, few)[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("shape", "negatives"), [((40, 12), "all"), ((5, 13, 12), "step"), ((5, 13, 12), "sequence")])
@pytest.mark.parametrize("terms", WITHOUT_INFONCE)
def test_masked_rows_are_not_read_without_infonce(terms, shape, negatives):
    assert_masked_rows_are_not_there("cpu", WITHOUT_INFONCE[terms], shape, negatives)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_without_a_row_that_counts_no_variance_is_missing(backend):
    """Not even of a deviation that is asked for by number."""
    pred, target = make_rows(9, 7)
    options = {"mse": 0.0, "variance": 1.0, "variance_target": 0.3, "backend": backend}
    loss, grad, _ = run(pred, target, **options, mask=torch.zeros(9, dtype=torch.bool))
    assert loss == 0
    assert not grad.any()
    assert run(pred[:1], target[:1], **options)[0].item() == pytest.approx(0.3)  # of one row it is


@pytest.mark.parametrize("direction", ["pred_to_target", "both"])
def test_without_negatives_infonce_is_zero(direction):
    pred, target = make_rows(9, 7)
    same = {"ids": torch.zeros(9, dtype=torch.int64)}
    for options, tensors in (({}, same), ({"false_negative_margin": 2.5}, {})):
        loss, grad, _ = run(pred, target, **INFONCE, direction=direction, **options, **tensors, backend="cpu")
        assert loss == 0
        assert not grad.any()


@pytest.mark.parametrize("option", OPTIONS)
def test_repeatable_bit_by_bit(option):
    pred, target = make_rows(1100, 40)
    first = run(pred, target, **OPTIONS[option], backend="cpu", steps=5)
    for _ in range(2):
        for got, wanted in zip(run(pred, target, **OPTIONS[option], backend="cpu", steps=5), first, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("shape", [(1100, 40), (200, 384)], ids=["more keys than D", "fewer"])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 18, 1 << 20])
@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ("moment", "variance")])
def test_chunk_bytes_change_nothing(option, chunk_bytes, shape):
    pred, target = make_rows(*shape)
    wanted = run(pred, target, **OPTIONS[option], backend="cpu", steps=5, chunk_bytes=1 << 30)
    got = run(pred, target, **OPTIONS[option], backend="cpu", steps=5, chunk_bytes=chunk_bytes)
    for x, y in zip(got, wanted, strict=True):
        assert y.norm() > 0
        assert relative_error(x, y) <= 1e-6  # sums in another order


@pytest.mark.parametrize("negatives", ["step", "sequence"])
@pytest.mark.parametrize("chunk_bytes", [1, None])
@pytest.mark.parametrize("direction", ["pred_to_target", "both"])
def test_groups_of_more_rows_than_a_chunk(negatives, chunk_bytes, direction):
    shape = (1100, 2, 12) if negatives == "step" else (2, 1100, 12)
    pred, target = make_rows(*shape, distance=0.5)
    options = {**INFONCE, "cosine": 0.5, "direction": direction, "negatives": negatives}
    found = run(pred, target, **options, backend="cpu", chunk_bytes=chunk_bytes)
    wanted = run(pred.double(), target.double(), **options, backend="reference")
    for got, true in zip(found, wanted, strict=True):
        assert relative_error(got, true) <= 3e-6


@pytest.mark.parametrize(("fits", "products"), [(1100, 9), (2400, 8), (2600, 6)], ids=["none", "one chunk", "all"])
@pytest.mark.parametrize("margin", [None, 0.05])
def test_both_directions_keep_what_fits(fits, products, margin):
    """Three chunks of rows: S and O of each, and S again where it is not kept; a margin needs a guide as large."""
    pred, target = make_rows(2600, 12)
    options = {**INFONCE, "direction": "both", "false_negative_margin": margin, "backend": "cpu"}
    factor = 1 if margin is None else 2
    chunk_bytes = fits * 2600 * 4 * factor
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = run(pred, target, **options, chunk_bytes=chunk_bytes)
    wanted = run(pred.double(), target.double(), **{**options, "backend": "reference"})
    for x, y in zip(found, wanted, strict=True):
        assert relative_error(x, y) <= 3e-6
    # run() asks for target's gradient as well: Q of each chunk.
    guides = 0 if margin is None else products - 3
    assert sum(event.name in ("aten::mm", "aten::addmm") for event in profile.events()) == products + 3 + guides


THREADED = {
    "plain": {},
    "both": {"direction": "both"},
    "columns": {"moment": 0.5, "variance": 0.5},
    "by id, margin": {"positives": "ids", "false_negative_margin": 0.6},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", THREADED)
def test_the_number_of_threads_changes_nothing(form, dtype):
    """Neither loss and gradients nor what balances the weights; more threads than cores are threads as well."""
    pred, target = make_rows(1100, 70, dtype=dtype)
    extra, mask = make_rows(30, 70, dtype=dtype, seed=3)[0], torch.arange(1100) % 7 != 0
    ids = {"ids": torch.arange(1100) % 90} if "positives" in THREADED[form] else {}
    options = {"infonce": 1.0, "cosine": 0.5, "weighting": "fixed", "backend": "cpu", **THREADED[form]}
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)  # put back by the fixture _same_threads
        leaves = [x.clone().requires_grad_() for x in (pred, target, extra)]
        loss, stats = functional.seq_loss(*leaves[:2], mask=mask, extra_negatives=leaves[2], **ids, **options)
        values = torch.stack(list(stats.value.values()))
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves), values, stats.gram, stats.metrics))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("positives", ["diagonal", "ids"])
def test_ids_of_every_integer_type(positives, backend):
    pred, target = make_rows(30, 6)
    results = [
        run(pred, target, **INFONCE, positives=positives, ids=(torch.arange(30) % 7).to(dtype), backend=backend)
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    ]
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            assert torch.equal(got, wanted)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**31))
def test_steps_are_separate_calls(batch, steps, dim, seed):
    """negatives="step" on [B, T, D] is the mean of T calls on [B, D]; "sequence" that of B calls on [T, D]."""
    pred, target = make_rows(batch, steps, dim, dtype=torch.float64, seed=seed)
    for negatives, rows in (("step", (1, 0, 2)), ("sequence", (0, 1, 2))):
        loss, *gradients = run(pred, target, **INFONCE, negatives=negatives, direction="both", backend="cpu")
        parts = [
            run(p, t, **INFONCE, direction="both", backend="cpu")
            for p, t in zip(pred.permute(rows), target.permute(rows), strict=True)
        ]
        torch.testing.assert_close(loss, sum(part[0] for part in parts) / len(parts), rtol=1e-11, atol=1e-14)
        for i, gradient in enumerate(gradients):
            wanted = torch.stack([part[1 + i] for part in parts]) / len(parts)
            torch.testing.assert_close(gradient.permute(rows), wanted, rtol=1e-9, atol=1e-13)


@given(st.integers(2, 60), st.integers(2, 30), st.integers(0, 2**31), st.sampled_from(list(OPTIONS)))
def test_permuting_rows_permutes_gradients(n, dim, seed, option):
    pred, target = make_rows(n, dim, dtype=torch.float64, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    ids = {"ids": order % 3} if "positives" in OPTIONS[option] else {}
    permuted_ids = {name: x[order] for name, x in ids.items()}
    loss, *gradients = run(pred, target, **OPTIONS[option], **ids, backend="cpu")
    permuted_loss, *permuted = run(pred[order], target[order], **OPTIONS[option], **permuted_ids, backend="cpu")
    torch.testing.assert_close(permuted_loss, loss, rtol=1e-11, atol=1e-13)
    for got, wanted in zip(permuted, gradients, strict=True):
        torch.testing.assert_close(got, wanted[order], rtol=0, atol=1e-11 * max(1e-3, wanted.abs().max().item()))


@given(st.integers(2, 60), st.integers(2, 30), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_both_lengths_are_nothing_to_both_directions(n, dim, seed, factor):
    """Scaling pred leaves the loss; gradients are orthogonal to the vectors they belong to."""
    pred, target = make_rows(n, dim, dtype=torch.float64, seed=seed)
    loss, *gradients = run(pred, target, **OPTIONS["both"], backend="cpu")
    scaled = run(factor * pred, target, **OPTIONS["both"], backend="cpu")
    torch.testing.assert_close(scaled[0], loss, rtol=1e-11, atol=1e-14)
    for gradient, x in zip(gradients, (pred, target), strict=True):
        assert (gradient * x).sum(dim=1).abs().max() <= 1e-11 / (0.07 * n)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("distance", [None, 0.05])
def test_gram_matrix_of_all_terms(distance, dtype, tolerance):
    """Moment and variance included, in both directions, against the gradients themselves."""
    pred, target = make_rows(300, 40, dtype=dtype, distance=distance)
    weights = {"mse": 1.0, "cosine": 1.0, "infonce": 1.0, "moment": 1.0, "variance": 1.0}
    single = [
        run(pred.double(), target.double(), **{"mse": 0.0, term: 1.0}, direction="both", backend="reference")[1]
        for term in weights
    ]
    gradients = torch.stack([x.flatten() for x in single])
    wanted = gradients @ gradients.T
    leaf = pred.clone().requires_grad_()
    stats = functional.seq_loss(leaf, target, **weights, direction="both", weighting="fixed", backend="cpu")[1]
    norms = wanted.diagonal().sqrt()
    assert ((stats.gram.double() - wanted).abs() / (norms.unsqueeze(1) * norms)).max() <= tolerance


def test_scratch_follows_what_has_to_be_done():
    x, learned = torch.ones(2, 3), torch.ones(2, 3, requires_grad=True)
    one, both = LossOptions(infonce=1), LossOptions(infonce=1, direction="both")
    several = LossOptions(infonce=1, positives="ids")
    wanted = {
        "pred_to_target": [(learned, x, None, one)],
        "general": [(x, learned, None, one), (x, x, learned, one), (x, x, None, several)],
        "both": [(x, learned, None, both), (x, x, None, both)],
    }
    for kind, calls in wanted.items():
        assert all(ops._chunk_bytes(*call) == DEFAULT_CHUNK_BYTES["cpu"][kind] for call in calls), kind
    with torch.no_grad():
        assert ops._chunk_bytes(x, learned, None, one) == DEFAULT_CHUNK_BYTES["cpu"]["pred_to_target"]
    assert ops._chunk_bytes(x, learned, None, LossOptions(infonce=1, chunk_bytes=5)) == 5


@pytest.mark.parametrize(("count", "most", "size"), [(1000, 524, 512), (385, 384, 256), (8192, 512, 512), (1, 64, 64)])
def test_blocks_of_keys_are_about_even(count, most, size):
    assert infonce._even(count, most) == size
