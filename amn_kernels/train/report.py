"""The replay's report: one HTML file with everything in it, charts as inline SVG, readable without a network."""

import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from amn_kernels.train.baselines import MEAN, TRAIN_MEAN
from amn_kernels.train.collapse import COLLAPSED, UNCORRELATED, WEAK
from amn_kernels.train.comparison import WRONG_LOADER, Row, find_goals
from amn_kernels.train.demo import FIXED, GRADIENT, MSE_ONLY
from amn_kernels.train.runs import write_atomically

TEMPLATE = "report.html.jinja"
SET_TITLES = {"inside": "In distribution", "outside": "Out of distribution"}
# Colours that the colour-blind tell apart (Okabe & Ito 2008).
COLORS = {
    MSE_ONLY: "#0072B2",
    FIXED: "#D55E00",
    GRADIENT: "#009E73",
    "gradient 0.9/0.1": "#CC79A7",
    WRONG_LOADER: "#8a6d00",
}
# Of a run whose results are older than the record of where it was trained.
UNKNOWN = {"amn-kernels": "not recorded"}
MARKERS = "os^DvP*X"
# Text stays text, so that it takes the page's font and can be searched; a fixed salt makes the same file twice.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "amn-kernels",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8b95a1",
    "axes.labelcolor": "#3c4653",
    "axes.grid": True,
    "grid.color": "#e6eaef",
    "axes.axisbelow": True,
    "xtick.color": "#3c4653",
    "ytick.color": "#3c4653",
    "legend.frameon": False,
    "legend.fontsize": 8,
}
SIZE = (4.6, 3.1)  # inches; a chart fills a phone's width, three stand side by side on a desktop
# History key -> chart title; {} is what follows the prefix. The order is that of the report.
QUANTITIES = [
    (r"validation_cosine", "Validation cosine (dashed: mean)"),
    (r"train_cosine", "Training cosine"),
    (r"loss_(\w+)", "Value of {}"),
    (r"weight_(\w+)", "Weight of {}"),
    (r"share_(\w+)", "Share of the update: {}"),
    (r"gradient_cosine_(\w+)", "Gradient cosine: {}"),
    (r"top1", "Top-1 in the batch"),
    (r"lr", "Learning rate"),
]
LONG_NUMBER = re.compile(r"\d+\.\d{3,}")
LOGARITHMIC = re.compile(r"(loss|weight)_\w+|lr")


@dataclass(frozen=True)
class Chart:
    """A drawing with the name that files and screen readers know it by."""

    name: str
    title: str
    svg: Markup


def write_report(path: Path, results: dict, rows: list[Row]) -> None:
    """Writes the report of `results`, as `replay` returns them, and of the `rows` that they were summarised to."""
    write_atomically(path, render(results, rows))


def render(results: dict, rows: list[Row]) -> str:
    """The report as HTML."""
    environment = Environment(
        loader=PackageLoader("amn_kernels.train", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    models = list(dict.fromkeys(row.model for row in rows))
    html = environment.get_template(TEMPLATE).render(
        rows=rows,
        goals=find_goals(rows),
        models={model: [row for row in rows if row.model == model] for model in models},
        overview=overview_charts(results, rows),
        curves={model: curve_charts(model, results) for model in models},
        sets={key: title for key, title in SET_TITLES.items() if key in results["data"]},
        results=results,
        colors=COLORS,
        options=common_options(results["runs"]),
        environments=environments(results),
        clustered_by=dict.fromkeys("articles" if "articles" in data else "blocks" for data in results["data"].values()),
    )
    return _share_styles(html)


def common_options(runs: list[dict]) -> dict:
    """The options that have one value in all runs; a row's configuration has those that tell them apart."""
    first, *others = (run["options"] for run in runs)
    return {name: value for name, value in first.items() if all(other.get(name, ...) == value for other in others)}


def environments(results: dict) -> list[dict[str, str]]:
    """The versions and hardware that runs were trained with, each once.

    Earlier results have those of all runs beside these; of runs kept from earlier replays they aren't known.
    """
    found = [run.get("environment") or results.get("environment", UNKNOWN) for run in results["runs"]]
    return [values for place, values in enumerate(found) if values not in found[:place]]


def overview_charts(results: dict, rows: list[Row]) -> list[Chart]:
    """Frontier and collapse map for each set, and where predictions and targets lie."""
    charts = []
    for key, title in SET_TITLES.items():
        if key in results["data"]:
            charts.append(_draw(f"frontier-{key}", f"{title}: hit@10 against cosine", _frontier, results, rows, key))
            if results["untrained"][key][MEAN]["collapse"]:
                charts.append(_draw(f"collapse-{key}", f"{title}: collapse map", _collapse_map, results, rows, key))
                charts.append(_draw(f"subspace-{key}", f"{title}: energy in the subspace", _subspace, rows, key))
    return charts


def curve_charts(model: str, results: dict) -> list[Chart]:
    """One chart for every quantity of the histories: a line for each run, a band over its seeds."""
    histories: dict[str, list[list[dict]]] = {}
    for run in results["runs"]:
        if run["model"] == model and run["history"]:
            histories.setdefault(run["run"], []).append(run["history"])
    keys = list(dict.fromkeys(key for seeds in histories.values() for key in seeds[0][0]))
    charts = []
    for pattern, title in QUANTITIES:
        for key in keys:
            if match := re.fullmatch(pattern, key):
                heading = title.format(*(group.replace("_", " and ") for group in match.groups()))
                reference = results["untrained"]["inside"][MEAN]["metrics"]["cosine"] if "validation" in key else None
                charts.append(_draw(f"{model}-{key}", heading, _curves, histories, key, reference))
    return charts


def _draw(name: str, title: str, draw: Callable[..., None], *arguments) -> Chart:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes, *arguments)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Chart(name, title, Markup(_inline(picture.getvalue(), title)))


def _inline(svg: str, title: str) -> str:
    """A drawing of matplotlib's as a part of the page: its font, no names that others have too, half the size."""
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[^"]*_\d+"| font-family: [^;"]*;| transform="rotate\(-0 [^"]*"', "", svg)
    # A hundredth of a point is nothing to see.
    svg = re.sub(r"<[^>]*>", lambda tag: LONG_NUMBER.sub(lambda number: f"{float(number[0]):.2f}", tag[0]), svg)
    return re.sub(r"\n\s*", "\n", svg)


def _share_styles(html: str) -> str:
    """The page with the styles of its drawings as classes: they are few, and most of a drawing."""
    names: dict[str, str] = {}

    def as_class(style: re.Match) -> str:
        return f'class="{names.setdefault(style[1], f"s{len(names)}")}"'

    html = re.sub(r"<svg.*?</svg>", lambda svg: re.sub(r'style="([^"]*)"', as_class, svg[0]), html, flags=re.DOTALL)
    rules = "\n".join(f".{name} {{ {style} }}" for style, name in names.items())
    return html.replace("</head>", f"<style>\n{rules}\n</style>\n</head>", 1)


def _curves(axes: Axes, histories: dict[str, list[list[dict]]], key: str, reference: float | None) -> None:
    for run, seeds in histories.items():
        if key not in seeds[0][0]:
            continue
        # Seeds that stopped early have fewer epochs; null is what was not defined in an epoch.
        length = min(len(history) for history in seeds)
        values = np.array([[row[key] for row in history[:length]] for history in seeds], dtype=float)
        epochs = [row["epoch"] for row in seeds[0][:length]]
        color = COLORS.get(run)
        axes.plot(epochs, values.mean(axis=0), marker="o", markersize=3.5, color=color, label=run)
        if len(seeds) > 1:
            axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.18, linewidth=0)
    if reference is not None:
        axes.axhline(reference, color="#3c4653", linestyle="--", linewidth=1)
    low, high = axes.get_ylim()
    # Within a decade a logarithmic axis only has crowded labels.
    if LOGARITHMIC.fullmatch(key) and high > 10 * max(low, 0):
        axes.set_yscale("log")
    elif key.startswith("share_"):
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _frontier(axes: Axes, results: dict, rows: list[Row], key: str) -> None:
    _scatter(axes, rows, key, lambda of_set: (of_set.metrics["cosine"], of_set.metrics["hit@10"]))
    for marker, (name, figures) in zip("x+1", _untrained_without_train_mean(results, key), strict=False):
        at = (figures["metrics"]["cosine"], figures["metrics"]["hit@10"])
        axes.plot(*at, marker=marker, color="#3c4653", linestyle="", markersize=7, label=f"{name}, untrained")
    axes.set(xlabel="cosine", ylabel="hit@10")


def _untrained_without_train_mean(results: dict, key: str) -> Iterable[tuple[str, dict]]:
    # Far off in retrieval; it would squeeze all others into a corner.
    return ((name, figures) for name, figures in results["untrained"][key].items() if name != TRAIN_MEAN)


def _collapse_map(axes: Axes, results: dict, rows: list[Row], key: str) -> None:
    reference = results["untrained"][key][MEAN]["collapse"]
    points = _scatter(
        axes, rows, key, lambda of_set: (of_set.collapse["spread"], of_set.collapse["lift"] / reference["lift"])
    )
    axes.plot(reference["spread"], 1, marker="x", color="#3c4653", linestyle="", markersize=7)
    right = 1.08 * max(1.0, *(x for x, _ in points))
    top, bottom = 1.1 * max(1.0, *(y for _, y in points)), min(-0.05, *(1.1 * y for _, y in points))
    left = COLLAPSED * min(1.0, reference["spread"])
    axes.axvspan(0, left, color="#D55E00", alpha=0.16, linewidth=0)
    for low, high, color, name in (
        (bottom, UNCORRELATED, "#CC79A7", "uncorrelated"),
        (UNCORRELATED, WEAK, "#E69F00", "weak"),
        (WEAK, top, "#009E73", "healthy"),
    ):
        axes.fill_between([left, right], low, high, color=color, alpha=0.10, linewidth=0)
        at = (right, min(high, top)) if high > UNCORRELATED else (right, UNCORRELATED)
        axes.annotate(name, at, xytext=(-3, -3), textcoords="offset points", ha="right", va="top", fontsize=8, zorder=1)
    axes.annotate("collapsed", (left / 2, top), xytext=(0, -3), textcoords="offset points", rotation=90, ha="center",
                  va="top", fontsize=8)  # fmt: skip
    axes.set(xlim=(0, right), ylim=(bottom, top))
    axes.set(xlabel="spread of the predictions / targets", ylabel="lift / mean of the context's")


def _scatter(axes: Axes, rows: list[Row], key: str, place: Callable) -> list[tuple[float, float]]:
    """A marker for each row: its colour is the run, its form the model; returns the places."""
    models = list(dict.fromkeys(row.model for row in rows))
    points = []
    for row in rows:
        of_set = getattr(row, key)
        points.append(place(of_set))
        marker = MARKERS[models.index(row.model) % len(MARKERS)]
        axes.plot(
            *points[-1], marker=marker, markersize=7, linestyle="", alpha=0.85, color=COLORS.get(row.run), clip_on=False
        )
    return points


def _subspace(axes: Axes, rows: list[Row], key: str) -> None:
    panels = [(row, getattr(row, key).collapse) for row in rows]
    axes.figure.set_figheight(max(SIZE[1], 0.9 + 0.18 * len(panels)))
    for place, (row, panel) in enumerate(panels):
        axes.barh(place, panel["subspace"], color=COLORS.get(row.run), height=0.72)
    target = panels[0][1]["target_subspace"]
    axes.axvline(target, color="#1d2733", linewidth=1.4)
    axes.annotate(f"targets {target:.0%}", (target, -0.8), xytext=(4, 0), textcoords="offset points", va="center",
                  fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(panels)), [f"{row.model}, {row.run}" for row, _ in panels], fontsize=7)
    axes.set(xlim=(0, 1.0), ylim=(len(panels) - 0.4, -1.4), xlabel="part of the energy")
    axes.grid(visible=False, axis="y")
