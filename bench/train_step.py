"""`python -m bench.train_step`: the loss's share of a training step of AMN, D = 768, MSE and InfoNCE at 0.5/0.5.

A step is prediction, loss, gradients, clipping and AdamW, as in the trainer. The loss has its own leaf in the middle of
it, so that its forward and backward are timed where they happen, with the caches as the model leaves them. One thread
and its processor time. Contenders take turns, step by step, each with a model of its own. Writes JSON, page and README.
"""

import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from amn_kernels import FusedSeqLoss
from amn_kernels.reference import eager
from amn_kernels.train.models import AMN
from amn_kernels.train.runs import write_atomically
from bench import command, report, timing

DIM, CONTEXT = 768, 5
TERMS = {"mse": 0.5, "infonce": 0.5}


def make_step(criterion: Callable, context: torch.Tensor, target: torch.Tensor) -> Callable[[], tuple[float, float]]:
    """A training step; it returns the seconds that the loss took and those of the whole step.

    context: [N, T, D], target: [N, D].
    """
    torch.manual_seed(0)
    model = AMN(DIM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> tuple[float, float]:
        start = time.process_time()
        pred = model(context)
        leaf = pred.detach().requires_grad_()
        before = time.process_time()
        criterion(leaf, target).backward()
        after = time.process_time()
        pred.backward(leaf.grad)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return after - before, time.process_time() - start

    return step


def measure(rows: int, seconds: float) -> dict[str, dict[str, float]]:
    """Contender -> medians in seconds of "loss" and whole "step", at so many rows, in about so many seconds."""
    contenders = {
        "fused, balanced": FusedSeqLoss(**TERMS),
        "fused, fixed": FusedSeqLoss(**TERMS, weighting="fixed"),
        "eager, fixed": lambda pred, target: eager.seq_loss(pred, target, **TERMS),
    }
    generator = torch.Generator().manual_seed(0)
    vectors = nn.functional.normalize(torch.randn(rows, CONTEXT + 1, DIM, generator=generator), dim=-1)
    steps = {name: make_step(loss, vectors[:, :-1], vectors[:, -1]) for name, loss in contenders.items()}
    for step in [*steps.values()] * 3:  # warms up
        step()
    times = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while not times["eager, fixed"] or time.perf_counter() < end:
        for name, step in steps.items():
            times[name].append(step())
    return {
        name: dict(zip(("loss", "step"), map(statistics.median, zip(*of_steps, strict=True)), strict=True))
        for name, of_steps in times.items()
    }


def main() -> None:
    """Measure, write, print the table."""
    arguments = command.parse(command.make_parser("bench.train_step", __doc__, report.TRAIN, seconds=20.0))
    timing.use_processor_time()
    sizes = [32] if arguments.smoke else [32, 256]
    seconds = 1.0 if arguments.smoke else arguments.seconds
    result = {
        "machine": report.machine(),
        "load": os.getloadavg()[0],
        "sizes": [{"rows": rows, "contenders": measure(rows, seconds)} for rows in sizes],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.json, json.dumps(result, indent=1) + "\n")
    print(report.terms.train_section(result))
    if arguments.json == report.TRAIN:
        report.render()


if __name__ == "__main__":
    main()
