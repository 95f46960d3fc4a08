"""The replay: every balance of losses trained for every architecture, and what became of it.

Every training leaves a JSON file of its figures in `results/`. A run whose file is there with the same options and data
is not trained again, so an interrupted replay goes on where it stopped, and a longer one adds to a shorter one. Where
only the windows out of distribution are others, the run is measured again.
"""

import dataclasses
import json
import os
import platform
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

import amn_kernels
from amn_kernels.data import load_windows
from amn_kernels.stats import DominanceWarning
from amn_kernels.train.bootstrap import cluster_name
from amn_kernels.train.comparison import SUFFIX, WRONG_LOADER, comparison_table, find_goals, summarise
from amn_kernels.train.config import TrainConfig
from amn_kernels.train.demo import GRADIENT, MSE_ONLY, RUNS, SETTINGS, DemoRun
from amn_kernels.train.evaluate import EvaluationSet, Figures, evaluation_sets, load_ood
from amn_kernels.train.models import AMN, MODELS, takes_residual
from amn_kernels.train.runs import load_history, load_run, without_nan, write_atomically
from amn_kernels.train.trainer import train

REPLAYED = [*RUNS, DemoRun("gradient 0.9/0.1", "gradient-90", {"lambda_mse": 0.9, "lambda_info": 0.1})]
# The runs that models which don't start from the mean of the context are trained with once more, added to that mean.
ON_THE_MEAN = (MSE_ONLY, GRADIENT)
RESULTS, REPORT = "results.json", "report.html"


@dataclass(frozen=True)
class Plan:
    """How long and how often a model is trained where the options leave it open, and what differs from SETTINGS."""

    epochs: int
    seeds: tuple[int, ...] = (0,)
    options: dict = field(default_factory=dict)


# Seconds an epoch on one core: AMN 3, LSTM 30, GRU 60, Transformer 200. The last two normalise after each block; they
# want smaller batches and a warm-up, and the deeper one smaller steps.
PLANS = {
    "amn": Plan(SETTINGS.epochs, seeds=(0, 1, 2)),
    "lstm": Plan(3),
    "gru": Plan(3, options={"batch_size": 64, "schedule": "cosine", "warmup": 100}),
    "transformer": Plan(4, options={"batch_size": 32, "lr": 2e-4, "schedule": "cosine", "warmup": 200}),
}
OTHER_PLAN = Plan(4)


@dataclass(frozen=True)
class ReplayConfig:
    """Options of `amn-kernels replay`; the texts under the fields are its help."""

    model: str = "amn"
    """Names of models with commas between them, or all."""
    seeds: str | None = None
    """Seeds, with commas; default: 0,1,2 for amn, 0 for the others."""
    epochs: int | None = None
    """Passes over the training windows in every run; default: 8 for amn, 3 for lstm and gru, 4 for transformer and
    models of your own."""
    data: Path | None = None
    """NPZ file as for train; default: the bundled verses."""
    ood: Path | None = None
    """NPZ file for the out-of-distribution figures; default: the bundled documentation, if it fits D and T."""
    out: Path = Path("runs/replay")
    """Folder for the runs, the figures and the report. What is done in it is kept and not trained again."""

    def models(self) -> list[str]:
        """The models' names; ValueError for an unknown one."""
        # Each once: a model that is named twice would count twice in its means.
        names = list(MODELS) if self.model == "all" else list(dict.fromkeys(self.model.split(",")))
        unknown = sorted(set(names) - set(MODELS))
        if unknown:
            raise ValueError(f"model must be all or names from {', '.join(MODELS)}, got {', '.join(unknown)}")
        return names

    def plan(self, model: str) -> Plan:
        """Epochs and seeds of a model; ValueError for options that aren't such numbers."""
        plan = PLANS.get(model, OTHER_PLAN)
        if self.seeds is None:
            seeds = plan.seeds
        elif all(part.strip().isdecimal() for part in self.seeds.split(",")):
            seeds = tuple(dict.fromkeys(int(part) for part in self.seeds.split(",")))
        else:
            raise ValueError(f"seeds must be numbers with commas between them, got {self.seeds!r}")
        return dataclasses.replace(plan, epochs=plan.epochs if self.epochs is None else self.epochs, seeds=seeds)


class AMNTwin(AMN):
    """AMN's parameters, name by name and shape by shape, in another forward: no baseline is added, nothing attended to.

    Weights of AMN load into it without a complaint from torch. Taken by itself, its cosine near 0 looks like mode
    collapse.
    """

    def forward(self, context: Tensor) -> Tensor:
        """context: [B, T, D] -> prediction [B, D]."""
        last = context[:, -1]
        return self.residual(torch.cat([last, last], dim=1))


def replay(config: ReplayConfig, console: Console) -> dict:
    """Trains what isn't there yet, prints the table and writes results.json and report.html; returns the results.

    ValueError for bad data or options. The results: `data`, `untrained` (set, predictor: figures) and `runs`, a list of
    what `run_result` returns.
    """
    # Here rather than at the top: only the report needs the template engine.
    from amn_kernels.train.report import write_report

    trainings = list(_trainings(config))
    windows = load_windows(config.data, SETTINGS.context)
    ood = load_ood(config.ood, windows.dim, windows.context)
    _, (inside, *others) = evaluation_sets(windows, "validation", ood)
    sets = {"inside": inside} | ({"outside": others[0]} if others else {})
    (config.out / "results").mkdir(parents=True, exist_ok=True)

    results = {
        "data": {
            key: {
                "name": of_windows.task.windows.name,
                "windows": len(of_windows.task.rows),
                cluster_name(of_windows.task.windows): of_windows.bootstrap.count,
            }
            for key, of_windows in sets.items()
        },
        "untrained": {
            key: {name: _plain(figures) for name, figures in of_windows.untrained.items()}
            for key, of_windows in sets.items()
        },
        "runs": [],
    }
    for number, (run, options) in enumerate(trainings, start=1):
        path = config.out / "results" / f"{'-'.join(options.out.relative_to(config.out).parts)}.json"
        done = _run(run, options, sets, path)
        results["runs"] += done
        for result in done:
            cosines = ", ".join(f"{result[key]['metrics']['cosine']:.3f} {key}" for key in sets)
            title = f"{result['model']}, {result['run']}, seed {result['seed']}"
            console.print(f"{number}/{len(trainings)}  {title}: cosine {cosines}")
        # An earlier replay's page would show other figures than these.
        (config.out / REPORT).unlink(missing_ok=True)
        write_atomically(config.out / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
    rows = summarise(results)
    console.print(comparison_table(rows))
    for goal in find_goals(rows):
        console.print(f"{'met' if goal.met else 'not met'}: {goal.model}: {goal.text}")
    write_report(config.out / REPORT, results, rows)
    console.print(f"report: {config.out / REPORT}, figures: {config.out / RESULTS}")
    return results


def _trainings(config: ReplayConfig) -> list[tuple[DemoRun, TrainConfig]]:
    """Run and options of every training, the quick models first."""
    trainings = []
    for model in config.models():
        plan = config.plan(model)
        for seed in plan.seeds:
            for run in REPLAYED:
                for residual in (False, True) if run.name in ON_THE_MEAN and takes_residual(model) else (False,):
                    options = {"model": model, "epochs": plan.epochs, "seed": seed, "residual": residual}
                    folder = f"{model}-on-mean" if residual else model
                    out = config.out / folder / run.folder / f"seed-{seed}"
                    settings = dataclasses.replace(SETTINGS, data=config.data, out=out, overwrite=True)
                    trainings.append((run, dataclasses.replace(settings, **options | plan.options | run.options)))
    # Added to the mean last, so that the runs of the plain models are there first.
    return sorted(trainings, key=lambda training: training[1].residual)


def _run(run: DemoRun, options: TrainConfig, sets: dict[str, EvaluationSet], path: Path) -> list[dict]:
    """The figures of a run: an earlier replay's if they are of the same options and data; else it is trained.

    Where only the windows out of distribution are others, what was trained is measured again. Figures without
    fingerprints may be of any windows, so they count as of others.
    """
    fingerprints = {key: of_windows.task.windows.fingerprint for key, of_windows in sets.items()}
    earlier, trained, measured = _read(path)
    if trained == _option_values(options) and measured.get("inside") == fingerprints["inside"]:
        if measured == fingerprints:
            return earlier
        if _is_there(options.out, earlier[0].get("history")):
            return _measure(run, options, sets, path, earlier[0].get("environment"))
    with warnings.catch_warnings():
        # Fixed weights are here to show just that.
        warnings.simplefilter("ignore", DominanceWarning)
        train(options, Console(quiet=True))
    return _measure(run, options, sets, path, environment())


def _measure(
    run: DemoRun, options: TrainConfig, sets: dict[str, EvaluationSet], path: Path, trained_in: dict[str, str] | None
) -> list[dict]:
    """Writes and returns the figures of a trained run, and of its weights in the wrong class where there is one.

    trained_in: its `environment`, None if unknown, which is written with them.
    """
    model, history = load_run(options.out).model, load_history(options.out)
    results = [run_result(run.name, options, model, history, sets)]
    if options.model == "amn" and run.name == MSE_ONLY:
        twin = AMNTwin(next(iter(sets.values())).task.windows.dim).eval()
        twin.load_state_dict(model.state_dict())
        results.append(run_result(WRONG_LOADER, options, twin, [], sets))
    results = [{**result, "environment": trained_in} for result in results]
    write_atomically(path, json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


def run_result(
    name: str, options: TrainConfig, model: nn.Module, history: list[dict], sets: dict[str, EvaluationSet]
) -> dict:
    """`model`, `run`, `seed`, `options`, `parameters`, `history`; `inside` and `outside`, the figures on each set.

    The figures have the `fingerprint` of the windows that they are of.
    """
    return {
        "model": options.model + (SUFFIX if options.residual else ""),
        "run": name,
        "seed": options.seed,
        "options": _option_values(options),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "history": without_nan(history),
        **{
            key: {"fingerprint": of_windows.task.windows.fingerprint} | _plain(of_windows.measure(model))
            for key, of_windows in sets.items()
        },
    }


def environment() -> dict[str, str]:
    """Versions and hardware that a run is trained with, as the report shows them."""
    return {
        "amn-kernels": amn_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": str(SETTINGS.threads),
    }


def _processor() -> str:
    """The processor's model where the system tells it, as Linux does."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _read(path: Path) -> tuple[list[dict], dict, dict]:
    """What an earlier replay left of a run: its figures, options, and the fingerprint of each set; or nothing."""
    if not path.is_file():
        return [], {}, {}
    try:
        results = json.loads(path.read_text())
        first = results[0]
        # An option that is newer than the file had what is its default now.
        options = _option_values(TrainConfig()) | first["options"]
        return results, options, {key: first[key].get("fingerprint") for key in ("inside", "outside") if key in first}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the figures of a run ({error}); remove it to train the run again") from error


def _is_there(out: Path, history: list[dict] | None) -> bool:
    """Whether the folder still holds the training of that history, whose seconds tell it from any other."""
    try:
        load_run(out)
        return load_history(out) == history
    except (OSError, ValueError):
        return False


def _option_values(options: TrainConfig) -> dict:
    """All that decides a training: the options without where its files go."""
    values = dataclasses.asdict(options)
    del values["out"], values["overwrite"]
    values["data"] = None if options.data is None else str(options.data.resolve())
    return values


def _plain(figures: Figures) -> dict:
    """Figures as JSON has them."""
    collapse = None if figures.collapse is None else dataclasses.asdict(figures.collapse)
    return without_nan({"metrics": figures.metrics, "intervals": figures.intervals, "collapse": collapse})
