"""The CUDA backend from the call to the kernels, in C++, with the shim as device: values, gradients, launches."""

import re

import pytest
import torch
from combinations import Tolerances, check, label, sample
from error_rule import TERMS, assert_error_rule, make_rows, relative_error

from amn_kernels import FusedSeqLoss, ops
from amn_kernels.options import DEFAULT_CHUNK_BYTES
from amn_kernels.reference import eager
from amn_kernels.reference.balance import balance

from .op import cuda_on_cpu

pytestmark = pytest.mark.skipif(ops.why_unavailable() is not None, reason=str(ops.why_unavailable()))

# Softmax weights of 16 bits are rounded to 8 or 11 of them, as on the device.
NARROW = Tolerances(3e-6, 4e-3, 4e-3)


@pytest.fixture(scope="module", autouse=True)
def library():
    with cuda_on_cpu() as library:
        yield library


@pytest.mark.parametrize("case", sample(100)[:40], ids=label)
def test_combination(case):
    check(case, "cuda", tolerances=NARROW if case["dtype"] in (torch.bfloat16, torch.float16) else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (2, 64), (65, 384), (257, 24)], ids=str)
def test_error_rule(shape, dtype):
    terms = TERMS["all"] if shape[0] > 1 else TERMS["mse"]
    assert_error_rule(lambda seed: make_rows(*shape, dtype=dtype, seed=seed), backend="cuda", **terms)


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_float16_weights_stay_in_range(length):
    """Weights are kept relative to the length of the own target: neither short nor long vectors leave 16 bits."""

    def draw(seed):
        return [(length * x).half() for x in make_rows(40, 24, seed=seed)]

    assert_error_rule(draw, backend="cuda", incoming=64.0 * min(length, 1.0), **TERMS["infonce"])


def test_bfloat16_weights_have_the_range_of_float32():
    """A key may be much shorter than the own target: here by more than float16 could say."""

    def draw(seed):
        pred, target = make_rows(4, 24, seed=seed)
        target[1] *= 1e-6
        return pred.bfloat16(), target.bfloat16()

    assert_error_rule(draw, backend="cuda", draws=4, temperature=0.5, **TERMS["infonce"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("of_extra", [torch.float64, torch.float32, torch.float16], ids=str)
def test_extra_negatives_have_a_dtype_of_their_own(dtype, of_extra):
    pred, target = make_rows(9, 24, dtype=dtype)
    extra = make_rows(5, 24, dtype=of_extra, seed=3)[0].requires_grad_()

    def gradient(backend, pred, target, negatives):
        criterion = FusedSeqLoss(mse=0.0, infonce=1.0, weighting="fixed", backend=backend)
        return torch.autograd.grad(criterion(pred, target, extra_negatives=negatives), extra)[0]

    found = gradient("cuda", pred, target, extra)
    assert found.dtype is of_extra
    wanted = gradient("reference", pred.double(), target.double(), extra.double())
    assert relative_error(found, wanted) <= 1e-5 + torch.finfo(found.dtype).eps


@pytest.mark.parametrize("negatives", ["all", "sequence"])
def test_blocks_of_keys_of_16_bits_add_up(negatives):
    """The second block is added to the first in float32, by a product that every supported torch has."""

    def gradient(backend, *rows):
        pred, target, extra = (x.view(2, -1, 24) if i < 2 else x for i, x in enumerate(rows))
        leaf = pred.requires_grad_()
        criterion = FusedSeqLoss(mse=0.0, infonce=1.0, negatives=negatives, weighting="fixed", backend=backend)
        return torch.autograd.grad(criterion(leaf, target, extra_negatives=extra), leaf)[0]

    rows = *make_rows(18, 24, dtype=torch.bfloat16), make_rows(5, 24, dtype=torch.bfloat16, seed=3)[0]
    wanted = gradient("reference", *(x.double() for x in rows))
    # Rounding of the weights and of the gradient to 8 bits.
    assert relative_error(gradient("cuda", *rows), wanted) <= 2**-8


def test_a_learned_temperature_of_16_bits_is_refused():
    """The kernels read float32 or float64; the module gives them no other."""
    pred, target = make_rows(9, 24)
    choices = ops.choices_of(FusedSeqLoss(infonce=1.0).options)
    inputs = (pred, target, torch.ones(2), None, None, None, torch.tensor(0.07, dtype=torch.float16))
    with pytest.raises(RuntimeError, match="learned_temperature must be float32 or float64, got Half"):
        torch.ops.amn_kernels.seq_loss_fixed(*inputs, *choices, 1 << 20)


def test_balanced_weights_come_with_the_step():
    """Weights and state as the plain definition has them; the loss is the weighted sum, its gradient that of it."""
    criterion = FusedSeqLoss(mse=1.0, cosine=0.5, infonce=0.5, backend="cuda")
    plain = FusedSeqLoss(mse=1.0, cosine=0.5, infonce=0.5).weighting
    for step in range(3):
        pred, target = make_rows(40, 24, seed=step)
        leaf = pred.clone().requires_grad_()
        loss = criterion(leaf, target)
        loss.backward()
        stats = criterion.stats
        weights = balance(stats.values, stats.gram, *plain.arguments(pred.device))
        torch.testing.assert_close(stats.weights, weights, rtol=1e-6, atol=0)
        torch.testing.assert_close(criterion.weighting.mean, plain.mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(loss, stats.weights @ stats.values, rtol=1e-6, atol=0)
        fixed = dict(zip(stats.terms, stats.weights.tolist(), strict=True))
        expected = pred.clone().requires_grad_()
        FusedSeqLoss(**fixed, weighting="fixed", backend="reference")(expected, target).backward()
        assert relative_error(leaf.grad, expected.grad) <= 1e-5
    assert criterion.weighting.updates.tolist() == [3, 3, 3]


# aten ops that start no kernel on a device: memory, views, and the rest of what a host does.
_FREE = re.compile(
    r"aten::(empty|empty_like|empty_strided|view|_unsafe_view|reshape|as_strided|select|narrow|slice|t|transpose|mT|"
    r"flatten|unsqueeze|squeeze|expand|detach|alias|to|contiguous|item|resolve_conj|resolve_neg|result_type|"
    r"resize_|set_|is_.*|lift_fresh)$"
)
# Autograd's own: the root of the backward, as with any loss.
_ROOT = {"aten::ones_like", "aten::fill_"}


def _launches(library, step):
    """Kernels of ours, and aten ops on the outermost level that a device would launch kernels for."""
    step()
    before = library.simt_launches()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    ours = library.simt_launches() - before
    names = []
    for event in profile.events():
        if event.name.startswith("aten::") and not _FREE.match(event.name):
            above = event.cpu_parent
            while above is not None and (not above.name.startswith("aten::") or _FREE.match(above.name)):
                above = above.cpu_parent
            if above is None:
                names.append(event.name)
    return ours, names


def _step(criterion, pred, target):
    leaf = pred.requires_grad_()
    leaf.grad = None
    criterion(leaf, target).backward()


def test_the_count_counts(library):
    """Eager PyTorch, fixed weights: what the fused step is compared with."""
    pred, target = make_rows(32, 16)

    def step():
        leaf = pred.clone().requires_grad_()
        eager.seq_loss(leaf, target, mse=1.0, cosine=0.5, infonce=0.5).backward()

    ours, others = _launches(library, step)
    assert ours == 0
    assert 40 <= len(others) <= 80


@pytest.mark.parametrize("weighting", ["gradient", "fixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [32, 257, 1024])
def test_launches_of_a_training_step(library, rows, dtype, weighting):
    """row_stats, product, softmax, product, row_dots, sums, balance, row_combine: 8, without balance 7."""
    pred, target = make_rows(rows, 16, dtype=dtype)
    # The tensors are on the CPU; scratch memory is what a GPU has for them.
    scratch = DEFAULT_CHUNK_BYTES["cuda"]["pred_to_target"]
    criterion = FusedSeqLoss(mse=1.0, cosine=0.5, infonce=0.5, weighting=weighting, backend="cuda", chunk_bytes=scratch)
    ours, others = _launches(library, lambda: _step(criterion, pred, target))
    products = [name for name in others if re.fullmatch(r"aten::(mm|addmm)", name)]
    assert ours == (6 if weighting == "gradient" else 5)
    assert len(products) == 2
    assert ours + len(products) <= 8
    assert set(others) - set(products) <= _ROOT
    assert others.count("aten::ones_like") <= 1
