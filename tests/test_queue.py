"""The ring buffer of negatives against a list that does the same, and its state."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amn_kernels import FusedSeqLoss, NegativeQueue

D = 3


def rows(start, count):
    return torch.arange(start, start + count, dtype=torch.float32).unsqueeze(1).expand(-1, D)


def held(queue):
    """The rows' numbers, the oldest first."""
    negatives = queue.negatives()
    return [] if negatives is None else negatives[:, 0].tolist()


@given(st.integers(1, 9), st.lists(st.integers(0, 20), max_size=8))
def test_keeps_the_last_rows(size, batches):
    queue, pushed = NegativeQueue(size, D), 0
    assert queue.negatives() is None
    for count in batches:
        queue.push(rows(pushed, count))
        pushed += count
        assert held(queue) == list(range(max(0, pushed - size), pushed))
        assert len(queue) == min(size, pushed)


def test_takes_rows_of_a_grid_under_a_mask():
    queue = NegativeQueue(10, D)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    queue.push(rows(0, 6).reshape(2, 3, D), mask)
    assert held(queue) == [0, 2, 5]


def test_state_survives():
    queue, twin = NegativeQueue(5, D), NegativeQueue(5, D)
    queue.push(rows(0, 7))
    assert all(isinstance(value, torch.Tensor) for value in queue.state_dict().values())
    twin.load_state_dict(queue.state_dict())
    for each in (queue, twin):
        each.push(rows(7, 2))
    assert held(twin) == held(queue) == [4, 5, 6, 7, 8]
    empty = NegativeQueue(5, D)
    twin.load_state_dict(empty.state_dict())
    assert twin.negatives() is None


@pytest.mark.parametrize(("size", "wanted"), [(3, [4, 5, 6]), (5, [2, 3, 4, 5, 6]), (9, [2, 3, 4, 5, 6])])
def test_state_of_another_size(size, wanted):
    """The newest rows that fit; pushing goes on from there."""
    queue, other = NegativeQueue(5, D), NegativeQueue(size, D, dtype=torch.float64)
    queue.push(rows(0, 7))
    other.push(rows(100, 2))  # what was there before is gone
    other.load_state_dict(queue.state_dict())
    assert held(other) == wanted
    other.push(rows(7, 1))
    assert held(other) == [*wanted, 7][-size:]
    assert other.negatives().dtype is torch.float64
    with pytest.raises(ValueError, match=r"queue state must be \[K, 4\], got shape \[5, 3\]"):
        NegativeQueue(5, D + 1).load_state_dict(queue.state_dict())


def test_moves_with_the_module():
    model = torch.nn.Sequential(NegativeQueue(5, D))
    model[0].push(rows(0, 2))
    model.double()
    assert model[0].negatives().dtype is torch.float64
    assert held(model[0]) == [0, 1]
    assert not list(model.buffers())  # which DistributedDataParallel would overwrite: see ranks.py
    assert model.to("meta")[0].negatives().device.type == "meta"


def test_negatives_are_a_detached_copy():
    queue = NegativeQueue(4, D)
    target = torch.randn(2, D, requires_grad=True)
    queue.push(target)
    before = queue.negatives()
    assert not before.requires_grad
    wanted = before.clone()
    queue.push(torch.randn(4, D))
    assert torch.equal(before, wanted)


def test_feeds_the_loss():
    """Two batches with the first one's targets in the queue: as if they were handed over by hand."""
    torch.manual_seed(0)
    (first, _), (target, pred) = torch.randn(2, 2, 4, D)
    queue = NegativeQueue(8, D)
    queue.push(first)
    criterion = FusedSeqLoss(infonce=1.0, weighting="fixed")
    got = criterion(pred, target, extra_negatives=queue.negatives())
    assert torch.equal(got, criterion(pred, target, extra_negatives=first))
    assert got > criterion(pred, target)


@pytest.mark.parametrize("assign", [False, True])
def test_made_without_memory(assign):
    """It is where its first rows are."""
    with torch.device("meta"):
        empty, filled = NegativeQueue(4, D), NegativeQueue(4, D)
    rows = torch.randn(2, D)
    empty.push(rows)
    assert torch.equal(empty.negatives(), rows)
    filled.load_state_dict(empty.state_dict(), assign=assign)
    filled.push(rows + 1)
    assert torch.equal(filled.negatives(), torch.cat([rows, rows + 1]))
    with pytest.raises(ValueError, match="the device of the queue, meta"):
        filled.to("meta").push(rows)


def test_dtype():
    queue = NegativeQueue(4, D, dtype=torch.bfloat16)
    queue.push(torch.randn(2, D))
    assert queue.negatives().dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0, 3), ValueError, ("size", "0")),
        ((4, 2.5), ValueError, ("dim", "2.5")),
        ((4, True), ValueError, ("dim", "True")),
    ],
)
def test_bad_sizes(arguments, error, words):
    with pytest.raises(error) as caught:
        NegativeQueue(*arguments)
    assert all(word in str(caught.value) for word in words)
    with pytest.raises(TypeError, match=r"dtype .*int64"):
        NegativeQueue(4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("targets", "mask", "error", "words"),
    [
        (torch.ones(2, 4), None, ValueError, ("targets", "[N, 3]", "[2, 4]")),
        (torch.ones(3), None, ValueError, ("targets", "[3]")),
        (torch.ones(2, 3, dtype=torch.int64), None, TypeError, ("targets", "int64")),
        ([[1.0] * 3], None, TypeError, ("targets", "list")),
        (torch.ones(2, 3), torch.ones(3, dtype=torch.bool), ValueError, ("mask", "[2]", "[3]")),
        (torch.ones(2, 3), torch.ones(2), TypeError, ("mask", "float32")),
    ],
)
def test_bad_rows(targets, mask, error, words):
    queue = NegativeQueue(4, D)
    with pytest.raises(error) as caught:
        queue.push(targets, mask)
    assert all(word in str(caught.value) for word in words)
    assert len(queue) == 0
