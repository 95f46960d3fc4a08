"""The training options: the one place for flags, defaults and help texts."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from torch import nn

from amn_kernels import FusedSeqLoss
from amn_kernels.train.models import build_model


@dataclass(frozen=True)
class LossConfig:
    """What training and audit have in common: a model, its data and its loss."""

    model: str = "amn"
    """Name of the model: amn, lstm, gru, transformer, or one that was registered."""
    residual: bool = False
    """Predict what is to be added to the mean of the context; amn always does."""
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
        # What both generators of random numbers take, of torch and of numpy, with room for the processes' numbers.
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")

    def make_model(self, dim: int) -> nn.Module:
        """A new model of these options for vectors of size `dim`; ValueError for one that does not exist."""
        return build_model(self.model, dim, residual=self.residual)

    def make_criterion(self, process_group: dist.ProcessGroup | None = None) -> FusedSeqLoss:
        """The loss of these options; over the ranks of a group, whose keys are each other's negatives."""
        return FusedSeqLoss(
            process_group=process_group,
            gather_negatives=process_group is not None and self.lambda_info > 0,
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
    """Learning rate of AdamW, at its highest."""
    schedule: Literal["plateau", "cosine"] = "plateau"
    """plateau: halve the learning rate after the third epoch in a row without a better validation cosine; cosine: down
    to 0 over all epochs along a half cosine."""
    warmup: int = 0
    """With schedule cosine: updates over which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    clip_norm: float = 1.0
    """Largest norm of the parameters' gradient; longer ones are scaled down."""
    accumulate: int = 1
    """Batches per update of the parameters."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Run the model in half precision (autocast; fp16 with gradient scaling). The loss computes in float32."""
    ema_decay: float = 0.0
    """Decay of a running mean of the weights, which is then validated and saved as best; 0: none."""
    compile: bool = False
    """Run the model through torch.compile."""
    patience: int = 6
    """Stop after this many epochs without a better validation cosine; 0 never stops early."""
    out: Path = Path("runs/train")
    """Folder for the run's files."""
    overwrite: bool = False
    """Replace an earlier run in that folder."""
    resume: bool = False
    """Go on with the run in that folder from its last checkpoint; start one if there is none."""
    checkpoint_every: int = 0
    """Also save a checkpoint every so many updates; 0: at the end of epochs only."""
    keep: int = 2
    """Checkpoints to keep, the newest ones."""
    tensorboard: bool = False
    """Also write the history for TensorBoard."""
    device: str = "cpu"
    """Torch device, for example cpu or cuda."""
    threads: int = 0
    """CPU threads of torch; 0 leaves its choice. Runs repeat exactly on a CPU with the same number of threads."""

    def __post_init__(self) -> None:
        """As in `LossConfig`."""
        super().__post_init__()
        self._check_least(epochs=1, patience=0, threads=0, warmup=0, accumulate=1, checkpoint_every=0, keep=1)
        if self.warmup and self.schedule != "cosine":
            raise ValueError(f"warmup needs schedule cosine, got {self.schedule}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite contradict each other")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be non-negative and finite, got {self.weight_decay}")

    def decisive(self) -> dict:
        """The options that decide the course of a training, without those that say where, how long and what else."""
        values = dataclasses.asdict(self)
        for name in (
            "out", "overwrite", "resume", "checkpoint_every", "keep", "tensorboard", "epochs", "patience", "threads",
        ):  # fmt: skip
            del values[name]
        if self.schedule == "cosine":
            values["epochs"] = self.epochs  # the learning rate depends on it
        return values | {"data": None if self.data is None else str(self.data.resolve())}

    def digest(self) -> str:
        """SHA-256 of `decisive`."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()
