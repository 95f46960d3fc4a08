"""The loss as people write it today, in the dtype of its input: the baseline of the benchmarks and of the error rule.

The error rule: against float64 truth, a kernel's error may be at most twice that of this code in the same dtype, plus a
small stated floor.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def seq_loss(
    pred: Tensor,  # [N, D]
    target: Tensor,  # [N, D]
    *,
    mse: float = 0.0,
    cosine: float = 0.0,
    infonce: float = 0.0,
    temperature: float = 0.07,
) -> Tensor:
    """Weighted sum of mean squared error, 1 - cosine and in-batch InfoNCE; terms of weight 0 are left out."""
    loss = pred.new_zeros(())
    if mse:
        loss = loss + mse * F.mse_loss(pred, target)
    if cosine:
        loss = loss + cosine * (1 - F.cosine_similarity(pred, target, dim=-1)).mean()
    if infonce:
        logits = F.normalize(pred, dim=-1) @ F.normalize(target, dim=-1).mT / temperature
        loss = loss + infonce * F.cross_entropy(logits, torch.arange(len(pred), device=pred.device))
    return loss
