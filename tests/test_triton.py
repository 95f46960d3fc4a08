"""The Triton backend on a CUDA device, or without one under ttsem: `make test-triton`.

ttsem runs each launch's compiled IR on the CPU, and fails the test that launched it on an access out of bounds or a
race between programs. Tensors then say that they are on a CUDA device.
"""

import pytest
import torch
from combinations import CHOICES, Tolerances, check, label, sample
from error_rule import TERMS, assert_error_rule, make_rows, relative_error, rows_far_below

from amn_kernels import FusedSeqLoss, backends, functional, reference
from amn_kernels.options import LossOptions
from amn_kernels.triton import why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=f"{why_unavailable()}; see make test-triton")

CASES = sample(240, {**CHOICES, "dtype": (torch.float32, torch.bfloat16, torch.float16)}, candidates=100)
IN_CI = 60
"""The first cases, which have every pair of choices already; the others with --full."""

# Softmax weights of bfloat16 keys are rounded to 8 bits, which a gradient of 8 bits doesn't show but its norm does, and
# that of the temperature, a difference, by more than one rounding.
BFLOAT16 = Tolerances(3e-6, 2**-7, 4e-3)
CHUNKED = {"chunk_bytes": 64 << 20}
"""Named, it keeps small groups from the kernel that is theirs alone."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if i < IN_CI else pytest.mark.full, id=label(case)) for i, case in enumerate(CASES)],
)
def test_combination(case):
    check(case, "triton", "cuda", BFLOAT16 if case["dtype"] == torch.bfloat16 else None)


# One row; two, where nothing averages out; one less and one more than a warp or a block; rows that are no multiple of
# 128 bits; more than one block of D; more than one block of keys.
SHAPES = [(1, 1), (2, 3), (31, 64), (63, 7), (65, 384), (257, 40)]
LARGE = [(257, 768), (1000, 1000), (2100, 3)]


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(shape, marks=pytest.mark.full) for shape in LARGE)], ids=str)
def test_error_rule(shape, dtype, terms):
    def draw(seed):
        return tuple(x.to("cuda") for x in make_rows(*shape, dtype=dtype, distance=0.3, seed=seed))

    # Alone, a row has no InfoNCE, and one of a dimension no angle: their true gradient is 0.
    draws = 1 if shape[0] > 2 else 4
    assert_error_rule(draw, draws=draws, backend="triton", **CHUNKED, **TERMS[terms])


def grads_of(backend, pred, target, **options):
    leaves = [x.detach().requires_grad_() for x in (pred, target)]
    loss, stats = functional.seq_loss(*leaves, backend=backend, weighting="fixed", **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves), stats


def assert_equals_reference(pred, target, tolerance=3e-6, **options):
    loss, *grads, stats = grads_of("triton", pred, target, **CHUNKED, **options)
    wanted_loss, *wanted_grads, wanted = grads_of("reference", pred.double(), target.double(), **options)
    assert relative_error(loss, wanted_loss) <= tolerance
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative_error(grad, wanted_grad) <= tolerance
    assert relative_error(stats.gram, wanted.gram) <= 10 * tolerance


@pytest.mark.parametrize("negatives", ["all", "step", "sequence"])
def test_pred_and_target_have_strides_of_their_own(negatives):
    pred, target = (x.to("cuda") for x in make_rows(5, 7, 20, distance=0.5))
    padded = torch.full((5, 7, 33), torch.nan, device="cuda")  # what lies between rows is not read
    padded[..., :20] = pred
    transposed = target.transpose(0, 1).contiguous().transpose(0, 1)
    assert padded[..., :20].stride() != transposed.stride()
    options = {"mse": 1.0, "cosine": 0.5, "infonce": 0.25, "moment": 0.5, "negatives": negatives, "temperature": 0.3}
    assert_equals_reference(padded[..., :20], transposed, **options)


def test_rows_of_more_than_one_block_of_sums():
    """1,100 rows are nine blocks of sums and three of column moments, which must not fall on each other."""
    pred, target = (x.to("cuda") for x in make_rows(1100, 2, distance=0.5))
    assert_equals_reference(pred, target, mse=1.0, cosine=0.5, moment=0.5, variance=0.5)


@pytest.mark.parametrize("shape", [(40, 130), (40, 300), (5, 1536)], ids=str)
def test_rows_of_more_than_one_block_of_dimensions(shape):
    pred, target = (x.to("cuda") for x in make_rows(*shape, distance=0.5))
    terms = {"mse": 1.0, "cosine": 0.5, "infonce": 0.25, "moment": 0.5, "variance": 0.5}
    assert_equals_reference(pred, target, temperature=0.3, **terms)


@pytest.mark.parametrize("direction", ["pred_to_target", "both"])
def test_a_learned_temperature_that_has_moved(direction):
    pred, target = (x.to("cuda") for x in make_rows(24, 16, distance=0.5))
    results = []
    for backend in ("triton", "reference"):
        options = {"mse": 0.0, "infonce": 1.0, "direction": direction, "learnable_temperature": True}
        criterion = FusedSeqLoss(**options, weighting="fixed", backend=backend).to("cuda")
        criterion.log_temperature.data.fill_(-0.5)
        leaf = pred.clone().requires_grad_()
        loss = criterion(leaf, target)
        loss.backward()
        results.append((loss.detach(), leaf.grad, criterion.log_temperature.grad))
    for got, wanted in zip(*results, strict=True):
        assert relative_error(got, wanted) <= 1e-5


@pytest.mark.parametrize("direction", ["pred_to_target", "both"])
@pytest.mark.parametrize("chunk_bytes", [1, None])
def test_logits_far_above_the_range_of_exp(direction, chunk_bytes):
    """exp(1/0.004) overflows float32: only differences to the running maximum may be taken, over blocks and in them."""
    pred, target = (x.to("cuda") for x in make_rows(150, 6, distance=0.2))
    options = {"mse": 0.0, "infonce": 1.0, "temperature": 0.004, "direction": direction}
    leaf = pred.clone().requires_grad_()
    loss, _ = functional.seq_loss(
        leaf, target, backend="triton", weighting="fixed", chunk_bytes=chunk_bytes or 64 << 20, **options
    )
    (grad,) = torch.autograd.grad(loss, leaf)
    wanted_loss, wanted_grad, *_ = grads_of("reference", pred.double(), target.double(), **options)
    # A logit of 250 has an error of 250 units in the last place of 1.
    assert relative_error(loss, wanted_loss) <= 3e-5
    assert relative_error(grad, wanted_grad) <= 3e-4


def test_masked_rows_are_neither_queries_nor_keys():
    pred, target = (x.to("cuda") for x in make_rows(40, 12, distance=0.5))
    mask = torch.arange(40, device="cuda") % 3 != 0
    options = {"mse": 1.0, "infonce": 0.5, "moment": 0.5, "variance": 0.5, "direction": "both", "temperature": 0.3}
    loss, grad, target_grad, stats = grads_of("triton", pred[mask], target[mask], **CHUNKED, **options)
    pred[~mask], target[~mask] = torch.nan, torch.inf
    got = grads_of("triton", pred, target, mask=mask, **CHUNKED, **options)
    assert relative_error(got[0], loss) <= 1e-6
    for x, wanted in ((got[1], grad), (got[2], target_grad)):
        assert relative_error(x[mask], wanted) <= 1e-6
        assert not x[~mask].any()
    assert relative_error(got[3].metrics, stats.metrics) <= 1e-6


def test_without_a_row_that_counts_no_variance_is_missing():
    pred, target = (x.to("cuda") for x in make_rows(9, 7))
    mask = torch.zeros(9, dtype=torch.bool, device="cuda")
    options = {"mse": 0.0, "variance": 1.0, "variance_target": 0.3}
    assert grads_of("triton", pred, target, mask=mask, **options)[0] == 0


def test_a_row_that_is_not_finite_is_a_loss_that_is_not():
    for value in (torch.nan, torch.inf):
        pred, target = (x.to("cuda") for x in make_rows(20, 8))
        pred[3, 2] = value
        loss, stats = functional.seq_loss(pred, target, cosine=1.0, infonce=1.0, backend="triton", **CHUNKED)
        assert loss.isnan()
        assert stats.values.isnan().sum() >= 2


def test_pred_and_target_of_different_dtypes():
    pred, target = (x.to("cuda") for x in make_rows(30, 24, distance=0.5))
    options = {"mse": 1.0, "cosine": 0.5, "infonce": 0.25}
    assert_equals_reference(pred, target.bfloat16().float(), **options)
    for one, other in ((pred, target.bfloat16()), (pred.bfloat16(), target), (pred.half(), target.bfloat16())):
        loss, grad, target_grad, _ = grads_of("triton", one, other, **CHUNKED, **options)
        wanted = grads_of("reference", one.double(), other.double(), **options)
        assert (grad.dtype, target_grad.dtype) == (one.dtype, other.dtype)
        assert relative_error(loss, wanted[0]) <= 3e-6
        for x, y in ((grad, wanted[1]), (target_grad, wanted[2])):
            # Computed in float32, rounded once.
            assert relative_error(x, y) <= (3e-6 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps)


def test_repeats_to_the_bit():
    pred, target = (x.to("cuda") for x in make_rows(300, 10, distance=0.5))
    options = {"infonce": 0.5, "moment": 0.5, "variance": 0.5, "direction": "both"}
    first, second = (grads_of("triton", pred, target, **CHUNKED, **options) for _ in range(2))
    for x, y in zip(first[:3], second[:3], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("weighting", ["gradient", "value"])
def test_balance(weighting):
    """The twin of the reference over calls with a spike, zeros and values that are not finite."""
    from amn_kernels.triton.backend import balance
    from amn_kernels.weighting import BalancedWeighting

    options = LossOptions(mse=1.0, cosine=0.5, infonce=0.3, moment=0.2, weighting=weighting, ema=0.9, update_every=2)
    twins = [BalancedWeighting(options).to("cuda") for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for call in range(60):
        values = torch.rand(4, generator=generator)
        gram = torch.diag(torch.rand(4, generator=generator)).to("cuda")
        if call in (50, 51):  # one of them is an update
            values, gram = values * 1e6, gram * 1e6
        if call in (5, 6, 30, 31):
            values[1], gram[1, 1] = torch.nan, torch.inf
            values[2], gram[2, 2] = 0.0, 0.0
        given = gram if call % 7 else None
        for twin, step in zip(twins, (balance, reference.balance.balance), strict=True):
            twin.weights = step(
                values.to("cuda"), given, twin.mean, twin.updates, twin.calls, twin.skipped,
                *twin.constants.on(gram.device), twin.anchor, twin.decay, twin.update_every, weighting == "value",
                call % 9 != 8,
            )  # fmt: skip
        for name in ("weights", "mean"):
            torch.testing.assert_close(getattr(twins[0], name), getattr(twins[1], name), rtol=1e-6, atol=0)
        for name in ("updates", "calls", "skipped"):
            assert torch.equal(getattr(twins[0], name), getattr(twins[1], name)), name
    assert twins[0].skipped.any()


def test_balanced_weights_of_float64_values_are_not_rounded():
    from amn_kernels.triton.backend import balance
    from amn_kernels.weighting import BalancedWeighting

    options = LossOptions(mse=0.1, cosine=0.3)  # which float32 doesn't have
    values = torch.ones(2, dtype=torch.float64, device="cuda")
    weighting = BalancedWeighting(options).to("cuda")
    weights = balance(values, None, *weighting.arguments(values.device))  # before the first update: λ
    assert weights.tolist() == [0.1, 0.3]


def test_own_key_whose_exp_is_subnormal():
    pred, target = (x.to("cuda") for x in rows_far_below(720, 0.001))
    options = {"mse": 0.0, "infonce": 1.0, "temperature": 0.001, "direction": "both"}
    # Logits up to 1,000.
    assert_equals_reference(pred, target, 8 * 2**-23 / 0.001, **options)


def test_a_training_step_is_that_of_the_reference():
    pred, target = (x.to("cuda") for x in make_rows(24, 16, distance=0.5))
    losses = {}
    for backend in ("triton", "reference"):
        criterion = FusedSeqLoss(
            mse=1.0, infonce=0.5, temperature=0.3, learnable_temperature=True, backend=backend, **CHUNKED
        ).to("cuda")
        leaf = pred.clone().requires_grad_()
        for _ in range(3):
            loss = criterion(leaf, target)
        loss.backward()
        losses[backend] = [loss.detach(), leaf.grad, criterion.log_temperature.grad, criterion.stats.weights]
    for got, wanted in zip(*losses.values(), strict=True):
        assert relative_error(got, wanted) <= 1e-5


def test_double_backward_is_that_of_the_reference():
    pred, target = (x.to("cuda") for x in make_rows(10, 6, distance=0.5))
    direction = make_rows(10, 6, seed=5)[0].to("cuda")

    def second(backend, pred, target, direction):
        pred, target = pred.clone().requires_grad_(), target.clone().requires_grad_()
        chunked = CHUNKED if backend == "triton" else {}
        loss, _ = functional.seq_loss(
            pred, target, cosine=0.5, infonce=0.5, temperature=0.3, weighting="fixed", backend=backend, **chunked
        )
        (grad,) = torch.autograd.grad(loss, pred, create_graph=True)
        return torch.autograd.grad((grad * direction).sum(), (pred, target))

    for got, wanted in zip(
        second("triton", pred, target, direction),
        second("reference", *(x.double() for x in (pred, target, direction))),
        strict=True,
    ):
        assert relative_error(got, wanted) <= 1e-5


def test_what_it_does_not_serve():
    pred, target = (x.to("cuda") for x in make_rows(6, 4))
    with pytest.raises(ValueError, match="'triton' can't serve this call: it computes in float32"):
        functional.seq_loss(pred.double(), target, backend="triton")
    call = backends.Call(pred, target, LossOptions())
    why_unsupported = backends.BACKENDS["triton"].why_unsupported
    assert why_unsupported(call) is None
    assert why_unsupported(call._replace(target=target.double())).startswith("it computes in float32")
    with pytest.raises(ValueError, match=r"'triton' can't serve this call: torch\.func"):
        torch.func.grad(lambda x: functional.seq_loss(x, target, backend="triton")[0])(pred)


def test_offsets_have_64_bits():
    """Arguments of 32 bits whose products don't fit."""
    import triton
    import triton.language as tl

    from amn_kernels.triton.scalars import get, offset_in_group, row_offset

    @triton.jit
    def offsets(out, rows, group_stride, row_stride, scalars_stride):
        r = tl.arange(0, 4)
        i = r.to(tl.int64)
        tl.store(out + i, row_offset(i, 2, group_stride, row_stride))
        address = rows.to(tl.int64, bitcast=True)
        far = rows + (tl.cast(scalars_stride, tl.int64) * 29 + i)
        tl.store(out + 4 + i, far.to(tl.int64, bitcast=True) - address)
        tl.store(out + 8 + i, get(rows, 0, 0, i, i < 4).to(tl.int64))
        tl.store(out + 12 + i, offset_in_group(tl.program_id(0).to(tl.int64) + 3, r, group_stride, row_stride))

    out = torch.empty(16, dtype=torch.int64, device="cuda")
    offsets[(1,)](out, torch.arange(4, dtype=torch.float64, device="cuda"), 2**31 - 8, 2**30, 2**30)
    assert out.tolist() == [
        0,
        2**30,
        2**31 - 8,
        2**31 - 8 + 2**30,
        *(8 * (29 * 2**30 + i) for i in range(4)),
        0,
        1,
        2,
        3,
        *(3 * (2**31 - 8) + r * 2**30 for r in range(4)),
    ]
