"""The training loop."""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from amn_kernels import FusedSeqLoss
from amn_kernels.data import Windows, load_windows, split_windows
from amn_kernels.train.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from amn_kernels.train.config import TrainConfig
from amn_kernels.train.metrics import mean_cosine
from amn_kernels.train.runs import CHECKPOINTS, interrupts_deferred, prepare_folder, save_config, save_epoch

# Epochs without a better validation cosine before the learning rate is halved.
PLATEAU_EPOCHS = 2
# Reading the loss's statistics waits for the device; on a CPU it costs nothing.
STATS_EVERY_ON_CPU, STATS_EVERY_ELSEWHERE = 1, 10
# Contexts whose predictions are saved with the weights, to know the architecture by.
PROBES = 4
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Ranks:
    """The processes of one training, as torchrun starts them; one alone otherwise."""

    rank: int = 0
    size: int = 1

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Their group, for the loss."""
        return dist.group.WORLD if self.size > 1 else None

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This process's part of a batch."""
        return np.array_split(rows, self.size)[self.rank]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is up in any process."""
        if self.size == 1:
            return flag
        total = torch.tensor(float(flag), device=device)
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return bool(total)

    def gather(self, x: Tensor) -> list[Tensor]:
        """What every process has, in order."""
        if self.size == 1:
            return [x]
        parts: list = [None] * self.size
        dist.all_gather_object(parts, x)
        return parts


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
    progress: Progress = field(default_factory=Progress)

    @property
    def validated(self) -> nn.Module:
        """The model whose predictions count."""
        return self.model if self.mean is None else self.mean.module

    def state(self) -> dict:
        """For a checkpoint."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "criterion", "optimizer", "schedule")}
        on_cuda = self.device.type == "cuda"
        return {
            **parts,
            "scaler": self.scaler.state_dict(),
            "mean": None if self.mean is None else self.mean.state_dict(),
            "random": self.ranks.gather(torch.get_rng_state()),
            "cuda_random": self.ranks.gather(torch.cuda.get_rng_state(self.device)) if on_cuda else None,
            "progress": vars(self.progress),
            "config": self.config.decisive(),
            "digest": self.config.digest(),
        }

    def restore(self, state: dict) -> None:
        """Undo `state`; ValueError if it is of other options or another number of processes."""
        if state["digest"] != self.config.digest():
            here = self.config.decisive()
            differ = [name for name, value in state["config"].items() if here.get(name) != value]
            raise ValueError(
                "the run was started with other options: "
                + ", ".join(f"{name} {state['config'][name]!r}, now {here.get(name)!r}" for name in differ)
            )
        if len(state["random"]) != self.ranks.size:
            raise ValueError(f"the run was on {len(state['random'])} processes, now there are {self.ranks.size}")
        for name in ("model", "criterion", "optimizer", "schedule", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        if self.mean is not None:
            self.mean.load_state_dict(state["mean"])
        torch.set_rng_state(state["random"][self.ranks.rank])
        if state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"][self.ranks.rank], self.device)
        self.progress = Progress(**state["progress"])


def train(config: TrainConfig, console: Console) -> list[dict]:
    """Trains a model and leaves its files in `config.out`; returns the history, a dict for each epoch.

    A row has `epoch` (from 1), `lr`, `train_cosine` and `validation_cosine` (mean over windows in eval mode, on a fixed
    training subset of the validation's size and on the validation windows), `is_best`, `seconds`, and the epoch's means
    of the loss's statistics (`loss_mse`, `weight_mse`, `share_mse`, `gradient_cosine_mse_infonce`, ...). The validation
    cosine chooses the best epoch, lowers the learning rate and stops early. With `config.resume` a training goes on
    from its last checkpoint, on a CPU bit for bit as if it had not stopped. Under torchrun every process trains on its
    part of each batch, and the loss is that of the whole batch.

    Ctrl-C ends it after the update at hand with a checkpoint and raises KeyboardInterrupt. Raises ValueError for bad
    data or options, FileExistsError for a folder in use, and FloatingPointError when training diverges.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = check_device(config.device)
    with _ranks(device) as ranks:
        if ranks.rank > 0:
            console = Console(quiet=True)
        return _train(config, console, device, ranks)


def _train(config: TrainConfig, console: Console, device: torch.device, ranks: Ranks) -> list[dict]:
    torch.manual_seed(config.seed)
    order = np.random.default_rng(config.seed)
    windows = load_windows(config.data, config.context)
    split = split_windows(windows)
    subset = np.sort(order.choice(split.train, size=min(len(split.train), len(split.validation)), replace=False))
    probe = windows.batch(split.validation[:PROBES])[0]
    batches_per_epoch = len(make_batches(split.train, config.batch_size))
    training = make_training(config, windows, device, ranks, batches_per_epoch)
    if ranks.rank > 0:  # the same parameters everywhere, but not the same dropout
        torch.manual_seed(config.seed + ranks.rank)
    progress = training.progress
    checkpoint = newest_checkpoint(config.out / CHECKPOINTS) if config.resume else None
    if checkpoint is not None:
        try:
            training.restore(load_checkpoint(checkpoint))
        except ValueError as error:
            raise ValueError(f"{checkpoint} can't be resumed: {error}") from error
        progress = training.progress
        order.bit_generator.state = progress.order
        console.print(f"resumed from {checkpoint}: epoch {progress.epoch}, {progress.step:,} updates done")
    elif ranks.rank == 0:
        prepare_folder(config.out, config.overwrite)
    if ranks.rank == 0:
        save_config(config.out, config, windows.dim, windows.context)
    console.print(
        f"{config.model} on {windows.name}: {len(split.train):,} training, {len(split.validation):,} validation and "
        f"{len(split.test):,} test windows of {windows.context} x {windows.dim}; files in {config.out}"
    )
    log = _tensorboard(config, ranks)

    with interrupts_deferred() as interrupts:
        while progress.epoch <= config.epochs and not stopped_early(config, progress):
            began = time.perf_counter()
            if progress.batch == 0:
                progress.lr = training.optimizer.param_groups[0]["lr"]
            progress.order = order.bit_generator.state
            batches = make_batches(order.permutation(split.train), config.batch_size)
            bar = track(
                range(progress.batch, len(batches)),
                f"epoch {progress.epoch}/{config.epochs}",
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
            for step in train_epoch(training, batches, bar):
                due = config.checkpoint_every and step % config.checkpoint_every == 0
                stop = ranks.any(bool(interrupts), device)
                if due or stop:
                    save(training)
                if stop:
                    console.print(
                        f"interrupted in epoch {progress.epoch} after {progress.batch} of {len(batches)} batches; "
                        f"all is saved, --resume --out {config.out} goes on"
                    )
                    return progress.history
            training.validated.eval()
            validation_cosine = mean_cosine(training.validated, windows, split.validation, device)
            if not math.isfinite(validation_cosine):
                raise FloatingPointError(
                    f"training diverged in epoch {progress.epoch}: the validation cosine isn't finite"
                )
            if config.schedule == "plateau":
                training.schedule.step(validation_cosine)
            is_best = validation_cosine > progress.best_cosine
            if is_best:
                progress.best_epoch, progress.best_cosine = progress.epoch, validation_cosine
            row = {
                "epoch": progress.epoch,
                "lr": progress.lr,
                "train_cosine": mean_cosine(training.validated, windows, subset, device),
                "validation_cosine": validation_cosine,
                "is_best": is_best,
                "seconds": round(time.perf_counter() - began, 3),
            }
            progress.history.append(row | {name: mean_of_numbers(values) for name, values in progress.stats.items()})
            progress.epoch, progress.batch, progress.stats = progress.epoch + 1, 0, {}
            progress.order = order.bit_generator.state
            # The epoch's files first: a crash before the checkpoint is there repeats the epoch and writes them anew.
            if ranks.rank == 0:
                save_epoch(config.out, training.validated, probe, progress.history, is_best)
            save(training)
            last = progress.history[-1]
            console.print(epoch_line(last, config.epochs))
            for name, value in last.items() if log else ():
                log.add_scalar(name, value, last["epoch"])
            if interrupts:
                console.print(
                    f"interrupted after epoch {last['epoch']}; all is saved, --resume --out {config.out} goes on"
                )
                return progress.history
    if stopped_early(config, progress):
        console.print(f"stopped early: no better validation cosine for {config.patience} epochs")
    console.print(f"best epoch {progress.best_epoch}, validation cosine {progress.best_cosine:.4f}")
    return progress.history


def make_training(
    config: TrainConfig, windows: Windows, device: torch.device, ranks: Ranks, batches_per_epoch: int
) -> Training:
    """All parts of a new training; ValueError for a model that does not exist."""
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
        schedule=make_schedule(config, optimizer, config.epochs * math.ceil(batches_per_epoch / config.accumulate)),
        scaler=torch.amp.GradScaler(device.type, enabled=config.amp == "fp16"),
        mean=AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)) if config.ema_decay else None,
        running=DistributedDataParallel(running) if ranks.size > 1 else running,
    )


def make_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, updates: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate: by the validation cosine once an epoch, or by the number of updates."""
    if config.schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=PLATEAU_EPOCHS)

    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / (config.warmup + 1)
        done = (step - config.warmup) / max(1, updates - config.warmup)
        return (1 + math.cos(math.pi * min(1.0, done))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_epoch(training: Training, batches: list[np.ndarray], numbers: Iterator[int]) -> Iterator[int]:
    """Goes through the batches of those numbers, window numbers [B] each; yields the updates so far after each one.

    The loss's statistics are gathered in `training.progress`.
    """
    config, progress, device = training.config, training.progress, training.device
    stats_every = STATS_EVERY_ON_CPU if device.type == "cpu" else STATS_EVERY_ELSEWHERE
    dtype = AMP_DTYPES[config.amp]
    training.model.train()
    for number in numbers:
        is_update = (number + 1) % config.accumulate == 0 or number + 1 == len(batches)
        context, target = (x.to(device) for x in training.windows.batch(training.ranks.share(batches[number])))
        waits = training.ranks.size > 1 and not is_update
        with training.running.no_sync() if waits else contextlib.nullcontext():
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                pred = training.running(context)
            loss = training.criterion(pred, target)
            training.scaler.scale(loss / config.accumulate).backward()
        if number % stats_every == 0:
            for name, value in training.criterion.stats.as_dict().items():
                progress.stats.setdefault(name, []).append(value)
        progress.batch = number + 1
        if not is_update:
            continue
        training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(training.model.parameters(), config.clip_norm)
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.optimizer.zero_grad()
        if config.schedule == "cosine":
            training.schedule.step()
        if training.mean is not None:
            training.mean.update_parameters(training.model)
        progress.step += 1
        yield progress.step


def save(training: Training) -> None:
    """A checkpoint of the training as it is."""
    state = training.state()  # of all processes
    if training.ranks.rank == 0:
        save_checkpoint(training.config.out / CHECKPOINTS, training.progress.step, state, training.config.keep)


def stopped_early(config: TrainConfig, progress: Progress) -> bool:
    """Whether the validation cosine has not risen for `patience` epochs."""
    done = progress.epoch - 1
    return bool(config.patience and done and done - progress.best_epoch >= config.patience)


@contextlib.contextmanager
def _ranks(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started, connected while the block runs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _tensorboard(config: TrainConfig, ranks: Ranks):
    """A writer into the run's folder, or None; ValueError if the package is missing."""
    if not config.tensorboard or ranks.rank > 0:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"tensorboard needs the package tensorboard ({error})") from error
    return SummaryWriter(config.out / "tensorboard")


def mean_of_numbers(values: list[float]) -> float:
    """The mean without NaN, which a statistic is in a batch that does not define it; NaN if that is every one."""
    numbers = [value for value in values if not math.isnan(value)]
    return float(np.mean(numbers)) if numbers else math.nan


def check_device(name: str) -> torch.device:
    """The torch device of that name; ValueError if there is no such device here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # What torch raises depends on the device: unknown name, no driver, or a build without it.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} can't be used: {str(error).splitlines()[0]}") from error
    return device


def make_batches(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cuts rows into batches; a shorter last one is left out, since InfoNCE's level depends on the number of rows."""
    full = max(1, len(rows) // batch_size)
    return [rows[start : start + batch_size] for start in range(0, full * batch_size, batch_size)]


def epoch_line(row: dict, epochs: int) -> str:
    """A history row in words: terms as value x weight = contribution (share of the update), cosines, learning rate."""
    terms = [name.removeprefix("share_") for name in row if name.startswith("share_")]
    parts = [
        f"{term} {row[f'loss_{term}']:.4g} x {row[f'weight_{term}']:.3g} = {row[f'contribution_{term}']:.3g} "
        f"({row[f'share_{term}']:.1%})"
        for term in terms
    ]
    cosines = f"cosine train {row['train_cosine']:.4f} validation {row['validation_cosine']:.4f}"
    best = " best" if row["is_best"] else ""
    return f"epoch {row['epoch']:>2}/{epochs}  " + "  ".join([*parts, cosines, f"lr {row['lr']:.2g}"]) + best
