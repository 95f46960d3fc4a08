"""Error of the gradient in float32 against float64 truth, beside eager PyTorch's, as predictions converge."""

import functools

import torch

from amn_kernels import FusedSeqLoss
from amn_kernels.reference import eager

TERMS = ("mse", "cosine", "infonce")
DISTANCES = (1.0, 0.05, 0.001)  # |pred - target| / |target|; 1.0: far from converged


def relative_errors(rows: int = 256, dim: int = 768) -> list[dict]:
    """One entry per term and distance: relative error (Frobenius) of the fused and of the eager gradient."""
    results = []
    for distance in DISTANCES:
        generator = torch.Generator().manual_seed(0)
        target, noise = (torch.randn(rows, dim, generator=generator) for _ in range(2))
        pred = target + distance * noise
        for term in TERMS:
            fused, plain = (
                FusedSeqLoss(**{"mse": 0.0, term: 1.0}, weighting="fixed"),
                functools.partial(eager.seq_loss, **{term: 1.0}),
            )
            truth = _gradient(plain, pred.double(), target.double())
            errors = {
                name: float((_gradient(loss, pred, target) - truth).norm() / truth.norm())
                for name, loss in (("fused", fused), ("eager", plain))
            }
            results.append({"term": term, "distance": distance, **errors})
    return results


def _gradient(loss, pred, target):
    pred = pred.clone().requires_grad_()
    loss(pred, target).backward()
    return pred.grad.double()
