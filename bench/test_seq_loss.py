"""Time of forward + backward. Contenders take turns: one call of each per round, so that a slow moment of the machine
falls on all of them. pytest-benchmark times the fused loss; the turns of the others are kept in extra_info.
"""

import statistics
import time

import pytest
import torch

from bench.contenders import ALL_TERMS, STREAMED_TERMS, inputs, losses, step

DIM = 768
# Rounds so that each size takes about 10 s on two cores.
ROUNDS = {32: 1500, 128: 500, 256: 250, 1024: 60, 4096: 9}


def interleave(benchmark, fused, rivals: dict, rounds: int) -> None:
    """Time `fused` with the benchmark fixture and one call of each rival before each of its rounds."""
    seconds = {name: [] for name in rivals}
    order = list(rivals.items())

    def turn_of_rivals():
        order.append(order.pop(0))  # each comes after each other one in turn, and finds the caches as that left them
        for name, run in order:
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    for run in (fused, *rivals.values()):  # warm-up: compilation, thread pools, allocator
        for _ in range(3):
            run()
    benchmark.pedantic(fused, setup=turn_of_rivals, rounds=rounds, iterations=1)
    benchmark.extra_info["median"] = {name: statistics.median(times) for name, times in seconds.items()}


@pytest.mark.parametrize("rows", sorted(ROUNDS))
def test_all_terms(benchmark, rows, smoke):
    """MSE + cosine + InfoNCE against eager, torch.compile and the two bare matrix products that the op contains.

    The weights are fixed, as the rivals' are; "balanced" is the fused loss with its default weighting.
    """
    if smoke and rows > 256:
        pytest.skip("smoke run: small sizes only")
    pred, target = inputs(rows, DIM)
    runs = {name: step(loss, pred, target) for name, loss in losses(ALL_TERMS).items() if name != "both"}
    queries, similarities, attention = pred.detach(), torch.empty(rows, rows), torch.empty(rows, DIM)

    def products():
        torch.mm(queries, target.t(), out=similarities)
        torch.mm(similarities, target, out=attention)

    fused = runs.pop("fused")
    benchmark.extra_info.update(kind="all_terms", rows=rows, dim=DIM, flops=4 * rows * rows * DIM)
    interleave(benchmark, fused, {**runs, "products": products}, 20 if smoke else ROUNDS[rows])


def test_streamed_terms(benchmark, smoke):
    """MSE + cosine at 65,536 rows against moving five such tensors: two reads, then two reads and a write."""
    rows = 4096 if smoke else 65536
    pred, target = inputs(rows, DIM)
    runs = {name: step(loss, pred, target) for name, loss in losses(STREAMED_TERMS).items() if name != "both"}
    values = pred.detach()

    def move():
        values.sum()
        target.sum()
        return torch.add(values, target)  # a fresh tensor, as the gradient is

    fused = runs.pop("fused")
    benchmark.extra_info.update(kind="streamed_terms", rows=rows, dim=DIM)
    interleave(benchmark, fused, {**runs, "move": move}, 5 if smoke else 15)
