"""Time of MSE + cosine + InfoNCE, forward + backward, against eager PyTorch, torch.compile and what bounds it."""

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
    queries, similarities, attention = pred.detach(), torch.empty(rows, rows), torch.empty(rows, DIM)

    def products():
        torch.mm(queries, target.t(), out=similarities)
        torch.mm(similarities, target, out=attention)

    return _measure("all_terms", rows, {**runs, "products": products}, seconds)


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
