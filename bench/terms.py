"""Time of MSE + cosine + InfoNCE, forward + backward, against eager PyTorch, torch.compile and what bounds it."""

from collections.abc import Callable

import torch

from bench.contenders import ALL_TERMS, STREAMED_TERMS, inputs, losses, step
from bench.timing import interleaved, summary

DIM = 768
ROWS = (32, 128, 256, 1024, 4096)


def all_terms(rows: int, seconds: float) -> dict:
    """Beside the two bare matrix products that the op contains.

    "balanced" is the fused loss with default weighting, "bfloat16" the one with fixed weights on input of that dtype.
    """
    pred, target = inputs(rows, DIM)
    contenders = losses(ALL_TERMS)
    runs = {name: step(loss, pred, target) for name, loss in contenders.items() if name != "both"}
    narrow = pred.detach().bfloat16().requires_grad_()
    runs["bfloat16"] = step(contenders["fused"], narrow, target.bfloat16())
    return _measure("all_terms", rows, {**runs, "products": _products(pred, target)}, seconds)


def _products(pred: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    """The two matrix products that the op contains, alone."""
    queries, similarities, attention = pred.detach(), torch.empty(len(pred), len(pred)), torch.empty(pred.shape)

    def run():
        torch.mm(queries, target.t(), out=similarities)
        torch.mm(similarities, target, out=attention)

    return run


def scaling(rows: int, seconds: float) -> dict:
    """The step, and the two bare products, with one thread and with all: time with one over time with all."""
    pred, target = inputs(rows, DIM)
    threads = torch.get_num_threads()
    works = {"fused": step(losses(ALL_TERMS)["fused"], pred, target), "products": _products(pred, target)}

    def switched(run, count):
        def run_with():
            torch.set_num_threads(count)
            run()

        return run_with

    runs = {(name, count): switched(run, count) for count in (threads, 1) for name, run in works.items()}
    times = interleaved(runs, seconds)
    torch.set_num_threads(threads)
    of = {name: summary({1: times[name, 1], threads: times[name, threads]}, threads)[1] for name in works}
    return {"kind": "scaling", "rows": rows, "dim": DIM, "threads": threads, **of}


def streamed_terms(rows: int, seconds: float) -> dict:
    """MSE + cosine beside moving five such tensors: two reads, then two reads and a write."""
    pred, target = inputs(rows, DIM)
    runs = {name: step(loss, pred, target) for name, loss in losses(STREAMED_TERMS).items() if name != "both"}
    values = pred.detach()

    def move():
        values.sum()
        target.sum()
        return torch.add(values, target)  # a fresh tensor, as the gradient is

    return _measure("streamed_terms", rows, {**runs, "move": move}, seconds)


def _measure(kind: str, rows: int, runs: dict, seconds: float) -> dict:
    return {"kind": kind, "rows": rows, "dim": DIM, "contenders": summary(interleaved(runs, seconds), "fused")}
