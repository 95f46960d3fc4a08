"""What a typed program that uses the package looks like; checked by `make types` with --strict, never run."""

from typing import assert_type

import torch
from torch import Tensor, nn

from amn_kernels import FusedSeqLoss, LossStats, NegativeQueue, audit, functional
from amn_kernels.audit import AuditReport


def mean_of_both(gramian: Tensor, values: Tensor) -> Tensor:
    return torch.ones_like(values) / len(gramian)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.criterion = FusedSeqLoss(mse=0.5, infonce=1, weighting=mean_of_both, direction="both", monitor=("cosine",))
        self.queue = NegativeQueue(64, dim=8, dtype=torch.bfloat16)

    def training_step(self, context: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        loss = self.criterion(self.layer(context), target, mask=mask, extra_negatives=self.queue.negatives())
        self.queue.push(target, mask)
        assert_type(self.criterion.stats, LossStats)
        assert_type(self.criterion.stats.as_dict(), dict[str, float])
        assert_type(self.criterion.stats.value, dict[str, Tensor])
        assert_type(self.criterion.stats.top1, Tensor | None)
        assert_type(self.criterion.forward(context, target), Tensor)
        result: Tensor = loss
        return result


def without_state(pred: Tensor, target: Tensor) -> float:
    loss, stats = functional.seq_loss(pred, target, mse=1.0, infonce=0.5, temperature=0.05)
    assert_type(loss, Tensor)
    assert_type(stats, LossStats)
    return loss.item()


def before_training(model: Model, batches: list[tuple[Tensor, Tensor]]) -> str:
    report = audit(model, batches, model.criterion, probe_steps=0)
    assert_type(report, AuditReport)
    return report.verdict
