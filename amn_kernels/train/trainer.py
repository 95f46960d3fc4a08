"""The training loop."""

import contextlib
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from rich.console import Console
from torch import nn

from amn_kernels.data import Split, load_windows, split_windows
from amn_kernels.train.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from amn_kernels.train.config import TrainConfig
from amn_kernels.train.logs import check_tensorboard, epoch_line, progress_bar, tensorboard_log
from amn_kernels.train.metrics import mean_cosine
from amn_kernels.train.ranks import Ranks, connected_ranks, own_device
from amn_kernels.train.runs import (
    BEST,
    CHECKPOINTS,
    interrupts_deferred,
    prepare_folder,
    remove_litter,
    save_config,
    save_epoch,
)
from amn_kernels.train.training import Progress, Training, make_batches, make_training

# Reading the loss's statistics waits for the device; on a CPU it costs nothing.
STATS_EVERY_ON_CPU, STATS_EVERY_ELSEWHERE = 1, 10
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(config: TrainConfig, console: Console) -> list[dict]:
    """Trains a model and leaves its files in `config.out`; returns the history, a dict for each epoch.

    A row has `epoch` (from 1), `lr`, `train_cosine` and `validation_cosine` (mean over windows in eval mode, on a fixed
    training subset of the validation's size and on the validation windows), `is_best`, `seconds`, and the epoch's means
    of the loss's statistics (`loss_mse`, `weight_mse`, `share_mse`, `gradient_cosine_mse_infonce`, ...). The validation
    cosine chooses the best epoch, lowers the learning rate and stops early. With `config.resume` a training goes on
    from its last checkpoint, on a CPU and in one process or two bit for bit as if it had not stopped. Under torchrun
    every process trains on its part of each batch, and the loss is that of the whole batch.

    Ctrl-C ends it after the update at hand with a checkpoint and raises KeyboardInterrupt. Raises ValueError for bad
    data or options, FileExistsError for a folder in use, FileNotFoundError for one whose best weights are gone, and
    FloatingPointError when training diverges.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = check_device(config.device)
    # Before an earlier run makes room for this one.
    if config.tensorboard:
        check_tensorboard()
    with connected_ranks(device) as ranks:
        if ranks.rank > 0:
            console = Console(quiet=True)
        return _train(config, console, device, ranks)


def _train(config: TrainConfig, console: Console, device: torch.device, ranks: Ranks) -> list[dict]:
    torch.manual_seed(config.seed)
    order = np.random.default_rng(config.seed)
    windows = load_windows(config.data, config.context)
    split = split_windows(windows)
    rows = min(config.batch_size, len(split.train))
    if ranks.size > rows:
        raise ValueError(f"a batch must have a window for each of the {ranks.size} processes, it has {rows}")
    subset = np.sort(order.choice(split.train, size=min(len(split.train), len(split.validation)), replace=False))
    training = make_training(config, windows, split, device, ranks)
    if ranks.rank > 0:  # the same parameters everywhere, but not the same dropout
        torch.manual_seed(config.seed + ranks.rank)
    checkpoint = newest_checkpoint(config.out / CHECKPOINTS) if config.resume else None
    names = ranks.gather(checkpoint and checkpoint.name)
    if len(set(names)) > 1:
        raise ValueError(f"the processes must see the same files in {config.out}, their newest checkpoints are {names}")
    if checkpoint is not None:
        try:
            training.restore(load_checkpoint(checkpoint))
        except ValueError as error:
            raise ValueError(f"{checkpoint} can't be resumed: {error}") from error
        best = config.out / BEST
        if training.progress.best_epoch and not best.is_file():
            raise FileNotFoundError(
                f"{best}: no such file; {checkpoint} can't be resumed without the weights of the best epoch, "
                f"{training.progress.best_epoch}, which no other file has"
            )
        order.bit_generator.state = training.progress.order
        done = f"epoch {training.progress.epoch}, {training.progress.step:,} updates done"
        console.print(f"resumed from {checkpoint}: {done}")
    elif ranks.rank == 0:
        prepare_folder(config.out, config.overwrite, config.resume)
    if ranks.rank == 0:
        remove_litter(config.out)
        save_config(config.out, config, windows)
    console.print(
        f"{config.model} on {windows.name}: {len(split.train):,} training, {len(split.validation):,} validation and "
        f"{len(split.test):,} test windows of {windows.context} x {windows.dim}; files in {config.out}"
    )

    progress = training.progress
    batch_count = len(make_batches(split.train, config.batch_size))
    with contextlib.ExitStack() as stack:
        log = None
        if config.tensorboard and ranks.rank == 0:
            log = stack.enter_context(tensorboard_log(config.out, progress.epoch))
        interrupts = stack.enter_context(interrupts_deferred())
        show = stack.enter_context(progress_bar(console, config.epochs, batch_count))
        while progress.epoch <= config.epochs and not stopped_early(config, progress):
            began = time.perf_counter()
            if progress.batch == 0:
                progress.lr = training.optimizer.param_groups[0]["lr"]
            progress.order = order.bit_generator.state
            batches = make_batches(order.permutation(split.train), config.batch_size)
            show(progress.epoch, progress.batch)
            for step in train_epoch(training, batches):
                show(progress.epoch, progress.batch)
                due = config.checkpoint_every and step % config.checkpoint_every == 0
                stop = ranks.any(bool(interrupts), device)
                if due or stop:
                    save(training)
                if stop:
                    place = f"in epoch {progress.epoch} after {progress.batch} of {batch_count} batches"
                    console.print(_how_to_go_on(config, place))
                    return progress.history
            row = validate(training, split, subset)
            progress.history.append({**row, "seconds": round(time.perf_counter() - began, 3), **progress.means()})
            progress.epoch, progress.batch, progress.stats = progress.epoch + 1, 0, {}
            progress.order = order.bit_generator.state
            # The epoch's files first: a crash before the checkpoint is there repeats the epoch and writes them anew.
            if ranks.rank == 0:
                save_epoch(config.out, training.validated, training.probe, progress.history, row["is_best"])
            if log is not None:
                log(progress.history[-1])
            save(training)
            console.print(epoch_line(progress.history[-1], config.epochs))
            if ranks.any(bool(interrupts), device):
                console.print(_how_to_go_on(config, f"after epoch {row['epoch']}"))
                return progress.history
    if stopped_early(config, progress):
        console.print(f"stopped early: no better validation cosine for {config.patience} epochs")
    console.print(f"best epoch {progress.best_epoch}, validation cosine {progress.best_cosine:.4f}")
    return progress.history


def train_epoch(training: Training, batches: list[np.ndarray]) -> Iterator[int]:
    """Goes through the batches, window numbers [B] each, that the epoch has not done; yields the updates so far.

    The loss's statistics are gathered in `training.progress`. The last update of an epoch may be of fewer batches.
    """
    config, progress, device = training.config, training.progress, training.device
    stats_every = STATS_EVERY_ON_CPU if device.type == "cpu" else STATS_EVERY_ELSEWHERE
    dtype = AMP_DTYPES[config.amp]
    training.model.train()
    for number in range(progress.batch, len(batches)):
        first = number - number % config.accumulate
        together = min(config.accumulate, len(batches) - first)
        is_update = number + 1 == first + together
        context, target = (x.to(device) for x in training.windows.batch(training.ranks.share(batches[number])))
        waits = training.ranks.size > 1 and not is_update
        with training.running.no_sync() if waits else contextlib.nullcontext():
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                pred = training.running(context)
            loss = training.criterion(pred, target)
            training.scaler.scale(loss / together).backward()
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


def validate(training: Training, split: Split, subset: np.ndarray) -> dict:
    """The epoch's cosines on the validation windows and on the training windows `subset`; takes note of the best.

    FloatingPointError if they aren't finite.
    """
    progress, model = training.progress, training.validated.eval()
    validation_cosine = mean_cosine(model, training.windows, split.validation, training.device)
    if not math.isfinite(validation_cosine):
        raise FloatingPointError(f"training diverged in epoch {progress.epoch}: the validation cosine isn't finite")
    if training.config.schedule == "plateau":
        training.schedule.step(validation_cosine)
    is_best = validation_cosine > progress.best_cosine
    if is_best:
        progress.best_epoch, progress.best_cosine = progress.epoch, validation_cosine
    return {
        "epoch": progress.epoch,
        "lr": progress.lr,
        "train_cosine": mean_cosine(model, training.windows, subset, training.device),
        "validation_cosine": validation_cosine,
        "is_best": is_best,
    }


def save(training: Training) -> None:
    """A checkpoint of the training as it is; FloatingPointError in all processes if its predictions aren't finite."""
    state = training.state()  # of all processes
    # It would push out the last good checkpoint.
    if training.ranks.any(not state["probe"]["probe.prediction"].isfinite().all(), training.device):
        # Between epochs the next one has begun.
        epoch = training.progress.epoch - (training.progress.batch == 0)
        raise FloatingPointError(f"training diverged in epoch {epoch}: its predictions aren't finite")
    if training.ranks.rank == 0:
        save_checkpoint(training.config.out / CHECKPOINTS, training.progress.step, state, training.config.keep)


def stopped_early(config: TrainConfig, progress: Progress) -> bool:
    """Whether the validation cosine has not risen for `patience` epochs."""
    done = progress.epoch - 1
    return bool(config.patience and done and done - progress.best_epoch >= config.patience)


def check_device(name: str) -> torch.device:
    """The torch device of that name, as `own_device` gives it; ValueError if there is no such device here."""
    try:
        device = own_device(torch.device(name))
        torch.empty(0, device=device)
    # What torch raises depends on the device: unknown name, no driver, or a build without it.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} can't be used: {str(error).splitlines()[0]}") from error
    return device


def _how_to_go_on(config: TrainConfig, place: str) -> str:
    return f"interrupted {place}; all is saved, --resume --out {config.out} goes on"
