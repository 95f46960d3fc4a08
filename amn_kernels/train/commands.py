"""The subcommands as tyro reads them: signatures give the flags, docstrings the help."""

import sys
import warnings
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from amn_kernels import backends
from amn_kernels.train.auditing import AuditConfig, audit_config
from amn_kernels.train.config import TrainConfig
from amn_kernels.train.demo import DemoConfig
from amn_kernels.train.demo import demo as run_demo
from amn_kernels.train.embed import EmbedConfig
from amn_kernels.train.embed import embed as embed_texts
from amn_kernels.train.evaluate import evaluate_run, print_evaluations, save_evaluations
from amn_kernels.train.replay import ReplayConfig
from amn_kernels.train.replay import replay as run_replay
from amn_kernels.train.runs import write_atomically
from amn_kernels.train.sweep import SweepConfig
from amn_kernels.train.sweep import sweep as run_sweep
from amn_kernels.train.toml import expand_config
from amn_kernels.train.trainer import train as run_training

# Commands whose options are a dataclass, which `--config FILE` can give.
CONFIGS = {
    "train": TrainConfig, "audit": AuditConfig, "demo": DemoConfig, "sweep": SweepConfig, "replay": ReplayConfig,
}  # fmt: skip


def make_console() -> Console:
    """A console that prints paths as they are: no markup, no line breaks of its own inside text."""
    return Console(soft_wrap=True, markup=False, highlight=False)


def info() -> None:
    """Say which backends are available here, and why others aren't."""
    print(backends.info())


def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Train a next-vector predictor. `--config FILE` reads options from a TOML file; flags override it."""
    run_training(config, make_console())


def audit(config: Annotated[AuditConfig, tyro.conf.arg(name="")]) -> int:
    """Say before a training which term of the loss would take it over; changes nothing."""
    if config.json is not None:
        _check_parent(config.json)
    report = audit_config(config, config.probe_steps)
    make_console().print(report)
    if config.json is not None:
        write_atomically(config.json, dumps(report.as_dict(), indent=2) + "\n")
    return int(config.strict and report.dominated)


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
        data: Another NPZ file than the run was trained on; untrained baselines are then fitted to its training part.
        split: The part of the data to evaluate on.
        ood: NPZ file for the out-of-distribution figures; default: the bundled documentation, if it fits D and T.
        json: Also write the figures to this file.
    """
    if json is not None:
        _check_parent(json)
    baselines, evaluations = evaluate_run(run, data=data, split=split, ood=ood)
    print_evaluations(make_console(), baselines, evaluations)
    if json is not None:
        save_evaluations(json, baselines, evaluations)


def demo(config: Annotated[DemoConfig, tyro.conf.arg(name="")]) -> None:
    """Train AMN on the bundled vectors with MSE, with fixed and with balanced InfoNCE; under 4 minutes."""
    run_demo(config, make_console())


def sweep(config: Annotated[SweepConfig, tyro.conf.arg(name="")]) -> None:
    """Draw what InfoNCE buys and costs: hit@10 against cosine for each weighting over its share of the loss."""
    run_sweep(config, make_console())


def replay(config: Annotated[ReplayConfig, tyro.conf.arg(name="")]) -> None:
    """Train every model with every balance of losses; table and HTML report. Goes on where it stopped."""
    run_replay(config, make_console())


def embed(config: Annotated[EmbedConfig, tyro.conf.arg(name="")]) -> None:
    """Make a dataset of text files: one vector for each paragraph. Goes on where it was interrupted."""
    embed_texts(config, make_console())


def run(arguments: list[str]) -> int:
    """Parses the arguments after the program's name and runs the subcommand; returns its exit code.

    SystemExit(2) for wrong usage.
    """
    if arguments and arguments[0] in CONFIGS:
        arguments = [arguments[0], *expand_config(arguments[1:], CONFIGS[arguments[0]])]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        code = tyro.extras.subcommand_cli_from_dict(
            {
                "info": info,
                "train": train,
                "evaluate": evaluate,
                "audit": audit,
                "demo": demo,
                "sweep": sweep,
                "embed": embed,
                "replay": replay,
            },
            prog="amn-kernels",
            description="A fused loss for models that predict vectors.",
            args=arguments,
        )
    return code or 0


def _show_warning(message: Warning | str, *_: object) -> None:
    # One line for people, without the source line that it came from.
    print(f"amn-kernels: warning: {message}", file=sys.stderr)


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
