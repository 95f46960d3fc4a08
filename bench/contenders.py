"""Who is measured: the fused loss and what people run today, on the same input, forward and backward."""

from collections.abc import Callable

import torch

from amn_kernels import FusedSeqLoss
from amn_kernels.reference import eager

ALL_TERMS = {"mse": 1.0, "cosine": 1.0, "infonce": 1.0}
STREAMED_TERMS = {"mse": 1.0, "cosine": 1.0}


def compiled(loss: Callable) -> Callable:
    """The loss compiled anew for every shape: as dynamic, which it becomes from the second shape on, it is slower.

    Past the number of shapes that it keeps, torch would go on without compiling; here that is an error.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(loss, dynamic=False)


def losses(terms: dict[str, float]) -> dict[str, Callable]:
    """The loss functions by name; each takes pred and target [N, D] and returns a scalar."""

    def plain(pred, target):
        return eager.seq_loss(pred, target, **terms)

    return {
        "fused": FusedSeqLoss(**{"mse": 0.0, **terms}, weighting="fixed"),
        "balanced": FusedSeqLoss(**{"mse": 0.0, **terms}),
        "both": FusedSeqLoss(**{"mse": 0.0, **terms}, weighting="fixed", direction="both"),
        "eager": plain,
        "compile": compiled(plain),
    }


def step(loss: Callable, pred: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    """Forward and backward, as a training step does them: gradients start from None."""

    def run():
        pred.grad = target.grad = None
        loss(pred, target).backward()

    return run


def inputs(rows: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeded pred (a leaf that requires a gradient) and target, [rows, dim] float32."""
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(rows, dim, generator=generator) for _ in range(2))
    return pred.requires_grad_(), target
