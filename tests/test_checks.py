"""Bad input raises before any work, naming the argument and what was got."""

import math

import pytest
import torch

from amn_kernels import FusedSeqLoss, functional
from amn_kernels.checks import FLOAT_DTYPES
from amn_kernels.options import LossOptions

ROWS = torch.ones(4, 3)
GRID = torch.ones(2, 2, 3)
KEEP = torch.ones(4, dtype=torch.bool)


def with_bad(value, *rows):
    x = ROWS.clone()
    x[list(rows), 1] = value
    return x


# (keyword options, tensors, type, what the message must hold: the argument first, then what was got)
BAD_OPTIONS = [
    *(
        ({term: bad}, ValueError, (term, str(bad)))
        for term in ("mse", "cosine", "infonce", "moment", "variance")
        for bad in (-1.0, math.inf, math.nan)
    ),
    ({"cosine": "1"}, ValueError, ("cosine", "'1'")),
    ({"cosine": True}, ValueError, ("cosine", "True")),
    ({"mse": 0.0}, ValueError, ("all weights are 0",)),
    ({"mse": 0.0, "monitor": ("cosine",)}, ValueError, ("all weights are 0",)),
    *(({"temperature": bad}, ValueError, ("temperature", str(bad))) for bad in (0, -0.07, math.nan, math.inf)),
    ({"temperature": "warm"}, ValueError, ("temperature", "'warm'")),
    *(({"ema": bad}, ValueError, ("ema", str(bad))) for bad in (1, -0.1, math.nan)),
    ({"direction": "target_to_pred"}, ValueError, ("direction", "pred_to_target, both", "'target_to_pred'")),
    ({"negatives": "none"}, ValueError, ("negatives", "all, step, sequence", "'none'")),
    ({"positives": "all"}, ValueError, ("positives", "diagonal, ids", "'all'")),
    ({"weighting": "uniform"}, ValueError, ("weighting", "'uniform'")),
    ({"positives": "ids"}, ValueError, ("positives='ids'", "infonce")),
    ({"false_negative_margin": 0.1}, ValueError, ("false_negative_margin", "infonce")),
    ({"gather_negatives": True}, ValueError, ("gather_negatives", "infonce")),
    ({"learnable_temperature": True}, ValueError, ("learnable_temperature", "infonce")),
    *(
        ({"infonce": 1.0, "false_negative_margin": bad}, ValueError, ("false_negative_margin", str(bad)))
        for bad in (0.0, -0.1, math.nan, math.inf, "close")
    ),
    ({"infonce": 1.0, "gather_negatives": "yes"}, ValueError, ("gather_negatives", "'yes'")),
    (
        {"infonce": 1.0, "gather_negatives": True, "negatives": "step"},
        ValueError,
        ("gather_negatives", "negatives='all'", "'step'"),
    ),
    ({"process_group": 0}, ValueError, ("process_group", "torch.distributed", "0")),
    ({"anchor": "cosine"}, ValueError, ("anchor", "mse", "'cosine'")),  # not on
    ({"anchor": "l2"}, ValueError, ("anchor", "'l2'")),
    ({"monitor": ("l2",)}, ValueError, ("monitor", "'l2'")),
    ({"monitor": ("mse",)}, ValueError, ("monitor", "'mse'", "1.0")),  # has a weight
    ({"monitor": "cosine"}, ValueError, ("monitor", "tuple", "'cosine'")),
    ({"backend": "cuda11"}, ValueError, ("backend", "cpu", "'cuda11'")),
    *(({"chunk_bytes": bad}, ValueError, ("chunk_bytes", str(bad))) for bad in (0, -1, 1.5, True)),
    *(({"update_every": bad}, ValueError, ("update_every", str(bad))) for bad in (0, None, 1.0, 1 << 70)),
    ({"chunk_bytes": 1 << 70}, ValueError, ("chunk_bytes", str(1 << 70))),  # no 64-bit number
    *(({term: 10**400}, ValueError, (term, "finite", "1000")) for term in ("mse", "temperature", "variance_target")),
    ({"mse": -(10**5000)}, ValueError, ("mse", "finite", "16610 bits")),  # more digits than Python prints
    *(({name: 1}, ValueError, (name, "True or False", "1")) for name in ("learnable_temperature", "check_finite")),
    ({"variance_target": math.inf}, ValueError, ("variance_target", "inf")),
    *(({"monitor": bad}, ValueError, ("monitor", "tuple", str(bad))) for bad in (1, None)),
    ({"monitor": (None,)}, ValueError, ("monitor", "None")),
    ({"backend": ["cpu"]}, ValueError, ("backend", "['cpu']")),
    ({"direction": ["both"]}, ValueError, ("direction", "['both']")),
    ({"anchor": 0}, ValueError, ("anchor", "0")),
    *(({"variance_target": bad}, ValueError, ("variance_target", str(bad))) for bad in (0, -1.0, math.nan)),
    ({"l2": 1.0}, TypeError, ("l2",)),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD_OPTIONS)
def test_options(options, error, words):
    for call in (FusedSeqLoss, lambda **options: functional.seq_loss(ROWS, ROWS, **options)):
        with pytest.raises(error) as caught:
            call(**options)
        for word in words:
            assert word in str(caught.value)


def test_monitored_terms_have_one_order():
    """That of the terms: the order of a set is another one in every process."""
    for given in ({"variance", "moment", "cosine"}, ["variance", "cosine", "moment", "cosine"]):
        assert LossOptions(monitor=given).monitor == ("cosine", "moment", "variance")


def test_positives_by_id_need_ids():
    with pytest.raises(ValueError, match=r"positives='ids' needs ids, got None"):
        functional.seq_loss(ROWS, ROWS, infonce=1.0, positives="ids")


INFONCE = {"infonce": 1.0}
BAD_TENSORS = [
    (ROWS[0], ROWS[0], {}, {}, ValueError, ("pred", "[N, D] or [B, T, D]", "[3]")),
    (GRID[None], GRID[None], {}, {}, ValueError, ("pred", "[1, 2, 2, 3]")),
    (ROWS, ROWS[:, :2], {}, {}, ValueError, ("target", "[4, 3]", "[4, 2]")),
    (ROWS, ROWS[:2], {}, {}, ValueError, ("target", "[4, 3]", "[2, 3]")),
    (ROWS, ROWS[:1], {}, {}, ValueError, ("target", "[4, 3]", "[1, 3]")),  # would broadcast
    (GRID, GRID.view(4, 3), {}, {}, ValueError, ("target", "[2, 2, 3]", "[4, 3]")),
    (ROWS, ROWS.to("meta"), {}, {}, ValueError, ("target", "cpu", "meta")),
    (ROWS.long(), ROWS, {}, {}, TypeError, ("pred", "torch.int64")),
    (ROWS, ROWS.bool(), {}, {}, TypeError, ("target", "torch.bool")),
    (ROWS, ROWS.to(torch.complex64), {}, {}, TypeError, ("target", "torch.complex64")),
    (ROWS, ROWS.to(torch.float8_e4m3fn), {}, {}, TypeError, ("target", "torch.float8_e4m3fn")),
    (ROWS.numpy(), ROWS, {}, {}, TypeError, ("pred", "ndarray")),
    (ROWS.to_sparse(), ROWS, {}, {}, TypeError, ("pred", "dense", "sparse_coo")),
    (ROWS, ROWS.to_sparse(), {}, {}, TypeError, ("target", "dense", "sparse_coo")),
    (ROWS, ROWS, {"mask": KEEP.to_sparse()}, {}, TypeError, ("mask", "dense", "sparse_coo")),
    (ROWS, [[1.0]], {}, {}, TypeError, ("target", "list")),
    (ROWS[:0], ROWS[:0], {}, {}, ValueError, ("pred", "[0, 3]")),
    (ROWS[:, :0], ROWS[:, :0], {}, {}, ValueError, ("pred", "[4, 0]")),
    (GRID[:, :0], GRID[:, :0], {}, {}, ValueError, ("pred", "[2, 0, 3]")),
    (ROWS, ROWS, {"mask": KEEP[:3]}, {}, ValueError, ("mask", "[4]", "[3]")),
    (ROWS, ROWS, {"mask": KEEP.view(2, 2)}, {}, ValueError, ("mask", "[4]", "[2, 2]")),
    (GRID, GRID, {"mask": KEEP}, {}, ValueError, ("mask", "[2, 2]", "[4]")),
    (ROWS, ROWS, {"mask": KEEP.float()}, {}, TypeError, ("mask", "bool", "torch.float32")),
    (ROWS, ROWS, {"mask": [True] * 4}, {}, TypeError, ("mask", "list")),
    (ROWS, ROWS, {"mask": KEEP.to("meta")}, {}, ValueError, ("mask", "cpu", "meta")),
    (ROWS, ROWS, {"ids": torch.arange(3)}, INFONCE, ValueError, ("ids", "[4]", "[3]")),
    (ROWS, ROWS, {"ids": torch.ones(4)}, INFONCE, TypeError, ("ids", "int64", "torch.float32")),
    (ROWS, ROWS, {"ids": range(4)}, INFONCE, TypeError, ("ids", "range")),
    (ROWS, ROWS, {"ids": torch.arange(4, device="meta")}, INFONCE, ValueError, ("ids", "cpu", "meta")),
    (ROWS, ROWS, {"ids": torch.arange(4)}, {}, ValueError, ("ids", "infonce")),
    (ROWS, ROWS, {"extra_negatives": torch.ones(5, 2)}, INFONCE, ValueError, ("extra_negatives", "[K, 3]", "[5, 2]")),
    (ROWS, ROWS, {"extra_negatives": torch.ones(3)}, INFONCE, ValueError, ("extra_negatives", "[K, 3]", "[3]")),
    (ROWS, ROWS, {"extra_negatives": ROWS.int()}, INFONCE, TypeError, ("extra_negatives", "torch.int32")),
    (ROWS, ROWS, {"extra_negatives": ROWS.to("meta")}, INFONCE, ValueError, ("extra_negatives", "cpu", "meta")),
    (ROWS, ROWS, {"extra_negatives": ROWS}, {}, ValueError, ("extra_negatives", "infonce")),
    (ROWS, ROWS, {"extra_negatives": ROWS[:0]}, INFONCE, ValueError, ("extra_negatives", "at least one row", "[0, 3]")),
    (ROWS, ROWS, {}, {"negatives": "step"}, ValueError, ("negatives", "'step'", "[B, T, D]", "[4, 3]")),
    (ROWS, ROWS, {}, {"negatives": "sequence"}, ValueError, ("negatives", "'sequence'", "[4, 3]")),
    (with_bad(math.nan, 2), ROWS, {}, {"check_finite": True}, ValueError, ("pred", "row 2", "1 such")),
    (ROWS, with_bad(math.inf, 1, 3), {}, {"check_finite": True}, ValueError, ("target", "row 1", "2 such")),
    (GRID, with_bad(-math.inf, 3).view(2, 2, 3), {}, {"check_finite": True}, ValueError, ("target", "row [1, 1]")),
    (
        ROWS, ROWS, {"extra_negatives": with_bad(math.nan, 0)}, {**INFONCE, "check_finite": True},
        ValueError, ("extra_negatives", "row 0"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("pred", "target", "tensors", "options", "error", "words"), BAD_TENSORS)
def test_tensors(pred, target, tensors, options, error, words):
    criterion = FusedSeqLoss(**options)
    good = GRID if "negatives" in options else ROWS
    criterion(good, good)
    before = criterion.stats
    calls = (
        lambda: criterion(pred, target, **tensors),
        lambda: functional.seq_loss(pred, target, **tensors, **options),
    )
    for call in calls:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).startswith(words[0])
        for word in words[1:]:
            assert word in str(caught.value)
    assert criterion.stats is before


def test_nothing_is_computed_before_an_error():
    bad = torch.arange(4).float()  # the last argument to be checked
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile, pytest.raises(TypeError, match="ids"):
        functional.seq_loss(ROWS, ROWS, ids=bad, infonce=1.0)
    assert [event.key for event in profile.key_averages() if event.key.startswith(("aten::", "amn_kernels::"))] == []


def test_unknown_argument_of_the_call():
    with pytest.raises(TypeError, match="weights"):
        FusedSeqLoss()(ROWS, ROWS, weights=ROWS)


def test_learnable_temperature_needs_the_module():
    with pytest.raises(ValueError, match=r"learnable_temperature.*FusedSeqLoss"):
        functional.seq_loss(ROWS, ROWS, infonce=1.0, learnable_temperature=True)


def test_check_finite_looks_at_rows_that_count():
    mask = torch.tensor([True, True, False, True])
    bad = with_bad(math.nan, 2)
    loss, _ = functional.seq_loss(bad, ROWS, mask=mask, check_finite=True)
    assert loss == 0
    with pytest.raises(ValueError, match=r"pred has NaN or Inf in row 2"):
        functional.seq_loss(bad, ROWS, mask=~mask, check_finite=True)


def test_without_check_finite_the_loss_says_it():
    loss, _ = functional.seq_loss(with_bad(math.nan, 2), ROWS)
    assert loss.isnan()


@pytest.mark.parametrize("target_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("pred_dtype", FLOAT_DTYPES)
def test_any_two_floating_dtypes_are_welcome(pred_dtype, target_dtype):
    target = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=target_dtype)
    loss, _ = functional.seq_loss(torch.zeros(2, 2, dtype=pred_dtype), target)
    assert loss == 1.25
    assert loss.dtype == (torch.float64 if torch.float64 in (pred_dtype, target_dtype) else torch.float32)


def test_learnable_temperature_needs_the_infonce_term():
    with pytest.raises(ValueError, match="learnable_temperature=True needs the infonce term"):
        FusedSeqLoss(learnable_temperature=True)
