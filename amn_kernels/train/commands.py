"""The subcommands as tyro reads them: signatures give the flags, docstrings the help."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from amn_kernels import backends
from amn_kernels.train.config import TrainConfig
from amn_kernels.train.demo import DemoConfig
from amn_kernels.train.demo import demo as run_demo
from amn_kernels.train.evaluate import evaluate_run, print_evaluations, save_evaluations
from amn_kernels.train.trainer import train as run_training


def make_console() -> Console:
    """A console that prints paths as they are: no markup, no line breaks of its own inside text."""
    return Console(soft_wrap=True, markup=False, highlight=False)


def info() -> None:
    """Say which backends are available here, and why others aren't."""
    print(backends.info())


def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Train a next-vector predictor."""
    run_training(config, make_console())


def evaluate(
    run: Path,
    /,
    *,
    data: Path | None = None,
    split: Literal["validation", "test"] = "validation",
    ood: Path | None = None,
    json: Path | None = None,
) -> None:
    """Evaluate a trained run beside untrained baselines.

    Args:
        run: Folder of the run.
        data: Another NPZ file than the run was trained on.
        split: The part of the data to evaluate on.
        ood: NPZ file for the out-of-distribution figures; default: the bundled documentation, if its D is the run's.
        json: Also write the figures to this file.
    """
    if json is not None and not json.parent.is_dir():
        raise FileNotFoundError(f"{json}: there is no folder {json.parent}")
    baselines, evaluations = evaluate_run(run, data=data, split=split, ood=ood)
    print_evaluations(make_console(), baselines, evaluations)
    if json is not None:
        save_evaluations(json, baselines, evaluations)


def demo(config: Annotated[DemoConfig, tyro.conf.arg(name="")]) -> None:
    """Train AMN with MSE alone and with 0.5 MSE + 0.5 InfoNCE on the bundled vectors and compare; under 4 minutes."""
    run_demo(config, make_console())


def run(arguments: list[str]) -> None:
    """Parses the arguments after the program's name and runs the subcommand; SystemExit(2) for wrong usage."""
    commands = {"info": info, "train": train, "evaluate": evaluate, "demo": demo}
    tyro.extras.subcommand_cli_from_dict(
        commands, prog="amn-kernels", description="A fused loss for models that predict vectors.", args=arguments
    )
