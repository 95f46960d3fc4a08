"""`python -m bench.train_step`: the loss's share of a training step of AMN, D = 768, MSE and InfoNCE at 0.5/0.5.

A step is prediction, loss, gradients, clipping and AdamW, as in the trainer. The loss has its own leaf in the middle of
it, so that its forward and backward are timed where they happen, with the caches as the model
leaves them. Contenders take turns, step by step, each with a model of its own; a share is the median over steps.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from amn_kernels import FusedSeqLoss
from amn_kernels.reference import eager
from amn_kernels.train.models import AMN

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


def measure(rows: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Contender -> medians in seconds of loss and whole step, at so many rows."""
    contenders = {
        "fused, balanced": FusedSeqLoss(**TERMS),
        "fused, fixed": FusedSeqLoss(**TERMS, weighting="fixed"),
        "eager, fixed": lambda pred, target: eager.seq_loss(pred, target, **TERMS),
    }
    generator = torch.Generator().manual_seed(0)
    vectors = nn.functional.normalize(torch.randn(rows, CONTEXT + 1, DIM, generator=generator), dim=-1)
    steps = {name: make_step(loss, vectors[:, :-1], vectors[:, -1]) for name, loss in contenders.items()}
    times = {name: [] for name in steps}
    for number in range(rounds + 3):
        for name, step in steps.items():
            seconds = step()
            if number >= 3:  # the first ones warm up
                times[name].append(seconds)
    return {name: tuple(map(statistics.median, zip(*of_steps, strict=True))) for name, of_steps in times.items()}


def main() -> None:
    """Prints a line for each number of rows and contender."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, AMN, D = {DIM}, T = {CONTEXT}; medians")
    for rows in (32, 256):
        for name, (loss, step) in measure(rows, 400 if rows == 32 else 100).items():
            print(f"{rows:>4} rows  {name:<16} loss {loss * 1e3:6.2f} ms of {step * 1e3:6.2f} ms: {loss / step:5.1%}")


if __name__ == "__main__":
    main()
