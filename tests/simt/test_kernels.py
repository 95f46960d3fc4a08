"""The CUDA kernels against the float64 definition: combinations of options, odd shapes, and what the algorithm in
Python does not use of them."""

import pytest
import torch
from combinations import label, sample
from error_rule import TERMS, assert_error_rule, make_rows, relative_error, rows_far_below, seq_loss, truth

from amn_kernels.primitives import InfonceForm, Row, Temperature, TermList
from amn_kernels.reference.balance import balance

from .backend import check_simt, simt_backend
from .primitives import SimtPrimitives
from .trace import Library

COUNT = 100
"""All pairs of choices of two options occur in them."""

SHAPES = (
    (1, 1),  # nothing to compare with
    (2, 3),
    (31, 7),  # less than a warp of rows, less than a pack
    (63, 64),
    (65, 384),
    (257, 8),  # more rows than a block has teams
    (9, 1000),  # teams of several warps, some of whose threads have nothing
    (3, 4104),  # longer than what a team holds in registers
    (3, 4101),  # the same, of parts of packs
)


@pytest.fixture(scope="module")
def library():
    return Library()


@pytest.fixture(autouse=True)
def _backend(library):
    with simt_backend(library):
        yield


@pytest.mark.parametrize("case", sample(COUNT), ids=label)
def test_combination(case):
    check_simt(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, dtype):
    assert_error_rule(lambda seed: make_rows(*shape, dtype=dtype, seed=seed), backend="simt", **TERMS["all"])


def test_nearly_converged_rows():
    """Where d = p - t is all that is left: 0.1% of the norm."""
    assert_error_rule(lambda seed: make_rows(65, 100, distance=1e-3, seed=seed), backend="simt", **TERMS["all"])


def test_dtypes_of_pred_and_target_may_differ():
    """As under autocast: each is read as it is."""

    def draw(seed):
        pred, target = make_rows(33, 40, seed=seed)
        return pred.bfloat16(), target

    assert_error_rule(draw, backend="simt", **TERMS["all"])


def test_without_a_row_that_counts_no_variance_is_missing():
    pred, target = make_rows(9, 7)
    mask = torch.zeros(9, dtype=torch.bool)
    assert seq_loss(pred, target, mask=mask, mse=0.0, variance=1.0, variance_target=0.3, backend="simt").loss == 0


@pytest.mark.parametrize("real", [torch.float32, torch.float64], ids=str)
def test_incoming_gradient_of_loss_and_values(library, real):
    """grad_loss weights + grad_values, in row_combine and in temperature_grad."""
    primitives = SimtPrimitives(library)
    pred, target = make_rows(7, 12, dtype=real)
    terms, tau = TermList(("mse", "infonce"), (True, True)), Temperature(0.3, torch.tensor(0.3, dtype=real))
    rows, attention = torch.rand(len(Row), 7, dtype=torch.float64), torch.rand(7, 12, dtype=real)
    weights, grad_values = torch.tensor([0.7, 0.2], dtype=real), torch.tensor([0.5, -0.1], dtype=real)
    grad_loss, columns = torch.tensor(3.0, dtype=real), torch.empty(0, 12, dtype=real)

    def combined(grad_values, **incoming):
        grad = torch.full_like(pred, torch.nan)
        primitives.row_combine(grad_values, pred, target, attention, columns, rows, terms, tau, grad, **incoming)
        of_temperature = torch.full((), torch.nan, dtype=real)
        primitives.temperature_grad(grad_values, rows, terms, tau, of_temperature, **incoming)
        return grad, of_temperature

    wanted, of_temperature = combined(3 * weights + grad_values)
    for got, true in zip(
        combined(grad_values, grad_loss=grad_loss, weights=weights), (wanted, of_temperature), strict=True
    ):
        assert relative_error(got, true) <= 8 * torch.finfo(real).eps
    true = -(rows[Row.WEIGHT] * rows[Row.INV_PRED] * rows[Row.PRED_ATT]).sum() / 0.3**2 * 0.5
    assert relative_error(of_temperature, true) <= 8 * torch.finfo(real).eps
    alone, _ = combined(None, grad_loss=grad_loss, weights=weights)
    assert relative_error(alone, combined(3 * weights)[0]) <= 8 * torch.finfo(real).eps


def test_row_stats_sets_the_weight_of_all_rows(library):
    pred, target = make_rows(5, 9)
    rows, scale = torch.full((len(Row), 5), torch.nan, dtype=torch.float64), torch.empty(5)
    SimtPrimitives(library).row_stats(pred, target, rows, scale, InfonceForm(False, False), weight=0.2)
    assert rows[Row.WEIGHT].tolist() == [0.2] * 5
    assert relative_error(rows[Row.DIFF_DIFF], (pred - target).double().square().sum(1)) <= 1e-6


@pytest.mark.parametrize("count", [5, 9000], ids=["one block", "several blocks"])
def test_loss_of_term_sums(library, count):
    """loss = weights.values, and the same sums from one block and from several."""
    primitives, terms = SimtPrimitives(library), TermList(("mse", "cosine"), (True, True))
    rows = torch.rand(len(Row), count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[Row.WEIGHT] = 1 / count
    values, weights, loss = torch.empty(2), torch.tensor([0.7, 0.2]), torch.full((), torch.nan)
    primitives.term_sums(
        rows, torch.empty(0), terms, InfonceForm(False, False), 4, Temperature(0.1, None), values, torch.empty(0, 0),
        torch.empty(5), weights=weights, loss=loss,
    )  # fmt: skip
    assert relative_error(values[0], rows[Row.DIFF_DIFF].mean() / 4) <= 1e-6
    assert relative_error(loss, values @ weights) <= 1e-6


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_balance(library, by_value, dtype):
    """Weights and state of 25 calls, among them spikes, a NaN, a zero and calls without update or Gram matrix."""
    primitives, generator = SimtPrimitives(library), torch.Generator().manual_seed(0)
    kinds = {"mean": torch.float32, "updates": torch.int64, "skipped": torch.int64}
    states = [
        {
            **{name: torch.zeros(3, dtype=kind) for name, kind in kinds.items()},
            "calls": torch.zeros((), dtype=torch.int64),
        }
        for _ in range(2)
    ]
    fixed = {"lambdas": torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64), "most": torch.tensor([1e6, 1e6, 1.0])}
    for call in range(25):
        observed = torch.rand(3, dtype=dtype, generator=generator) * torch.tensor([1e-3, 10.0, 1.0])
        observed = {7: observed * 1e4, 9: observed * torch.nan, 11: observed * 0}.get(call, observed).to(dtype)
        values, gram = (observed, None) if by_value else (torch.rand(3, dtype=dtype), torch.diag(observed))
        gram = None if call == 13 else gram
        options = (1, 0.9, 2, by_value, call != 15)
        wanted = balance(values, gram, **states[0], **fixed, **dict(zip(
            ("anchor", "decay", "update_every", "by_value", "update"), options, strict=True
        )))  # fmt: skip
        weights, loss = torch.full_like(values, torch.nan), torch.full((), torch.nan, dtype=dtype)
        primitives.balance(values, gram, {**states[1], **fixed}, options, weights, loss)
        torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=0)
        torch.testing.assert_close(loss, torch.dot(weights, values), rtol=1e-5, atol=0, equal_nan=True)
        for name in states[0]:
            torch.testing.assert_close(states[1][name], states[0][name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("depth", [690, 720, 760])  # exp is subnormal from 708.4 and 0 from 745.1 on
def test_own_key_whose_exp_is_subnormal(depth):
    pred, target = rows_far_below(depth, 0.001)
    options = {"mse": 0.0, "infonce": 1.0, "temperature": 0.001}
    true = truth(pred, target, **options)
    ours = seq_loss(pred, target, backend="simt", **options)
    rounding = 8 * torch.finfo(torch.float32).eps / 0.001  # of logits up to 1,000
    assert ours.loss.item() == pytest.approx(true.loss.item(), rel=rounding)
    assert relative_error(ours.grad, true.grad) <= rounding
