"""The bytes that the CUDA kernels move: each matrix once, and nothing else that would count."""

import pytest
import torch

from bench.cuda_bytes import ABOVE_GOAL, GOAL, SIZES, counted

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def work():
    return {name: {w.name: w for w in counted(dtype)} for name, dtype in DTYPES.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_within_the_goal(work, dtype):
    ratios = {name: w.moved / w.minimum for name, w in work[dtype].items()}
    assert len(ratios) == 23
    above = {name: ratio for name, ratio in ratios.items() if ratio > ABOVE_GOAL.get((name, dtype), GOAL)}
    assert not above, f"bytes over the minimum: {above}"


def test_exceptions_are_needed(work):
    for name, dtype in ABOVE_GOAL:
        w = work[dtype][name]
        assert w.moved / w.minimum > GOAL


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_are_those_by_hand(work, dtype):
    n, d, k = SIZES.rows, SIZES.dim, SIZES.keys
    size = DTYPES[dtype].itemsize
    rows = work[dtype]["row_stats"]
    assert rows.read == 2 * n * d * size
    assert rows.written == 15 * 8 * n + 4 * n  # all plain scalars, and the scale of the key
    dots = work[dtype]["row_dots"]
    assert dots.minimum == 2 * n * d * size + 2 * n * d * 4  # o is read and written in float32
    combine = work[dtype]["row_combine"]
    assert combine.written == n * d * size
    assert work[dtype]["softmax_rows"].minimum == n * k * (4 + size)
    # pred is read in both passes, target and o in one.
    columns = work[dtype]["col_dots"]
    assert columns.minimum == 2 * n * d * size + n * d * 4
    assert columns.read - columns.minimum >= n * d * size
