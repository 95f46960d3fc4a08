"""Untrained predictors that every evaluation shows beside the model, so that nobody takes their level for learning."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from amn_kernels.data import Windows
from amn_kernels.train.collapse import TrainSubspace

# Maps contexts [B, T, D] to predictions [B, D]; a model in eval mode is one too.
PredictFunction = Callable[[Tensor], Tensor]

MEAN, LAST, TRAIN_MEAN, MIX = "mean of context", "copy last", "training mean", "mean-last mix"
FIT_ROWS = 4096


def mean_of_context(context: Tensor) -> Tensor:
    """context: [B, T, D] -> [B, D]."""
    return context.mean(dim=1)


def copy_last(context: Tensor) -> Tensor:
    """context: [B, T, D] -> [B, D]."""
    return context[:, -1]


@dataclass(frozen=True)
class Baselines:
    """The untrained predictors; `train_mean` [D], the mix's two coefficients and the subspace that evaluations look for
    predictions in come from the training windows of the data that is named."""

    fitted_on: str
    train_mean: Tensor
    train_subspace: TrainSubspace
    mean_coefficient: float
    last_coefficient: float

    def predictors(self) -> dict[str, PredictFunction]:
        """Name -> predictor, in the order of the tables."""
        return {
            MEAN: mean_of_context,
            LAST: copy_last,
            TRAIN_MEAN: lambda context: self.train_mean.expand(len(context), -1),
            MIX: self.mix,
        }

    def mix(self, context: Tensor) -> Tensor:
        """context: [B, T, D] -> a * mean + b * last, [B, D]."""
        return self.mean_coefficient * mean_of_context(context) + self.last_coefficient * copy_last(context)


def fit_baselines(windows: Windows, rows: np.ndarray) -> Baselines:
    """Fits training mean and subspace and, by least squares, a * mean + b * last to the targets of windows `rows`."""
    normal = torch.zeros(2, 2, dtype=torch.float64)
    moment = torch.zeros(2, dtype=torch.float64)
    total = torch.zeros(windows.dim, dtype=torch.float64)
    directions = torch.zeros(windows.dim, windows.dim, dtype=torch.float64)
    for start in range(0, len(rows), FIT_ROWS):
        context, target = (tensor.double() for tensor in windows.batch(rows[start : start + FIT_ROWS]))
        inputs = torch.stack([mean_of_context(context).flatten(), copy_last(context).flatten()])  # [2, B * D]
        normal += inputs @ inputs.T
        moment += inputs @ target.flatten()
        total += target.sum(dim=0)
        units = F.normalize(target, dim=1)
        directions += units.T @ units
    # The pseudoinverse because with one context vector mean and last are the same and the fit isn't unique.
    a, b = (torch.linalg.pinv(normal, hermitian=True) @ moment).tolist()
    return Baselines(
        windows.name, (total / len(rows)).float(), TrainSubspace(directions), mean_coefficient=a, last_coefficient=b
    )
