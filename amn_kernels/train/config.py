"""The training options: the one place for flags, defaults and help texts."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from amn_kernels import FusedSeqLoss


@dataclass(frozen=True)
class LossConfig:
    """What training and audit have in common: a model, its data and its loss."""

    model: str = "amn"
    """Name of the model."""
    lambda_mse: float = 1.0
    """Weight of the mean squared error; 0 switches a term off."""
    lambda_cosine: float = 0.0
    """Weight of 1 - cosine."""
    lambda_info: float = 0.0
    """Weight of InfoNCE over the batch."""
    lambda_moment: float = 0.0
    """Weight of the match of batch means and standard deviations."""
    lambda_variance: float = 0.0
    """Weight of the hinge against collapsed dimensions."""
    weighting: Literal["fixed", "value", "gradient"] = "gradient"
    """fixed: the lambdas are the weights; value, gradient: they are shares, balanced by loss values or by gradients."""
    batch_size: int = 32
    """Windows in a batch; InfoNCE has this many candidates."""
    temperature: float = 0.07
    """Temperature of InfoNCE."""
    seed: int = 0
    """Seed of the initial parameters and of the batches' order."""
    context: int = 5
    """Vectors before the predicted one; files that hold ready windows have their own."""
    data: Path | None = None
    """NPZ file with vectors and article, or context_sequences and target_vectors; default: the bundled verses."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that can't be used; the loss checks its own weights and temperature."""
        self._check_least(batch_size=1, context=1)

    def make_criterion(self) -> FusedSeqLoss:
        """The loss of these options."""
        return FusedSeqLoss(
            mse=self.lambda_mse,
            cosine=self.lambda_cosine,
            infonce=self.lambda_info,
            moment=self.lambda_moment,
            variance=self.lambda_variance,
            weighting=self.weighting,
            temperature=self.temperature,
        )

    def _check_least(self, **least: int) -> None:
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} must be at least {number}, got {getattr(self, name)}")


@dataclass(frozen=True)
class TrainConfig(LossConfig):
    """Options of `amn-kernels train`; the texts under the fields are its help."""

    epochs: int = 20
    """Passes over the training windows, at most."""
    lr: float = 5e-4
    """Learning rate of AdamW at the start; halved where the validation cosine stalls for 2 epochs."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    clip_norm: float = 1.0
    """Largest norm of the parameters' gradient; longer ones are scaled down."""
    patience: int = 6
    """Stop after this many epochs without a better validation cosine; 0 never stops early."""
    out: Path = Path("runs/train")
    """Folder for the run's files."""
    overwrite: bool = False
    """Replace an earlier run in that folder."""
    device: str = "cpu"
    """Torch device, for example cpu or cuda."""
    threads: int = 0
    """CPU threads of torch; 0 leaves its choice. Runs repeat exactly on a CPU with the same number of threads."""

    def __post_init__(self) -> None:
        """As in `LossConfig`."""
        super().__post_init__()
        self._check_least(epochs=1, patience=0, threads=0)
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be non-negative and finite, got {self.weight_decay}")
