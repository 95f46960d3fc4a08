"""The table of a replay: run, configuration, in and out of distribution, analysis.

The analysis is made of the figures alone: what is beaten, what a balance kept and gained, and what is wrong.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from amn_kernels.train.baselines import LAST, MEAN
from amn_kernels.train.demo import FIXED, GRADIENT, MSE_ONLY, mean_shares

WRONG_LOADER = "wrong loader"
# Of a model whose prediction is added to the mean of the context.
SUFFIX = " + mean"
# A run that keeps less than this part of the cosine of MSE only fell off the cliff.
CLIFF = 0.8
# What balance at 0.5/0.5 is to keep of the cosine of MSE only, and to reach of its hit@10.
KEPT, GAINED = 0.95, 1.2


@dataclass(frozen=True)
class SetSummary:
    """One run's figures on one set of windows over its seeds.

    metrics: means over the seeds; intervals: the means of the bounds; seeds: the cosine of every seed; collapse: the
    panel of the first seed; untrained_cosine: that of the mean of the context.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]
    seeds: tuple[float, ...]
    collapse: dict | None
    untrained_cosine: float

    def place(self) -> Literal["above", "below", "level with", "not known to differ from"]:
        """Where the cosine is beside that of the mean of the context: level where the interval of the skill holds 0."""
        interval = self.intervals["skill_mean"]
        if interval is None:
            return "not known to differ from"
        low, high = interval
        return "above" if low > 0 else "below" if high < 0 else "level with"

    def beside_the_mean(self) -> str:
        """The same in words, with both cosines."""
        cosines = f"{self.metrics['cosine']:.3f}, mean {self.untrained_cosine:.3f}"
        return f"{self.place()} the mean of the context ({cosines})"

    def findings(self) -> str:
        """What the collapse panel says where it isn't healthy, as a clause; else nothing."""
        if self.collapse is None or self.collapse["verdict"] == "healthy":
            return ""
        return f"{self.collapse['verdict']}: {self.collapse['words']}"


@dataclass(frozen=True)
class Row:
    """A line of the table: a model and a run over all its seeds."""

    model: str
    run: str
    configuration: str
    inside: SetSummary
    outside: SetSummary | None
    shares: dict[str, float]
    """Each term's part of the update, mean over epochs and seeds."""
    kept: float | None
    """Cosine over that of the same model's MSE only, in distribution; None where that isn't positive."""
    gained: float | None
    """hit@10 over that of the same model's MSE only; None where that is 0."""
    analysis: str


@dataclass(frozen=True)
class Goal:
    """Something a replay is to show, and whether it does."""

    model: str
    text: str
    met: bool


def summarise(results: dict) -> list[Row]:
    """Rows of the results of `replay`, in the order of their runs."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for run in results["runs"]:
        groups.setdefault((run["model"], run["run"]), []).append(run)
    rows = []
    for (model, name), runs in groups.items():
        inside, outside = (_summary(runs, key, results["untrained"]) for key in ("inside", "outside"))
        alone = _summary(groups.get((model, MSE_ONLY), []), "inside", results["untrained"])
        kept, gained = (
            None if alone is None or alone.metrics[metric] <= 0 else inside.metrics[metric] / alone.metrics[metric]
            for metric in ("cosine", "hit@10")
        )
        shares = [mean_shares(run["history"]) for run in runs if run["history"]]
        means = {term: float(np.mean([share[term] for share in shares])) for term in (shares[0] if shares else {})}
        analysis = _analyse(name, inside, outside, means, kept, gained)
        plain = _summary(groups.get((model.removesuffix(SUFFIX), name), []), "outside", results["untrained"])
        if model.endswith(SUFFIX) and plain and outside:
            analysis += f" Without the mean its model has {plain.metrics['cosine']:.3f} there."
        rows.append(Row(model, name, _configuration(runs), inside, outside, means, kept, gained, analysis))
    return rows


def find_goals(rows: list[Row]) -> list[Goal]:
    """For every model: does the fixed sum fall, does balance keep and gain, does MSE only beat the untrained mean."""
    goals = []
    for row in rows:
        if row.run == FIXED and row.kept is not None:
            text = f"{FIXED} falls off the cliff: keeps {row.kept:.1%} of the cosine of MSE only (under {CLIFF:.0%})"
            goals.append(Goal(row.model, text, row.kept < CLIFF))
        elif row.run == GRADIENT and row.kept is not None:
            text = f"{GRADIENT} keeps {row.kept:.1%} of the cosine of MSE only (at least {KEPT:.0%})"
            goals.append(Goal(row.model, text, row.kept >= KEPT))
            if row.gained is not None:
                text = f"{GRADIENT} has {row.gained:.2f} times the hit@10 of MSE only (at least {GAINED:g})"
                goals.append(Goal(row.model, text, row.gained >= GAINED))
        elif row.run == MSE_ONLY:
            text = f"{MSE_ONLY} is {row.inside.beside_the_mean()} in distribution"
            goals.append(Goal(row.model, text, row.inside.place() == "above"))
    return goals


def comparison_table(rows: list[Row]) -> Table:
    """Run, configuration, cosine in and out of distribution, analysis."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("run", "config"):
        table.add_column(heading)
    for heading in ("in-dist", "hit@10", "OOD"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("analysis", min_width=30)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            f"{row.model}\n{row.run}",
            row.configuration,
            f"{row.inside.metrics['cosine']:.3f}",
            f"{row.inside.metrics['hit@10']:.3f}",
            "" if row.outside is None else f"{row.outside.metrics['cosine']:.3f}",
            row.analysis,
            end_section=following is not None and following.model != row.model,
        )
    return table


def markdown_table(rows: list[Row], untrained: dict) -> str:
    """The same figures for a page, without the analysis; `untrained` as in the results of `replay`."""
    lines = [
        "| model | run | cosine | kept | hit@10 | gained | cosine, out of distribution |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        is_other = row.run not in (MSE_ONLY, WRONG_LOADER)
        cells = [
            row.model,
            row.run,
            f"{row.inside.metrics['cosine']:.3f}",
            f"{row.kept:.1%}" if is_other and row.kept is not None else "",
            f"{row.inside.metrics['hit@10']:.3f}",
            f"{row.gained:.2f}x" if is_other and row.gained is not None else "",
            "" if row.outside is None else f"{row.outside.metrics['cosine']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for name in (MEAN, LAST):
        inside, outside = (untrained.get(key, {}).get(name) for key in ("inside", "outside"))
        cosine, hit = (f"{inside['metrics'][metric]:.3f}" for metric in ("cosine", "hit@10"))
        beyond = "" if outside is None else f"{outside['metrics']['cosine']:.3f}"
        lines.append(f"| untrained | {name} | {cosine} | | {hit} | | {beyond} |")
    return "\n".join(lines) + "\n"


def _summary(runs: list[dict], key: str, untrained: dict) -> SetSummary | None:
    sets = [run[key] for run in runs if key in run]
    if not sets:
        return None
    bounds = {metric: [of_run["intervals"][metric] for of_run in sets] for metric in sets[0]["intervals"]}
    return SetSummary(
        metrics={metric: _mean([of_run["metrics"][metric] for of_run in sets]) for metric in sets[0]["metrics"]},
        intervals={
            metric: None if None in pairs else (_mean([low for low, _ in pairs]), _mean([high for _, high in pairs]))
            for metric, pairs in bounds.items()
        },
        seeds=tuple(of_run["metrics"]["cosine"] for of_run in sets),
        collapse=sets[0]["collapse"],
        untrained_cosine=untrained[key][MEAN]["metrics"]["cosine"],
    )


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def _configuration(runs: list[dict]) -> str:
    options = runs[0]["options"]
    if runs[0]["run"] == WRONG_LOADER:
        return f"weights of {MSE_ONLY}, {_seeds(runs)}"
    epochs = "1 epoch" if options["epochs"] == 1 else f"{options['epochs']} epochs"
    schedule = options["schedule"] + (f" after {options['warmup']} updates of warm-up" if options["warmup"] else "")
    return (
        f"{options['weighting']}, λ {options['lambda_mse']:g}/{options['lambda_info']:g}, {epochs}, "
        f"lr {options['lr']:g}, {schedule}, batch {options['batch_size']}, {_seeds(runs)}"
    )


def _seeds(runs: list[dict]) -> str:
    return ("seed " if len(runs) == 1 else "seeds ") + ", ".join(str(run["seed"]) for run in runs)


def _analyse(
    name: str,
    inside: SetSummary,
    outside: SetSummary | None,
    shares: dict[str, float],
    kept: float | None,
    gained: float | None,
) -> str:
    sentences = []
    if name == WRONG_LOADER:
        sentences.append("The weights fit every shape of another class, and torch loads them without a word")
    if len(shares) > 1:
        # Not 100% where MSE still has a trace.
        text = f"InfoNCE is {shares['infonce']:.{1 if shares['infonce'] < 0.999 else 2}%} of the update"
        if kept is not None:
            text += f"; keeps {kept:.1%} of the cosine of {MSE_ONLY}"
        if gained is not None:
            text += f" with {gained:.2f} times its hit@10"
        sentences.append(f"Off the cliff: {text}" if kept is not None and kept < CLIFF else text)
    sentences.append(f"In distribution {inside.beside_the_mean()}")
    if inside.findings():
        sentences.append(inside.findings())
    if outside is not None:
        sentences.append(f"Out of distribution {outside.beside_the_mean()}")
        if outside.findings():
            sentences.append(outside.findings())
    return ". ".join(sentence[0].upper() + sentence[1:] for sentence in sentences) + "."
