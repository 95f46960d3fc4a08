"""Evaluation of a trained run beside the untrained baselines, in and out of distribution."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from amn_kernels.data import Windows, load_bundled, load_windows, split_windows
from amn_kernels.train.baselines import LAST, MEAN, TRAIN_MEAN, Baselines, PredictFunction, fit_baselines
from amn_kernels.train.bootstrap import Bootstrap, cluster_name, cluster_numbers
from amn_kernels.train.collapse import HINTS, CollapseCheck, CollapsePanel
from amn_kernels.train.metrics import HITS, RetrievalTask
from amn_kernels.train.runs import CONFIG, load_run, without_nan, write_atomically

# Metric -> the untrained predictor whose distance 1 - cosine it is relative to.
SKILLS = {"skill_mean": MEAN, "skill_last": LAST, "skill_train_mean": TRAIN_MEAN}
REORDER_SEED = 0
# Below this a mean distance is rounding.
MIN_DISTANCE = 1e-12

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Evaluation:
    """Figures of one set of windows, by predictor's name.

    metrics: the means of `RetrievalTask.measure`, and `skill_mean`, `skill_last` and `skill_train_mean`: the part of an
    untrained predictor's mean distance 1 - cosine that this one removes, 1 - (1 - c) / (1 - c_untrained) (Murphy 1988);
    0 is level with it and below 0 worse. intervals: 95% of each by bootstrap over the `clusters`, articles or
    blocks of windows, None if there is only one. collapse: the collapse panel.
    """

    name: str
    windows: int
    clusters: int
    clustered_by: Literal["articles", "blocks"]
    metrics: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, Interval]]
    collapse: dict[str, CollapsePanel]


def evaluate_run(
    run: Path,
    *,
    data: Path | None = None,
    split: Literal["validation", "test"] = "validation",
    ood: Path | None = None,
) -> tuple[Baselines, list[Evaluation]]:
    """Evaluates a run's best model as `compare` does, on the data it was trained on or another file.

    Of another file the baselines and the subspace are those of that file's training windows, not of the run's.
    ood: as in `load_ood`. Raises FileNotFoundError and ValueError for runs and files that can't be used, for a D or T
    other than the run's, and without `data` for a file that changed since the training: its split may be another, with
    windows in it that were trained on.
    """
    trained = load_run(run)
    windows = load_windows(data or trained.config.data, trained.context)
    _check_fit(windows, trained.dim, trained.context)
    if data is None and trained.fingerprint is None:
        raise ValueError(f"{run / CONFIG}: it does not say which data it is of; name the file with --data")
    if data is None and windows.fingerprint != trained.fingerprint:
        raise ValueError(
            f"{windows.name}: not the vectors and articles that {run} was trained on (the fingerprint in {CONFIG} is "
            "another); name the file with --data to evaluate on it as on any other"
        )
    return compare({run.resolve().name: trained.model}, windows, split, load_ood(ood, trained.dim, trained.context))


def load_ood(path: Path | None, dim: int, context: int) -> Windows | None:
    """Windows for the out-of-distribution figures of a model that is trained with T = `context` and D = `dim`.

    Those of a file, with ValueError if they are of another T or D; without one the bundled documentation, or None where
    that can't serve: it has another D, or no page of T + 1 vectors.
    """
    if path is None:
        vectors, article = load_bundled("techdocs")
        if vectors.shape[1] != dim or np.unique(article, return_counts=True)[1].max() <= context:
            return None
    windows = load_windows(path, context, bundled="techdocs")
    _check_fit(windows, dim, context)
    return windows


class Figures(NamedTuple):
    """One predictor's figures on one set of windows, as in `Evaluation`; collapse is None for a single window."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]
    collapse: CollapsePanel | None


class EvaluationSet:
    """One set of windows with all that evaluations on it share: draws, ranking and the baselines' figures."""

    def __init__(self, name: str, task: RetrievalTask, baselines: Baselines) -> None:
        """Measures the baselines; `name` is what tables call the set."""
        self.name, self.task = name, task
        self.bootstrap = Bootstrap(cluster_numbers(task.windows, task.rows))
        predictors = baselines.predictors()
        self.check = None
        # A single window says nothing about how predictions differ.
        if len(task.rows) > 1:
            mean = task.predict(predictors[MEAN])
            # Windows less than T + 1 apart share vectors.
            independent = max(1, len(task.rows) // (task.windows.context + 1))
            self.check = CollapseCheck(task.targets, mean, independent, baselines.train_subspace)
        cosines = {
            skill: F.cosine_similarity(task.predict(predictors[name]), task.targets, dim=1).double().numpy()
            for skill, name in SKILLS.items()
        }
        self._cosines = {skill: float(cosine.mean()) for skill, cosine in cosines.items()}
        self._resampled_cosines = self.bootstrap.means(cosines)
        self.untrained = {name: self.measure(predictor) for name, predictor in predictors.items()}

    def measure(self, predictor: PredictFunction) -> Figures:
        """Figures of one predictor; a model must be in eval mode."""
        pred = self.task.predict(predictor)
        values = {metric: of_windows.numpy() for metric, of_windows in self.task.measure(pred).items()}
        means = {metric: float(of_windows.mean()) for metric, of_windows in values.items()}
        resampled = self.bootstrap.means(values)
        for skill in SKILLS:
            means[skill] = _skill(means["cosine"], self._cosines[skill])
            resampled[skill] = _skill(resampled["cosine"], self._resampled_cosines[skill])
        intervals = {metric: self.bootstrap.interval(figures) for metric, figures in resampled.items()}
        if self.check is None:
            return Figures(means, intervals, None)
        reordered = self.task.predict(predictor, reorder=np.random.default_rng(REORDER_SEED))
        return Figures(means, intervals, self.check.panel(pred, reordered))

    def evaluate(self, models: dict[str, PredictFunction]) -> Evaluation:
        """The models' figures and under them the baselines'."""
        figures = {name: self.measure(model) for name, model in models.items()} | self.untrained
        return Evaluation(
            name=self.name,
            windows=len(self.task.rows),
            clusters=self.bootstrap.count,
            clustered_by=cluster_name(self.task.windows),
            metrics={name: of_predictor.metrics for name, of_predictor in figures.items()},
            intervals={name: of_predictor.intervals for name, of_predictor in figures.items()},
            collapse={name: of_predictor.collapse for name, of_predictor in figures.items() if of_predictor.collapse},
        )


def evaluation_sets(
    windows: Windows, split: Literal["validation", "test"], ood: Windows | None
) -> tuple[Baselines, list[EvaluationSet]]:
    """The split of `windows`, and all windows of `ood` if there is one.

    The baselines, and the subspace of the training text, are fitted on the training windows, out of distribution too.
    """
    parts = split_windows(windows)
    baselines = fit_baselines(windows, parts.train)
    rows = parts.validation if split == "validation" else parts.test
    sets = [EvaluationSet(f"{windows.name}, {split}", RetrievalTask(windows, rows), baselines)]
    if ood is not None:
        task = RetrievalTask(ood, np.arange(len(ood)))
        sets.append(EvaluationSet(f"{ood.name}, out of distribution", task, baselines))
    return baselines, sets


def compare(
    models: dict[str, PredictFunction], windows: Windows, split: Literal["validation", "test"], ood: Windows | None
) -> tuple[Baselines, list[Evaluation]]:
    """Evaluates models (in eval mode) and baselines on the sets of `evaluation_sets`."""
    baselines, sets = evaluation_sets(windows, split, ood)
    return baselines, [of_windows.evaluate(models) for of_windows in sets]


def _skill(cosine: float | np.ndarray, untrained: float | np.ndarray) -> float | np.ndarray:
    # A predictor that is always right leaves nothing to remove.
    return 1 - (1 - cosine) / np.maximum(1 - untrained, MIN_DISTANCE)


def _check_fit(windows: Windows, dim: int, context: int) -> None:
    if (windows.dim, windows.context) != (dim, context):
        raise ValueError(
            f"{windows.name}: windows of {windows.context} vectors of size {windows.dim}, "
            f"but the model is trained on {context} of size {dim}"
        )


def metrics_table(evaluation: Evaluation) -> Table:
    """An empty table for one set of windows, with the predictors' column; narrow enough for 80 characters."""
    return _table(
        "predictor",
        title=f"{evaluation.name}: {evaluation.windows:,} windows and candidates, {evaluation.clusters:,} "
        f"{evaluation.clustered_by}",
        title_justify="left",
    )


def _table(first: str, **options) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0, **options)
    table.add_column(first, no_wrap=True)
    return table


def print_evaluations(console: Console, baselines: Baselines, evaluations: list[Evaluation]) -> None:
    """Three tables for each set, predictors down: accuracy and retrieval, skill with intervals, collapse."""
    columns = [*(f"hit@{k}" for k in HITS), "mrr"]
    for evaluation in evaluations:
        table = metrics_table(evaluation)
        for heading in ("cosine", *columns, *(f"{column}\nexcl." for column in columns)):
            table.add_column(heading, justify="right")
        for name, metrics in evaluation.metrics.items():
            keys = ("cosine", *columns, *(f"excluded_{column}" for column in columns))
            table.add_row(name, *(f"{metrics[key]:.3f}" for key in keys))
        console.print(table)
        console.print(_skill_table(evaluation))
        if evaluation.collapse:
            console.print(_collapse_table(evaluation))
            for name, panel in evaluation.collapse.items():
                if name not in baselines.predictors():
                    hint = f" ({HINTS[panel.verdict]})" if panel.verdict in HINTS else ""
                    console.print(f"{name}: {panel.verdict}: {panel.words}{hint}.")
            console.print()
    clusters = dict.fromkeys(evaluation.clustered_by for evaluation in evaluations)
    console.print(
        f"mean-last mix: {baselines.mean_coefficient:.3f} * mean of context + {baselines.last_coefficient:.3f} * last, "
        f"least squares on the training windows of {baselines.fitted_on}, as are the training mean and the subspace.\n"
        "excl.: the window's own context vectors aren't candidates. Ties count against the model; exact copies of "
        "the own target neither help nor hinder.\n"
        f"95%: bootstrap over {' or '.join(clusters)}. margin: cosine with the target minus that with the last "
        "context vector. skill: part of the untrained predictor's 1 - cosine that is removed; below 0 is worse than "
        "untrained.\n"
        "spread, rank: of the predictions relative to the targets'; std relative to 1/sqrt(D); order: 1 - cosine when "
        "the context is reordered; lift: cosine with the own target minus that with others'; subspace: energy in the "
        "directions that hold 90% of the training targets'."
    )


def _skill_table(evaluation: Evaluation) -> Table:
    table = _table("predictor")
    for heading in ("cosine 95%", "margin", "skill on\nmean", "95%", "on\nlast", "on train\nmean"):
        table.add_column(heading, justify="right")
    for name, metrics in evaluation.metrics.items():
        intervals = evaluation.intervals[name]
        table.add_row(
            name,
            interval_text(intervals["cosine"]),
            f"{metrics['margin']:.3f}",
            f"{metrics['skill_mean']:.3f}",
            interval_text(intervals["skill_mean"]),
            f"{metrics['skill_last']:.3f}",
            f"{metrics['skill_train_mean']:.3f}",
        )
    return table


def _collapse_table(evaluation: Evaluation) -> Table:
    table = _table("predictor")
    for heading in ("spread", "rank", "std", "order", "lift", "sub-\nspace", "verdict"):
        table.add_column(heading, justify="left" if heading == "verdict" else "right")
    for name, panel in evaluation.collapse.items():
        figures = (panel.spread, panel.rank, panel.pred.std, panel.order_sensitivity, panel.lift, panel.subspace)
        table.add_row(name, *(f"{figure:.3f}" for figure in figures), panel.verdict)
    # The targets are what the figures above are relative to.
    panel = next(iter(evaluation.collapse.values()))
    table.add_row("the targets", "1", "1", f"{panel.target.std:.3f}", "", "", f"{panel.target_subspace:.3f}", "")
    return table


def interval_text(interval: Interval) -> str:
    """low ... high, or a dash where one cluster gives none."""
    return "-" if interval is None else f"{interval[0]:.3f} ... {interval[1]:.3f}"


def save_evaluations(path: Path, baselines: Baselines, evaluations: list[Evaluation]) -> None:
    """The same figures as JSON; NaN is null.

    {"fitted_on", "mix": {"mean", "last"}, "evaluations": [the fields of Evaluation]}
    """
    content = {
        "fitted_on": baselines.fitted_on,
        "mix": {"mean": baselines.mean_coefficient, "last": baselines.last_coefficient},
        "evaluations": [dataclasses.asdict(evaluation) for evaluation in evaluations],
    }
    write_atomically(path, json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n")
