"""Evaluation of a trained run beside the untrained baselines, in and out of distribution."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from amn_kernels.data import Windows, load_windows, split_windows
from amn_kernels.train.baselines import Baselines, Predictor, fit_baselines
from amn_kernels.train.metrics import HITS, RetrievalTask
from amn_kernels.train.runs import load_run, write_atomically


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one set of windows: predictor name -> metric name -> value, as RetrievalTask.evaluate names them."""

    name: str
    windows: int
    metrics: dict[str, dict[str, float]]


def evaluate_run(
    run: Path,
    *,
    data: Path | None = None,
    split: Literal["validation", "test"] = "validation",
    ood: Path | None = None,
) -> tuple[Baselines, list[Evaluation]]:
    """Evaluates a run's best model as `compare` does, on the data it was trained on or another file.

    ood: a file in place of the bundled documentation, which is used if its D is the run's. Raises FileNotFoundError and
    ValueError for runs and files that can't be used, and for a D or T other than the run's.
    """
    config, dim, context, model = load_run(run)
    windows = load_windows(data or config.data, context)
    _check_fit(windows, dim, context)
    others = load_windows(ood, context, bundled="techdocs")
    if ood is not None:
        _check_fit(others, dim, context)
    return compare({run.resolve().name: model}, windows, split, others if others.dim == dim else None)


def compare(
    models: dict[str, Predictor], windows: Windows, split: Literal["validation", "test"], ood: Windows | None
) -> tuple[Baselines, list[Evaluation]]:
    """Evaluates models (in eval mode) and baselines on a split, and on all windows of `ood` if there is one.

    The baselines are fitted on the training windows, out of distribution too.
    """
    parts = split_windows(windows)
    baselines = fit_baselines(windows, parts.train)
    predictors = models | baselines.predictors()
    rows = parts.validation if split == "validation" else parts.test
    evaluations = [_evaluate(f"{windows.name}, {split}", RetrievalTask(windows, rows), predictors)]
    if ood is not None:
        task = RetrievalTask(ood, np.arange(len(ood)))
        evaluations.append(_evaluate(f"{ood.name}, out of distribution", task, predictors))
    return baselines, evaluations


def _evaluate(name: str, task: RetrievalTask, predictors: dict[str, Predictor]) -> Evaluation:
    metrics = {predictor: task.evaluate(function) for predictor, function in predictors.items()}
    return Evaluation(name, len(task.rows), metrics)


def _check_fit(windows: Windows, dim: int, context: int) -> None:
    if (windows.dim, windows.context) != (dim, context):
        raise ValueError(
            f"{windows.name}: windows of {windows.context} vectors of size {windows.dim}, "
            f"but the run was trained on {context} of size {dim}"
        )


def metrics_table(evaluation: Evaluation) -> Table:
    """An empty table for one set of windows, with the predictors' column; narrow enough for 80 characters."""
    table = Table(
        title=f"{evaluation.name}: {evaluation.windows:,} windows, as many candidates",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    table.add_column("predictor", no_wrap=True)
    return table


def print_evaluations(console: Console, baselines: Baselines, evaluations: list[Evaluation]) -> None:
    """One table for each set: predictors down, metrics across."""
    columns = [*(f"hit@{k}" for k in HITS), "mrr"]
    for evaluation in evaluations:
        table = metrics_table(evaluation)
        for heading in ("cosine", *columns, *(f"{column}\nexcl." for column in columns)):
            table.add_column(heading, justify="right")
        for name, metrics in evaluation.metrics.items():
            keys = ("cosine", *columns, *(f"excluded_{column}" for column in columns))
            table.add_row(name, *(f"{metrics[key]:.3f}" for key in keys))
        console.print(table)
    console.print(
        f"mean-last mix: {baselines.mean_coefficient:.3f} * mean of context + {baselines.last_coefficient:.3f} * last, "
        "least squares on the training windows. excl.: the window's own context vectors aren't candidates."
    )


def save_evaluations(path: Path, baselines: Baselines, evaluations: list[Evaluation]) -> None:
    """The same figures as JSON: {"mix": {"mean", "last"}, "evaluations": [{"name", "windows", "metrics"}]}."""
    content = {
        "mix": {"mean": baselines.mean_coefficient, "last": baselines.last_coefficient},
        "evaluations": [dataclasses.asdict(evaluation) for evaluation in evaluations],
    }
    write_atomically(path, json.dumps(content, indent=2) + "\n")
