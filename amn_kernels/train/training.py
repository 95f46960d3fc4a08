"""What a training consists of, and how all of it goes into a checkpoint and comes back."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from amn_kernels import FusedSeqLoss
from amn_kernels.data import Split, Windows
from amn_kernels.train.checkpoints import check_probe, probe_tensors
from amn_kernels.train.config import TrainConfig
from amn_kernels.train.ranks import Ranks

# Epochs in a row without a better validation cosine that are let pass; the next halves the learning rate.
PLATEAU_EPOCHS = 2
# Contexts that a checkpoint's probe is of.
PROBES = 4


@dataclass
class Progress:
    """How far a training is; with the state of its parts all that it needs to go on."""

    epoch: int = 1
    batch: int = 0  # batches of the epoch that are done
    step: int = 0  # updates that are done
    lr: float = 0.0  # learning rate at the epoch's start
    best_epoch: int = 0
    best_cosine: float = -math.inf
    order: dict = field(default_factory=dict)  # state of the random numbers that the epoch's batches are drawn with
    stats: dict[str, list[float]] = field(default_factory=dict)  # of the epoch's batches
    history: list[dict] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        """The statistics' means over the epoch's batches."""
        return {name: mean_of_numbers(values) for name, values in self.stats.items()}


@dataclass
class Training:
    """What is trained, and what trains it."""

    config: TrainConfig
    windows: Windows
    device: torch.device
    ranks: Ranks
    model: nn.Module
    criterion: FusedSeqLoss
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    mean: AveragedModel | None  # of the weights, with ema_decay
    running: nn.Module  # the model as it is called: compiled, in DistributedDataParallel
    probe: Tensor  # contexts [P, T, D] whose predictions are saved with the weights, to know the architecture by
    progress: Progress = field(default_factory=Progress)

    @property
    def validated(self) -> nn.Module:
        """The model whose predictions count."""
        return self.model if self.mean is None else self.mean.module

    def state(self) -> dict:
        """For a checkpoint; parts are of every process, so each has to call this."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "criterion", "optimizer", "schedule")}
        on_cuda = self.device.type == "cuda"
        return {
            **parts,
            "scaler": self.scaler.state_dict(),
            "mean": None if self.mean is None else self.mean.state_dict(),
            "random": self.ranks.gather(torch.get_rng_state()),
            "cuda_random": self.ranks.gather(torch.cuda.get_rng_state(self.device)) if on_cuda else None,
            "progress": vars(self.progress),
            "probe": probe_tensors(self.model, self.probe),
            "config": self.config.decisive(),
            "digest": self.config.digest(),
            "data": {"windows": len(self.windows), "fingerprint": self.windows.fingerprint},
        }

    def restore(self, state: dict) -> None:
        """Undo `state`; ValueError if it is of other options or data, another number of processes or architecture."""
        if state["digest"] != self.config.digest():
            here = self.config.decisive()
            differ = [name for name, value in state["config"].items() if here.get(name) != value]
            raise ValueError(
                "the run was started with other options: "
                + ", ".join(f"{name} {state['config'][name]!r}, now {here.get(name)!r}" for name in differ)
            )
        if "data" not in state:
            raise ValueError("it does not say which data it is of, as those of this version do; start the run again")
        if state["data"]["fingerprint"] != self.windows.fingerprint:
            raise ValueError(
                f"the run was started with other data: {self.windows.name} had {state['data']['windows']:,} windows, "
                f"now it has {len(self.windows):,}, and not the same vectors or articles"
            )
        if len(state["random"]) != self.ranks.size:
            raise ValueError(f"the run was on {len(state['random'])} processes, now there are {self.ranks.size}")
        check_probe("its model", self.model, state["model"] | state["probe"])
        for name in ("criterion", "optimizer", "schedule", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        if self.mean is not None:
            self.mean.load_state_dict(state["mean"])
        torch.set_rng_state(state["random"][self.ranks.rank])
        if state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"][self.ranks.rank], self.device)
        self.progress = Progress(**state["progress"])


def make_training(config: TrainConfig, windows: Windows, split: Split, device: torch.device, ranks: Ranks) -> Training:
    """All parts of a new training; ValueError for a model that does not exist."""
    updates_per_epoch = math.ceil(len(make_batches(split.train, config.batch_size)) / config.accumulate)
    model = config.make_model(windows.dim).to(device)
    criterion = config.make_criterion(ranks.group).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    running = torch.compile(model) if config.compile else model
    return Training(
        config=config,
        windows=windows,
        device=device,
        ranks=ranks,
        model=model,
        criterion=criterion,
        optimizer=optimizer,
        schedule=make_schedule(config, optimizer, config.epochs * updates_per_epoch),
        scaler=torch.amp.GradScaler(device.type, enabled=config.amp == "fp16"),
        mean=AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)) if config.ema_decay else None,
        running=DistributedDataParallel(running) if ranks.size > 1 else running,
        probe=windows.batch(split.validation[:PROBES])[0],
    )


def make_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, updates: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate: by the validation cosine once an epoch, or by the number of updates."""
    if config.schedule == "plateau":
        # Without the threshold, any cosine above the best one is better, as it is for the best epoch.
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, "max", factor=0.5, patience=PLATEAU_EPOCHS, threshold=0.0
        )

    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / (config.warmup + 1)
        done = (step - config.warmup) / max(1, updates - config.warmup)
        return (1 + math.cos(math.pi * min(1.0, done))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def make_batches(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cuts rows into batches; a shorter last one is left out, since InfoNCE's level depends on the number of rows."""
    full = max(1, len(rows) // batch_size)
    return [rows[start : start + batch_size] for start in range(0, full * batch_size, batch_size)]


def mean_of_numbers(values: list[float]) -> float:
    """The mean without NaN, which a statistic is in a batch that does not define it; NaN if that is every one."""
    numbers = [value for value in values if not math.isnan(value)]
    return float(np.mean(numbers)) if numbers else math.nan
