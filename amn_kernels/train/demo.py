"""The demo: how a fixed InfoNCE weight drowns MSE and a balanced one does not, on the bundled vectors in minutes."""

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console

from amn_kernels import FusedSeqLoss
from amn_kernels.audit import DROWNS
from amn_kernels.data import Windows, load_windows, split_windows
from amn_kernels.train.baselines import MEAN, PredictFunction
from amn_kernels.train.config import TrainConfig
from amn_kernels.train.evaluate import Evaluation, compare, metrics_table
from amn_kernels.train.runs import load_history, load_run, prepare_folder, write_atomically
from amn_kernels.train.trainer import train
from amn_kernels.train.training import make_batches

# Half a minute a run. One thread: two save seconds on an idle machine, but on a busy one they wait for each other for
# minutes. No early stopping, so that the plot shows whole curves.
SETTINGS = TrainConfig(epochs=8, batch_size=256, lr=1e-3, patience=0, threads=1)
PLOT, WEIGHTS_PLOT = "validation-cosine.png", "weights.png"
PROBE_BATCHES = 8
# Smaller differences are called level. Over 2,476 windows a difference of cosines has a standard error of about 0.001
# (the windows are the same) and a hit rate one of 0.008.
LEVEL = {"cosine": 0.003, "hit@10": 0.01}


@dataclass(frozen=True)
class DemoRun:
    """One training run of the demo: its row in the table, its folder, and what differs from SETTINGS."""

    name: str
    folder: str
    options: dict


MSE_ONLY, FIXED, GRADIENT = "MSE only", "fixed 0.5/0.5", "gradient 0.5/0.5"
RUNS = [
    DemoRun(MSE_ONLY, "mse", {"lambda_mse": 1.0, "weighting": "fixed"}),
    DemoRun(FIXED, "fixed", {"lambda_mse": 0.5, "lambda_info": 0.5, "weighting": "fixed"}),
    DemoRun(GRADIENT, "gradient", {"lambda_mse": 0.5, "lambda_info": 0.5, "weighting": "gradient"}),
]


@dataclass(frozen=True)
class Ratio:
    """InfoNCE over MSE, both unweighted: of the values, and of the norms of their gradients at the prediction."""

    value: float
    grad_norm: float


@dataclass(frozen=True)
class DemoConfig:
    """Options of `amn-kernels demo`."""

    out: Path = Path("runs/demo")
    """Folder for the runs and the plots."""
    overwrite: bool = False
    """Replace an earlier demo in that folder."""


def demo(config: DemoConfig, console: Console) -> str:
    """Trains RUNS, prints table and verdict, writes the plots; returns the verdict. FileExistsError as in `train`."""
    prepare_folder(config.out, config.overwrite, files=(PLOT, WEIGHTS_PLOT))
    models, ratios, histories = {}, {}, {}
    windows, ood = load_windows(SETTINGS.data), load_windows(bundled="techdocs")
    for run in RUNS:
        out = config.out / run.folder
        console.rule(run.name)
        train(dataclasses.replace(SETTINGS, out=out, overwrite=config.overwrite, **run.options), console)
        models[run.name] = load_run(out).model
        histories[run.name] = load_history(out)
        ratios[run.name] = probe_ratio(models[run.name], windows, split_windows(windows).validation)
    _, (inside, outside) = compare(models, windows, "validation", ood)
    console.rule("result")
    print_table(console, inside, outside, ratios)
    shares = {name: mean_shares(history) for name, history in histories.items()}
    text = verdict(inside, outside, ratios, shares)
    console.print(text)
    plot_cosines(config.out / PLOT, histories, inside.metrics[MEAN]["cosine"])
    plot_weights(config.out / WEIGHTS_PLOT, {run.name: histories[run.name] for run in RUNS if run.name != MSE_ONLY})
    console.print(f"curves: {config.out / PLOT}, weights and shares: {config.out / WEIGHTS_PLOT}")
    return text


def probe_ratio(model: PredictFunction, windows: Windows, rows: np.ndarray) -> Ratio:
    """Measures the ratios over a few shuffled batches of the windows `rows`, at a model in eval mode."""
    criterion = FusedSeqLoss(mse=1.0, infonce=1.0, weighting="fixed", temperature=SETTINGS.temperature)
    names = ("mse", "infonce")
    values, grad_norms = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    shuffled = np.random.default_rng(SETTINGS.seed).permutation(rows)
    for batch in make_batches(shuffled, SETTINGS.batch_size)[:PROBE_BATCHES]:
        context, target = windows.batch(batch)
        with torch.no_grad():
            pred = model(context)
        criterion(pred.requires_grad_(), target)
        for name in names:
            values[name] += criterion.stats.value[name].item()
            grad_norms[name] += criterion.stats.grad_norm[name].item()
    return Ratio(values["infonce"] / values["mse"], grad_norms["infonce"] / grad_norms["mse"])


def mean_shares(history: list[dict]) -> dict[str, float]:
    """Each term's share of the update, averaged over the epochs."""
    names = [name for name in history[0] if name.startswith("share_")]
    return {name.removeprefix("share_"): float(np.mean([row[name] for row in history])) for name in names}


def print_table(console: Console, inside: Evaluation, outside: Evaluation, ratios: dict[str, Ratio]) -> None:
    """Runs and baselines down; cosines, hit rates and the runs' term ratios across."""
    table = metrics_table(inside)
    for heading in ("cosine", "cosine\nOOD", "hit@10", "hit@10\nexcl.", "value\nratio", "gradient\nratio"):
        table.add_column(heading, justify="right")
    for name, metrics in inside.metrics.items():
        figures = (metrics["cosine"], outside.metrics[name]["cosine"], metrics["hit@10"], metrics["excluded_hit@10"])
        ratio = ratios.get(name)
        cells = (f"{ratio.value:,.0f}", f"{ratio.grad_norm:,.0f}") if ratio else ("", "")
        table.add_row(name, *(f"{figure:.3f}" for figure in figures), *cells, end_section=name == RUNS[-1].name)
    console.print(table)
    console.print(
        "OOD: Python documentation. excl.: the window's own context vectors aren't candidates. "
        "Ratios: InfoNCE over MSE, unweighted, at the trained model's prediction."
    )


def verdict(
    inside: Evaluation, outside: Evaluation, ratios: dict[str, Ratio], shares: dict[str, dict[str, float]]
) -> str:
    """Says in plain words what the figures show, a line for each run."""
    lines = []
    for run in RUNS:
        comparisons = [
            _compare_with_mean(inside, run.name, "cosine"),
            _compare_with_mean(inside, run.name, "hit@10"),
            _compare_with_mean(outside, run.name, "cosine") + " out of distribution",
        ]
        line = f"{run.name}, beside the untrained mean of the context: {', '.join(comparisons)}."
        options = dataclasses.replace(SETTINGS, **run.options)
        if options.lambda_mse and options.lambda_info:
            line += " " + (
                _pull_of_fixed_weights(run.name, options, inside, ratios[run.name])
                if options.weighting == "fixed"
                else _balance(run.name, inside, shares[run.name])
            )
        lines.append(line)
    return "\n".join(lines)


def _pull_of_fixed_weights(name: str, options: TrainConfig, inside: Evaluation, ratio: Ratio) -> str:
    pull = ratio.grad_norm * options.lambda_info / options.lambda_mse
    lost = inside.metrics[MEAN]["cosine"] - inside.metrics[name]["cosine"]
    text = f"InfoNCE pulled on its prediction {pull:,.0f} times as hard as MSE"
    if pull > DROWNS and lost > LEVEL["cosine"]:
        text += f": MSE was drowned, at the price of {lost:.3f} in cosine"
    elif pull > DROWNS:
        text += ", yet the cosine held"
    return text + "."


def _balance(name: str, inside: Evaluation, shares: dict[str, float]) -> str:
    """What the balanced run kept and gained beside MSE alone."""
    parts = []
    for metric, kept in (("cosine", "of the cosine"), ("hit@10", "of the hit@10")):
        value, alone = inside.metrics[name][metric], inside.metrics[MSE_ONLY][metric]
        # On few windows MSE alone may hit nothing, or point away from the targets; a ratio would mean nothing.
        figures = f"{value:.3f} against {alone:.3f}"
        parts.append(f"{value / alone:.1%} {kept} ({figures})" if alone > 0 else f"{metric} {figures}")
    mse, infonce = (f"{shares[term]:.0%}" for term in ("mse", "infonce"))
    return f"MSE had {mse} of the update and InfoNCE {infonce}; beside MSE only: {' and '.join(parts)}."


def _compare_with_mean(evaluation: Evaluation, name: str, metric: str) -> str:
    value, baseline = evaluation.metrics[name][metric], evaluation.metrics[MEAN][metric]
    difference = value - baseline
    place = "level" if abs(difference) < LEVEL[metric] else "higher" if difference > 0 else "lower"
    return f"{metric} {place} ({value:.3f} against {baseline:.3f})"


def plot_cosines(path: Path, histories: dict[str, list[dict]], baseline: float) -> None:
    """A PNG of the runs' validation cosine by epoch, with the mean of the context as a line."""
    # A bare figure draws with Agg, needs no display and touches no global state, unlike pyplot.
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, history in histories.items():
        axes.plot(
            [row["epoch"] for row in history], [row["validation_cosine"] for row in history], marker="o", label=name
        )
    axes.axhline(baseline, color="0.4", linestyle="--", label="mean of context, untrained")
    axes.set(xlabel="epoch", ylabel="validation cosine", title="AMN on the bundled verses", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_png(path, figure)


def plot_weights(path: Path, histories: dict[str, list[dict]]) -> None:
    """A PNG with a column for each run: every term's weight, and under it its share of the update, by epoch."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    grid = figure.subplots(2, len(histories), sharex=True, sharey="row", squeeze=False)
    for (weights, shares), (name, history) in zip(grid.T, histories.items(), strict=True):
        epochs = [row["epoch"] for row in history]
        for term in (key.removeprefix("share_") for key in history[0] if key.startswith("share_")):
            weights.plot(epochs, [row[f"weight_{term}"] for row in history], marker="o", label=term)
            shares.plot(epochs, [row[f"share_{term}"] for row in history], marker="o", label=term)
        weights.set(title=name, yscale="log")
        shares.set(xlabel="epoch", ylim=(-0.05, 1.05))
        shares.xaxis.get_major_locator().set_params(integer=True)
    grid[0, 0].set_ylabel("weight")
    grid[1, 0].set_ylabel("share of the update")
    grid[0, 0].legend(frameon=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    save_png(path, figure)


def save_png(path: Path, figure: Figure) -> None:
    """Writes a figure; through memory, so that an interruption never leaves half a picture."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(path, picture.getvalue())
