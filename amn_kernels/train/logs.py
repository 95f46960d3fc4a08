"""What a training says while it runs: a bar with the time left, a line for each epoch, and TensorBoard's files."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

TENSORBOARD = "tensorboard"
# Seconds that the speed is averaged over: the pauses for validation are part of it.
SPEED_SECONDS = 600.0


@contextlib.contextmanager
def progress_bar(console: Console, epochs: int, batches: int) -> Iterator[Callable[[int, int], None]]:
    """A bar over all epochs, with the time left to the last one; yields what tells it the epoch and its batches done.

    On a terminal only: a log file would fill up with it.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns,
        TextColumn("left"),
        console=console,
        transient=True,
        speed_estimate_period=SPEED_SECONDS,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=epochs * batches, start=False)

    def show(epoch: int, done: int) -> None:
        completed = (epoch - 1) * batches + done
        if not bar.tasks[task].started:
            # What was done before a resume says nothing about the speed.
            bar.update(task, completed=completed)
            bar.start_task(task)
        bar.update(task, completed=completed, description=f"epoch {epoch}/{epochs}")

    with bar:
        yield show


def check_tensorboard() -> None:
    """ValueError if TensorBoard's package is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"tensorboard needs a package: in a checkout, pip install --no-build-isolation '.[tensorboard]' ({error})"
        ) from error


@contextlib.contextmanager
def tensorboard_log(out: Path, first_epoch: int) -> Iterator[Callable[[dict], None]]:
    """Yields what writes a history row into `out`/tensorboard; rows that are there from `first_epoch` on are replaced.

    Needs TensorBoard's package, see `check_tensorboard`.
    """
    # Here rather than at the top: TensorBoard's package is an extra.
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(out / TENSORBOARD, purge_step=first_epoch) as writer:

        def write(row: dict) -> None:
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, row["epoch"])
            writer.flush()

        yield write


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
