"""The compiled op against the float64 truth, over terms, dtypes, shapes and layouts."""

import itertools
from pathlib import Path

import pytest
import torch
from error_rule import TERMS, assert_error_rule, eager_loss, make_rows, relative_error, seq_loss, truth
from hypothesis import given
from hypothesis import strategies as st

from amn_kernels import FusedSeqLoss, functional

HALF = (torch.float16, torch.bfloat16)

# Rows: 1 has no negatives, 2 one; 31, 63, 65 lie around the 16 and 8 lanes of a vector; 257 and 1000 end in the middle
# of a vector; 4097 is one row and one key over several chunks of rows and blocks of keys.
ROWS = (1, 2, 31, 63, 65, 257, 1000, 4097)
# Dimensions: 1, 3, 7 are shorter than a vector; 64 is whole vectors; 384, 768, 1536 are those of embedding models;
# 1000 ends in the middle of a vector, and 1536 is over the 1024 elements that are summed before moving to double.
DIMS = (1, 3, 7, 64, 384, 768, 1000, 1536)
# Each of both at least once, small with large.
PAIRS = {(1, 384), (2, 7), (31, 1000), (63, 3), (65, 768), (257, 1), (257, 64), (63, 1536), (1000, 7), (4097, 64)}
GRID = [
    pytest.param(n, dim, marks=() if (n, dim) in PAIRS else pytest.mark.full)
    for n, dim in itertools.product(ROWS, DIMS)
]


def draws_for(n):
    """With few rows an error is a matter of luck: the root mean square of so many draws is not."""
    return max(1, 256 // n)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize(("n", "dim"), GRID)
def test_error_rule_over_shapes(n, dim, term):
    if term == "infonce" and n == 1:
        pytest.skip("its truth is 0: test_one_row")
    if term != "mse" and dim == 1:
        pytest.skip("the true gradient of cosine and infonce is 0: test_one_dimension")
    assert_error_rule(lambda seed: make_rows(n, dim, seed=seed), draws=draws_for(n), **TERMS[term])


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize(("n", "dim"), [(257, 64), (65, 7), (1100, 384)])  # whole vectors, tails, more than a chunk
@pytest.mark.parametrize(
    ("pred_dtype", "target_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),  # what a model under autocast returns, and its stored targets
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
)
def test_error_rule_over_dtypes(n, dim, term, pred_dtype, target_dtype):
    def draw(seed):
        pred, target = make_rows(n, dim, dtype=torch.float64, seed=seed)
        return pred.to(pred_dtype), target.to(target_dtype)

    # Gradients are O(1/N): scaled to O(1), or float16 results would be subnormal on both sides.
    incoming = 2.0 ** (n - 1).bit_length()
    assert_error_rule(draw, incoming=incoming, **TERMS[term])


# A new model predicts short vectors, one without a final normalisation long ones: neither may cost digits in p - t.
@pytest.mark.parametrize("factor", [1e-4, 0.01, 0.1, 10.0, 100.0, 1e4])
@pytest.mark.parametrize("term", TERMS)
def test_error_rule_over_lengths(term, factor):
    def draw(seed):
        pred, target = make_rows(257, 64, seed=seed)
        return factor * pred, target

    assert_error_rule(draw, draws=2, **TERMS[term])


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_rounded_once(dtype, term):
    pred, target = make_rows(257, 100, dtype=dtype)
    true = truth(pred, target, 512.0, **TERMS[term])
    ours = seq_loss(pred, target, 512.0, backend="cpu", **TERMS[term])
    # Half a unit for the one rounding to the dtype of pred, and 2 % for everything before it, which is float32.
    assert relative_error(ours.grad, true.grad) <= 0.51 * torch.finfo(dtype).eps
    assert ours.loss.dtype == torch.float32
    # 1e-6: float32 logits of 1/0.07 are rounded by 1e-6; the other terms do better.
    assert ours.loss.item() == pytest.approx(true.loss.item(), rel=1e-6)


def test_one_row():
    pred, target = make_rows(1, 384)
    ours = seq_loss(pred, target, backend="cpu", **TERMS["infonce"])
    assert ours.loss == 0
    assert ours.grad.count_nonzero() == 0


@pytest.mark.parametrize("term", ["cosine", "infonce"])
def test_one_dimension(term):
    """Only the sign counts: the loss follows by hand, and the true gradient is 0."""
    pred, target = make_rows(257, 1)
    ours = seq_loss(pred, target, backend="cpu", **TERMS[term])
    # 4 units of rounding of numbers of the size 1/(N |p|) that cancel, times 1/temperature for infonce.
    scale = (1 / pred.norm(dim=1)).norm() / 257 / (0.07 if term == "infonce" else 1)
    assert ours.grad.norm() <= 4 * torch.finfo(torch.float32).eps * scale
    same = (pred * target > 0).double()
    assert ours.stats.cosine_similarity.item() == pytest.approx((2 * same - 1).mean().item(), abs=1e-6)
    if term == "cosine":
        assert ours.loss.item() == pytest.approx((2 - 2 * same).mean().item(), rel=1e-6)
    else:
        assert ours.loss.item() == pytest.approx(truth(pred, target, **TERMS[term]).loss.item(), rel=1e-6)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second column": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "every second row": lambda x: x.repeat_interleave(2, dim=-2)[..., ::2, :],
    "columns of a wider matrix": lambda x: torch.cat([x, x, x], dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "steps first": lambda x: x.view(5, -1, x.shape[-1]).transpose(0, 1).contiguous().transpose(0, 1),
    "expanded over the batch": lambda x: x[:240].expand(5, 240, x.shape[-1]),
    "one number a row": lambda x: x[:, :1].expand_as(x),
    "one row": lambda x: x[:1].expand_as(x),
    "sliding windows": lambda x: x.flatten().unfold(0, x.shape[-1], 1)[: len(x)],
}


@pytest.mark.parametrize("of", ["pred", "target", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, of):
    pred, target = make_rows(1200, 20)  # more than one chunk of rows
    strided = LAYOUTS[layout]
    pred = strided(pred) if of != "target" else pred[: strided(pred).shape[:-1].numel()].view(strided(pred).shape)
    target = strided(target) if of != "pred" else target[: pred.shape[:-1].numel()].view(pred.shape)
    wanted = seq_loss(pred.contiguous(), target.contiguous(), backend="cpu", **TERMS["all"])
    got = seq_loss(pred, target, backend="cpu", **TERMS["all"])
    # The numbers are the same, only a matrix product may order its sums by layout: a few float32 roundings.
    assert relative_error(got.loss, wanted.loss) <= 1e-6
    assert relative_error(got.grad, wanted.grad) <= 1e-6
    assert relative_error(got.loss, truth(pred, target, **TERMS["all"]).loss) <= 1e-6


@pytest.mark.parametrize("term", TERMS)
def test_three_dimensions_are_rows_side_by_side(term):
    pred, target = make_rows(6, 200, 20)
    got = seq_loss(pred, target, backend="cpu", **TERMS[term])
    flat = seq_loss(pred.view(1200, 20), target.view(1200, 20), backend="cpu", **TERMS[term])
    assert torch.equal(got.loss, flat.loss)
    assert torch.equal(got.grad, flat.grad.view(6, 200, 20))


@pytest.mark.parametrize("distance", [0.05, 0.001])
@pytest.mark.parametrize("term", ["cosine", "infonce"])
@pytest.mark.parametrize(("n", "dim"), [(257, 64), (1000, 384)])  # more and less crowded keys
def test_near_convergence(n, dim, term, distance):
    pred, target = make_rows(n, dim, distance=distance)
    true = truth(pred, target, **TERMS[term])
    ours = seq_loss(pred, target, backend="cpu", **TERMS[term])
    ours_error = relative_error(ours.grad, true.grad)
    theirs_error = relative_error(eager_loss(pred, target, **TERMS[term]).grad, true.grad)
    # The loss is summed from small numbers that do not cancel: rounding of the result, and of logits up to 1/0.07.
    assert relative_error(ours.loss, true.loss) <= (2e-6 if term == "infonce" else 2e-7)
    if term == "cosine" or distance == 0.05:
        # What cancels in eager code: p/|p| - c t/|t| of the cosine, and 1 - softmax along t of infonce.
        assert ours_error <= theirs_error / 5
    else:
        # At 0.001 that lies along p, where the normalisation removes it: both have the error of float32 logits left.
        assert ours_error <= theirs_error + 1e-6
    assert ours_error <= 2e-6  # docs/mathematics.md


@pytest.mark.parametrize(("factor", "error"), [(1e2, 1e-6), (1e4, 1e-4), (1e6, 2e-2)])
def test_angles_where_targets_are_much_shorter(factor, error):
    """Ten times the errors that the docstring of `gradient_cosine` tells."""
    pred, target = make_rows(257, 64)
    ours = seq_loss(factor * pred, target, backend="cpu", **TERMS["all"])
    true = truth(factor * pred, target, **TERMS["all"])
    pair = ("cosine", "infonce")
    assert abs(ours.stats.gradient_cosine[pair] - true.stats.gradient_cosine[pair]) <= error
    # Norms and gradients are not concerned.
    for term in ("mse", "cosine", "infonce"):
        assert ours.stats.grad_norm[term].item() == pytest.approx(true.stats.grad_norm[term].item(), rel=1e-5)
    assert relative_error(ours.grad, true.grad) <= 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("distance", [None, 0.05, 0.001])
@pytest.mark.parametrize(("n", "dim"), [(65, 7), (1100, 64)])  # tails of vectors; more than one chunk
def test_gram_matrix(n, dim, distance, dtype, tolerance):
    pred, target = make_rows(n, dim, dtype=dtype, distance=distance)
    gradients = [truth(pred, target, **TERMS[term]).grad.flatten() for term in ("mse", "cosine", "infonce")]
    wanted = torch.stack(gradients) @ torch.stack(gradients).T
    stats = seq_loss(pred, target, backend="cpu", **TERMS["all"]).stats
    # Rounding of sums over rows and dimensions, and, in infonce, of logits up to 1/0.07.
    torch.testing.assert_close(stats.gram.double(), wanted, rtol=tolerance, atol=0)
    norms = torch.stack(list(stats.grad_norm.values())).double()
    torch.testing.assert_close(norms, wanted.diagonal().sqrt(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_gram_matrix_over_lengths(factor):
    pred, target = make_rows(257, 64)
    pred *= factor
    gradients = torch.stack(
        [truth(pred, target, **TERMS[term]).grad.flatten() for term in ("mse", "cosine", "infonce")]
    )
    got = seq_loss(pred, target, backend="cpu", **TERMS["all"]).stats.gram.double()
    # In <mse, infonce>, a difference of the two lengths, a factor of 100 may cost two of seven digits.
    torch.testing.assert_close(got, gradients @ gradients.T, rtol=1e-5, atol=0)


def test_gram_matrix_of_some_terms():
    pred, target = make_rows(65, 7, dtype=torch.float64)
    full = seq_loss(pred, target, backend="cpu", **TERMS["all"]).stats.gram
    for names in [("mse", "infonce"), ("cosine", "infonce"), ("infonce",), ("mse", "cosine")]:
        options = {"mse": 0.0} | dict.fromkeys(names, 1.0)
        at = [("mse", "cosine", "infonce").index(name) for name in names]
        assert torch.equal(seq_loss(pred, target, backend="cpu", **options).stats.gram, full[at][:, at])


@pytest.mark.parametrize("monitored", ["mse", "cosine", "infonce"])
def test_monitored_terms_have_no_gradient_norm(monitored):
    pred, target = make_rows(65, 7)
    options = {**TERMS["all"], monitored: 0.0}
    plain = seq_loss(pred, target, backend="cpu", **options)
    got = seq_loss(pred, target, backend="cpu", **options, monitor=(monitored,))
    alone = seq_loss(pred, target, backend="cpu", **TERMS[monitored])
    assert torch.equal(got.grad, plain.grad)
    assert torch.equal(got.loss, plain.loss)
    assert torch.equal(got.stats.value[monitored], alone.loss)
    assert got.stats.weight[monitored] == 0
    assert got.stats.grad_norm == plain.stats.grad_norm
    assert monitored not in got.stats.grad_norm


@pytest.mark.parametrize("distance", [None, 0.3])  # hardly any row retrieved; most
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_metrics(dtype, tolerance, distance):
    pred, target = make_rows(1100, 7, dtype=dtype, distance=distance)
    pred[5], target[9] = 0, 0
    got = seq_loss(pred, target, backend="cpu", **TERMS["all"]).stats
    wanted = truth(pred, target, **TERMS["all"]).stats
    for name in ("cosine_similarity", "top1", "chance", "pred_norm", "target_norm"):
        # Means of numbers of the order of 1, some of either sign, rounded a few times.
        wanted_metric = getattr(wanted, name).item()
        assert getattr(got, name).item() == pytest.approx(wanted_metric, rel=tolerance, abs=tolerance), name
    assert 0 < got.top1 < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # keys read in place; keys widened block by block
# 1 and 64 KiB: the smallest blocks of keys; 1 MiB: some blocks; the default: one block.
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 16, 1 << 20])
def test_chunk_bytes_change_nothing(chunk_bytes, dtype):
    pred, target = make_rows(1100, 48, dtype=dtype)
    options = {"mse": 0.0, "infonce": 1.0, "backend": "cpu"}
    got = seq_loss(pred, target, 1024.0, chunk_bytes=chunk_bytes, **options)
    wanted = seq_loss(pred, target, 1024.0, **options)
    # Blocks merge in float64; only sums are ordered differently: float32 rounding, of the result for bfloat16.
    assert relative_error(got.loss, wanted.loss) <= 1e-6
    assert relative_error(got.grad, wanted.grad) <= (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert torch.equal(got.stats.top1, wanted.stats.top1)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20, None])
def test_ever_larger_similarities(chunk_bytes):
    """Keys in ascending similarity: every block raises the maximum, and what was summed before must be rescaled."""
    pred, target = make_rows(1100, 16)
    pred = pred[:1] + 0.1 * pred
    order = (pred[:1] @ target.T).squeeze().argsort()
    pred, target = pred[order], target[order]
    true = truth(pred, target, **TERMS["infonce"])
    ours = seq_loss(pred, target, backend="cpu", chunk_bytes=chunk_bytes, **TERMS["infonce"])
    # Float32 logits up to 1/0.07 are rounded by 1e-6, which is the relative error of a softmax weight.
    assert relative_error(ours.loss, true.loss) <= 1e-6
    assert relative_error(ours.grad, true.grad) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeatable_bit_by_bit(dtype):
    pred, target = make_rows(1100, 100, dtype=dtype)
    runs = [seq_loss(pred, target, backend="cpu", **TERMS["all"]) for _ in range(3)]
    for other in runs[1:]:
        assert torch.equal(runs[0].loss, other.loss)
        assert torch.equal(runs[0].grad, other.grad)
        assert torch.equal(runs[0].stats.gram, other.stats.gram)


def count_products(pred, target, **options):
    """Matrix products of one forward call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        functional.seq_loss(pred, target, backend="cpu", **options)
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm"))


def test_no_gradient_work_without_gradients():
    pred, target = make_rows(1100, 64)
    leaf = pred.clone().requires_grad_()
    options = {**TERMS["all"], "chunk_bytes": 1 << 20}
    with_gradient = count_products(leaf, target, **options)
    assert with_gradient > 2  # several blocks
    assert count_products(pred, target, **options) == with_gradient // 2
    with torch.no_grad():
        assert count_products(leaf, target, **options) == with_gradient // 2
        loss, stats = functional.seq_loss(leaf, target, backend="cpu", **options)
    assert stats.grad_norm == {}
    assert not loss.requires_grad
    # The value does not depend on it.
    assert torch.equal(loss, seq_loss(pred, target, backend="cpu", **options).loss)


def test_no_similarities_for_terms_that_need_none():
    pred, target = make_rows(100, 8)
    assert count_products(pred.requires_grad_(), target, mse=1.0, cosine=1.0) == 0


def test_monitored_infonce_costs_one_product_a_block():
    pred, target = make_rows(100, 8)
    assert count_products(pred.requires_grad_(), target, mse=1.0, monitor=("infonce",)) == 1


MEMORY = """
import ctypes, pathlib, sys, torch
from amn_kernels import functional
def resident(field):
    return int(pathlib.Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024
def step(n):
    pred = torch.randn(n, 64, requires_grad=True)
    functional.seq_loss(pred, torch.randn(n, 64), cosine=1.0, infonce=1.0, backend=sys.argv[1])[0].backward()
step(256)  # loads libraries, starts threads
ctypes.CDLL(None).malloc_trim(0)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
step(4096)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_no_matrix_of_all_pairs_in_memory(run_python):
    peaks = {}
    for backend in ("cpu", "reference"):
        process = run_python(MEMORY, backend)
        assert process.returncode == 0, process.stderr
        peaks[backend] = int(process.stdout)
    matrix = 4096 * 4096 * 4
    # Used are the scratch for a block of similarities and a dozen arrays of 1 MiB; the rest up to 60 % is left to the
    # allocator and the buffers of the matrix product.
    assert peaks["cpu"] < 0.6 * matrix
    assert peaks["reference"] > 2 * matrix  # the measurement measures


ISA = """
from amn_kernels import ops
from error_rule import TERMS, assert_error_rule, make_rows
import torch
isa = ops.cpu_isa()
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for n, dim in ((65, 7), (1100, 40)):  # tails of vectors; more than one chunk
        for terms in TERMS.values():
            assert_error_rule(lambda seed: make_rows(n, dim, dtype=dtype, seed=seed), draws=4, **terms)
print(isa)
"""


def test_every_instruction_set(run_on_isa):
    run_on_isa(ISA)


def test_unknown_instruction_set(run_python):
    process = run_python("from amn_kernels import ops; ops.cpu_isa()", AMN_CPU_ISA="sse9")
    assert process.returncode != 0
    assert "AMN_CPU_ISA must be baseline, avx2 or avx512, got sse9" in process.stderr


@given(st.integers(2, 80), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([1, None]))
def test_permuting_rows_permutes_gradients(n, dim, seed, chunk_bytes):
    pred, target = make_rows(n, dim, dtype=torch.float64, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    options = {**TERMS["all"], "backend": "cpu", "chunk_bytes": chunk_bytes}
    wanted = seq_loss(pred, target, **options)
    got = seq_loss(pred[order], target[order], **options)
    # Sums in another order, in float64.
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.grad, wanted.grad[order], rtol=0, atol=1e-12 * wanted.grad.abs().max().item())


@given(st.integers(2, 80), st.integers(2, 40), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_the_length_of_pred_is_nothing_to_cosine_and_infonce(n, dim, seed, factor):
    pred, target = make_rows(n, dim, dtype=torch.float64, seed=seed)
    options = {"mse": 0.0, "cosine": 0.5, "infonce": 0.5, "backend": "cpu"}
    wanted, got = seq_loss(pred, target, **options), seq_loss(factor * pred, target, **options)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-12, atol=0)  # float64 rounding
    # So the gradient falls with the length, and has no part along pred: to 1e-12 of the sizes that cancel in it.
    lengths = pred.norm(dim=1, keepdim=True)
    assert ((got.grad * factor - wanted.grad) * lengths).abs().max() <= 1e-12 / (0.07 * n)
    assert (wanted.grad * pred).sum(dim=1).abs().max() <= 1e-12 / (0.07 * n)


def test_fused_module_and_function_agree():
    pred, target = make_rows(65, 7)
    criterion = FusedSeqLoss(backend="cpu", weighting="fixed", **TERMS["all"])
    leaf = pred.clone().requires_grad_()
    criterion(leaf, target).backward()
    function = seq_loss(pred, target, backend="cpu", **TERMS["all"])
    assert torch.equal(leaf.grad, function.grad)
    assert criterion.stats.as_dict() == function.stats.as_dict()
