"""The sweep: what InfoNCE buys in retrieval and costs in cosine, for every weighting, as a picture."""

import dataclasses
import json
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from amn_kernels.data import load_windows, split_windows
from amn_kernels.stats import DominanceWarning
from amn_kernels.train.auditing import audit_config
from amn_kernels.train.baselines import TRAIN_MEAN, fit_baselines
from amn_kernels.train.config import TrainConfig
from amn_kernels.train.demo import MSE_ONLY, SETTINGS, save_png
from amn_kernels.train.metrics import RetrievalTask
from amn_kernels.train.runs import load_run, prepare_folder, write_atomically
from amn_kernels.train.trainer import train

# Calibrated: fixed weights that the audit of the untrained model scaled once.
WEIGHTINGS = ("fixed", "calibrated", "value", "gradient")
PLOT, RESULTS = "frontier.png", "results.json"


@dataclass(frozen=True)
class SweepConfig:
    """Options of `amn-kernels sweep`; the texts under the fields are its help."""

    share: str = "0.05,0.1,0.25,0.5"
    """Weights of InfoNCE, with commas; MSE has the rest to 1."""
    seeds: str = "0"
    """Seeds, with commas."""
    epochs: int = SETTINGS.epochs
    """Passes over the training windows in every run."""
    data: Path | None = None
    """NPZ file as for train; default: the bundled verses."""
    out: Path = Path("runs/sweep")
    """Folder for the runs, the picture and the figures."""
    overwrite: bool = False
    """Replace an earlier sweep in that folder."""

    def shares(self) -> list[float]:
        """The shares as numbers; ValueError if they aren't between 0 and 1."""
        shares = _numbers("share", self.share, float)
        if not all(0 < share < 1 for share in shares):
            raise ValueError(f"share must be numbers between 0 and 1, got {self.share!r}")
        return shares

    def seed_numbers(self) -> list[int]:
        """The seeds as numbers."""
        return _numbers("seeds", self.seeds, int)


@dataclass(frozen=True)
class Point:
    """One trained run: what it was trained with, and its metrics on the validation windows at the best epoch."""

    weighting: str
    share: float
    seed: int
    lambda_mse: float
    lambda_info: float
    metrics: dict[str, float]


def sweep(config: SweepConfig, console: Console) -> list[Point]:
    """Trains every weighting at every share and seed, and MSE alone; writes picture and figures after every run.

    Each run has the demo's settings. Raises ValueError for bad options or data, FileExistsError for a folder in use.
    """
    shares = config.shares()
    settings = dataclasses.replace(SETTINGS, epochs=config.epochs, data=config.data)
    # All of them before the first training, so that none stops the sweep in the middle.
    seeded = [dataclasses.replace(settings, seed=seed) for seed in config.seed_numbers()]
    windows = load_windows(settings.data, settings.context)
    split = split_windows(windows)
    task = RetrievalTask(windows, split.validation)
    prepare_folder(config.out, config.overwrite, files=(PLOT, RESULTS))
    untrained = fit_baselines(windows, split.train).predictors()
    baselines = {name: task.evaluate(predictor) for name, predictor in untrained.items()}
    points = []
    runs = [(of_seed, weighting, share) for of_seed in seeded for weighting, share in _grid(shares)]
    for number, (of_seed, weighting, share) in enumerate(runs, start=1):
        run = run_config(of_seed, weighting, share)
        # All digits, as shares may differ in the last one only.
        share_digits = np.format_float_positional(share, trim="-")
        out = config.out / f"seed-{run.seed}" / f"{weighting.lower().replace(' ', '-')}-{share_digits}"
        with warnings.catch_warnings():
            # Fixed weights are here to show just that.
            warnings.simplefilter("ignore", DominanceWarning)
            train(dataclasses.replace(run, out=out, overwrite=config.overwrite), Console(quiet=True))
        metrics = task.evaluate(load_run(out).model)
        points.append(Point(weighting, share, run.seed, run.lambda_mse, run.lambda_info, metrics))
        console.print(
            f"{number}/{len(runs)}  {weighting:<10} share {share:<5g} seed {run.seed}  "
            f"cosine {metrics['cosine']:.3f}  hit@10 {metrics['hit@10']:.3f}"
        )
        save_points(config.out / RESULTS, points, baselines)
        plot_frontier(config.out / PLOT, points, baselines, windows.name)
    console.print(f"picture: {config.out / PLOT}, figures: {config.out / RESULTS}")
    return points


def run_config(settings: TrainConfig, weighting: str, share: float) -> TrainConfig:
    """`settings` with the weights of one of WEIGHTINGS, or of MSE_ONLY, at that share of InfoNCE."""
    config = dataclasses.replace(settings, lambda_mse=1 - share, lambda_info=share)
    if weighting not in (MSE_ONLY, "calibrated"):
        return dataclasses.replace(config, weighting=weighting)
    config = dataclasses.replace(config, weighting="fixed")
    if weighting == MSE_ONLY:
        return config
    calibrated = audit_config(config, probe_steps=0).calibrated
    return dataclasses.replace(config, lambda_mse=calibrated["mse"], lambda_info=calibrated["infonce"])


def save_points(path: Path, points: list[Point], baselines: dict[str, dict[str, float]]) -> None:
    """{"baselines": {name: metrics}, "points": [{"weighting", "share", "seed", "lambda_mse", ..., "metrics"}]}."""
    content = {"baselines": baselines, "points": [dataclasses.asdict(point) for point in points]}
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def plot_frontier(path: Path, points: list[Point], baselines: dict[str, dict[str, float]], title: str) -> None:
    """A PNG of hit@10 against cosine: a small marker for each run, lines through the means over seeds."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for color, weighting in enumerate((*WEIGHTINGS, MSE_ONLY)):
        by_share = defaultdict(list)
        for point in points:
            if point.weighting == weighting:
                by_share[point.share].append((point.metrics["cosine"], point.metrics["hit@10"]))
        if not by_share:
            continue
        runs = np.array([run for share in sorted(by_share) for run in by_share[share]])
        means = np.array([np.mean(by_share[share], axis=0) for share in sorted(by_share)])
        axes.plot(*runs.T, linestyle="", marker=".", markersize=5, alpha=0.6, color=f"C{color}")
        marker = "*" if weighting == MSE_ONLY else "o"
        # Dashed, because calibrated weights lie close to balanced ones.
        line = "--" if weighting == "calibrated" else "-"
        size = 10 if marker == "*" else 6
        axes.plot(*means.T, marker=marker, markersize=size, linestyle=line, color=f"C{color}", label=weighting)
        if weighting != MSE_ONLY:
            for share, mean in zip(sorted(by_share), means, strict=True):
                axes.annotate(f"{share:g}", mean, xytext=(4, 5), textcoords="offset points", fontsize=7)
    for marker, (name, metrics) in zip("x+1D", baselines.items(), strict=False):
        # Far off in both metrics; it would squeeze all others into a corner.
        if name != TRAIN_MEAN:
            at = (metrics["cosine"], metrics["hit@10"])
            axes.plot(*at, marker=marker, color="0.3", linestyle="", label=f"{name}, untrained")
    axes.set(xlabel="validation cosine", ylabel="validation hit@10", title=f"{title}: share of InfoNCE at each point")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    save_png(path, figure)


def _grid(shares: list[float]) -> list[tuple[str, float]]:
    return [(MSE_ONLY, 0.0)] + [(weighting, share) for share in shares for weighting in WEIGHTINGS]


def _numbers(option: str, text: str, kind: type) -> list:
    """Each number once, in the order of the first: a second run of it would find its folder in use."""
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between them, got {text!r}") from None
