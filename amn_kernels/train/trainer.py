"""The training loop."""

import math
import time
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from amn_kernels import FusedSeqLoss
from amn_kernels.data import Windows, load_windows, split_windows
from amn_kernels.train.config import TrainConfig
from amn_kernels.train.metrics import mean_cosine
from amn_kernels.train.models import build_model
from amn_kernels.train.runs import interrupts_deferred, prepare_folder, save_config, save_epoch

# Epochs without a better validation cosine before the learning rate is halved.
PLATEAU_EPOCHS = 2
# Reading the loss's statistics waits for the device; on a CPU it costs nothing.
STATS_EVERY_ON_CPU, STATS_EVERY_ELSEWHERE = 1, 10


def train(config: TrainConfig, console: Console) -> list[dict]:
    """Trains a model and leaves its files in `config.out`; returns the history, a dict for each epoch.

    A row has `epoch` (from 1), `lr`, `train_cosine` and `validation_cosine` (mean over windows in eval mode, on a fixed
    training subset of the validation's size and on the validation windows), `is_best`, `seconds`, and the epoch's means
    of the loss's statistics (`loss_mse`, `weight_mse`, `share_mse`, `gradient_cosine_mse_infonce`, ...). The validation
    cosine chooses the best epoch, lowers the learning rate and stops early. Ctrl-C raises KeyboardInterrupt and leaves
    the last whole epoch's files. Raises ValueError for bad data or options, FileExistsError for a folder in use, and
    FloatingPointError when training diverges.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = check_device(config.device)
    torch.manual_seed(config.seed)
    order = np.random.default_rng(config.seed)
    windows = load_windows(config.data, config.context)
    split = split_windows(windows)
    subset = np.sort(order.choice(split.train, size=min(len(split.train), len(split.validation)), replace=False))
    model = build_model(config.model, windows.dim).to(device)
    criterion = config.make_criterion().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=PLATEAU_EPOCHS)
    prepare_folder(config.out, config.overwrite)
    save_config(config.out, config, windows.dim, windows.context)
    console.print(
        f"{config.model} on {windows.name}: {len(split.train):,} training, {len(split.validation):,} validation and "
        f"{len(split.test):,} test windows of {windows.context} x {windows.dim}; files in {config.out}"
    )

    history: list[dict] = []
    best_epoch, best_cosine = 0, -math.inf
    try:
        for epoch in range(1, config.epochs + 1):
            began = time.perf_counter()
            lr = optimizer.param_groups[0]["lr"]
            batches = make_batches(order.permutation(split.train), config.batch_size)
            progress = track(
                batches,
                f"epoch {epoch}/{config.epochs}",
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
            stats = train_epoch(model, criterion, optimizer, windows, progress, config.clip_norm)
            model.eval()
            validation_cosine = mean_cosine(model, windows, split.validation, device)
            if not math.isfinite(validation_cosine):
                raise FloatingPointError(f"training diverged in epoch {epoch}: the validation cosine isn't finite")
            scheduler.step(validation_cosine)
            is_best = validation_cosine > best_cosine
            if is_best:
                best_epoch, best_cosine = epoch, validation_cosine
            row = {
                "epoch": epoch,
                "lr": lr,
                "train_cosine": mean_cosine(model, windows, subset, device),
                "validation_cosine": validation_cosine,
                "is_best": is_best,
                "seconds": round(time.perf_counter() - began, 3),
            }
            with interrupts_deferred():
                history.append(row | stats)
                save_epoch(config.out, model, criterion, history, is_best)
            console.print(epoch_line(history[-1], config.epochs))
            if config.patience and epoch - best_epoch >= config.patience:
                console.print(f"stopped early: no better validation cosine for {config.patience} epochs")
                break
    except KeyboardInterrupt:
        kept = f"the files of epoch {len(history)} are whole in {config.out}" if history else "no epoch was finished"
        console.print(f"interrupted: {kept}")
        raise
    console.print(f"best epoch {best_epoch}, validation cosine {best_cosine:.4f}")
    return history


def train_epoch(
    model: nn.Module,
    criterion: FusedSeqLoss,
    optimizer: torch.optim.Optimizer,
    windows: Windows,
    batches: Iterable[np.ndarray],
    clip_norm: float,
) -> dict[str, float]:
    """One pass over batches of window numbers [B]; returns the means of the loss's statistics."""
    device = next(model.parameters()).device
    stats_every = STATS_EVERY_ON_CPU if device.type == "cpu" else STATS_EVERY_ELSEWHERE
    stats = defaultdict(list)
    model.train()
    for step, rows in enumerate(batches):
        context, target = (tensor.to(device) for tensor in windows.batch(rows))
        loss = criterion(model(context), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        if step % stats_every == 0:
            for name, value in criterion.stats.as_dict().items():
                stats[name].append(value)
    return {name: mean_of_numbers(values) for name, values in stats.items()}


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
