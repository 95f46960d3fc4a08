"""The report: complete, self-contained, well-formed, and charts that show the figures."""

import re
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from amn_kernels.train import report as module
from amn_kernels.train.comparison import WRONG_LOADER, summarise
from amn_kernels.train.demo import FIXED, GRADIENT, MSE_ONLY
from amn_kernels.train.report import common_options, curve_charts, render

VOID = {"meta", "br", "link", "img", "input", "hr"}
SPREAD = {"pairwise_cosine": 0.5, "effective_rank": 40.0, "std": 0.7}


def panel(lift: float = 0.2, verdict: str = "healthy") -> dict:
    return {
        "pred": SPREAD,
        "target": SPREAD,
        "spread": 0.6,
        "rank": 0.7,
        "order_sensitivity": 0.01,
        "lift": lift,
        "reference_lift": 0.2,
        "chance_lift": 0.01,
        "subspace": 0.95,
        "target_subspace": 0.56,
        "verdict": verdict,
        "words": "the words of the panel",
    }


def figures(cosine: float, **options) -> dict:
    names = ("cosine", "hit@10", "excluded_hit@10", "margin", "skill_mean", "skill_last", "skill_train_mean")
    metrics = dict(zip(names, (cosine, 0.2, 0.25, -0.1, 0.03, 0.2, 0.1), strict=True))
    intervals = {name: (value - 0.01, value + 0.01) for name, value in metrics.items()}
    return {"metrics": metrics, "intervals": intervals, "collapse": panel(**options)}


def row(epoch: int, **numbers) -> dict:
    return {"epoch": epoch, "lr": 1e-3, "is_best": epoch == 1, "seconds": 2.0} | numbers


def run(name: str, seed: int, history: list[dict], cosine: float = 0.5) -> dict:
    return {
        "model": "amn",
        "run": name,
        "seed": seed,
        "options": {
            **{"model": "amn", "seed": seed, "epochs": 2, "weighting": "gradient", "lambda_mse": 0.5, "lr": 1e-3},
            **{"lambda_info": 0.5, "batch_size": 256, "temperature": 0.07, "data": None},
            **{"schedule": "plateau", "warmup": 0},
        },
        "parameters": 1_000,
        "history": history,
        "inside": figures(cosine),
        "outside": figures(0.1, lift=0.01, verdict="uncorrelated"),
    }


def make_results() -> dict:
    """Two seeds of two runs, of which one is undefined in an epoch, and a wrong loader."""
    balanced = [
        [
            row(epoch, validation_cosine=0.5 + 0.1 * seed, loss_mse=1e-3, loss_infonce=2.0, weight_mse=0.5,
                weight_infonce=1e-4, share_mse=0.5, share_infonce=0.5, gradient_cosine_mse_infonce=None)
            for epoch in (1, 2)
        ]
        for seed in (0, 1)
    ]  # fmt: skip
    alone = [[row(epoch, validation_cosine=0.6, loss_mse=1e-3, weight_mse=1.0, share_mse=1.0) for epoch in (1, 2)]]
    untrained = {name: figures(0.55) for name in ("mean of context", "copy last", "training mean", "mean-last mix")}
    data = {"name": "<b>verses</b> & more", "windows": 2476, "articles": 117}
    return {
        "environment": {"amn-kernels": "0.1.0", "processor": "A processor", "torch": "2.13"},
        "data": {"inside": data, "outside": data},
        "untrained": {"inside": untrained, "outside": untrained},
        "runs": [
            run(MSE_ONLY, 0, alone[0], 0.57),
            run(GRADIENT, 0, balanced[0], 0.51),
            run(GRADIENT, 1, balanced[1], 0.53),
            run(WRONG_LOADER, 0, [], -0.01),
        ],
    }


@pytest.fixture
def results() -> dict:
    return make_results()


@pytest.fixture(scope="module")
def html() -> str:
    results = make_results()
    return render(results, summarise(results))


def test_it_needs_no_network_and_no_other_file(html):
    addresses = re.findall(r"""(?:src|href|data|action|poster|srcset)\s*=\s*["']([^"']*)""", html)
    assert addresses
    assert all(address.startswith("#") for address in addresses)
    assert not re.findall(r"@import|url\((?!#)|<script|<link|<iframe|<object", html)
    # What is left of addresses are the names of XML namespaces.
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_tags_are_closed_in_order(html):
    class Checker(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.count = [], 0

        def handle_starttag(self, tag, attrs):
            self.count += 1
            if tag not in VOID:
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert checker.count > 300


def test_all_that_was_found_is_on_the_page(html, results):
    for text in (
        *(MSE_ONLY, GRADIENT, WRONG_LOADER, "mean of context", "copy last", "training mean", "mean-last mix"),
        *("A processor", "0.570", "0.520", "seeds 0.510 to 0.530", "-0.010", "uncorrelated", "0.07"),
        *(
            f"keeps {0.52 / 0.57:.1%} of the cosine of MSE only",
            "not met",
            "Value of infonce",
            "Share of the update: mse",
        ),
        *("In distribution: collapse map", "Out of distribution: hit@10 against cosine", "the words of the panel"),
    ):
        assert text in html, text
    assert "&lt;b&gt;verses&lt;/b&gt; &amp; more" in html
    assert "<b>verses" not in html
    assert FIXED not in {row.run for row in summarise(results)}


def test_an_option_is_common_where_all_runs_have_it(results):
    everywhere = common_options(results["runs"])
    assert everywhere == {name: value for name, value in results["runs"][0]["options"].items() if name != "seed"}
    results["runs"][1]["options"] |= {"schedule": "cosine", "warmup": 20}
    del results["runs"][2]["options"]["temperature"]
    assert common_options(results["runs"]).keys() == everywhere.keys() - {"schedule", "warmup", "temperature"}
    html = render(results, summarise(results))
    assert "<dt>batch_size</dt><dd>256</dd>" in html
    assert "<dt>schedule</dt>" not in html
    assert "lr 0.001, cosine after 20 updates of warm-up, batch 256" in html


def test_environments_are_shown_once_each_and_so_are_those_of_earlier_results(results):
    assert module.environments(results) == [results["environment"]]
    first, second, *rest = results["runs"]
    first["environment"], second["environment"] = {"processor": "B", "amn-kernels": "0.2.0"}, None
    for each in rest:
        each["environment"] = first["environment"]
    assert module.environments(results) == [first["environment"], results["environment"]]
    del results["environment"]
    html = render(results, summarise(results))
    assert html.count("<dt>processor</dt><dd>B</dd>") == 1
    assert "<footer>amn-kernels 0.2.0, not recorded ·" in html


def test_windows_that_are_not_split_by_article_are_in_blocks(results, html):
    assert "windows of 117 articles; out of distribution" in html
    assert "by bootstrap over articles." in html
    results["data"]["inside"] = {"name": "few", "windows": 90, "blocks": 15}
    page = render(results, summarise(results))
    assert "90 validation windows of 15 blocks; out of distribution" in page
    assert "by bootstrap over blocks or articles." in page


def test_it_is_made_for_phones_too(html):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "@media (max-width: 760px)" in html
    # Charts take the width that there is.
    assert "figure svg { display: block; width: 100%; height: auto; }" in html


def test_without_other_vectors_there_are_no_columns_for_them(results):
    for part in (results["data"], results["untrained"], *results["runs"]):
        del part["outside"]
    html = render(results, summarise(results))
    assert "ut of distribution" not in html
    assert "In distribution: collapse map" in html


def test_a_single_window_has_no_collapse_panel(results):
    for part in (*results["runs"], *results["untrained"].values()):
        for key in ("inside", "outside", *results["untrained"]["inside"]):
            if key in part:
                part[key]["collapse"] = None
                part[key]["intervals"] = dict.fromkeys(part[key]["intervals"])
    html = render(results, summarise(results))
    assert "collapse map" not in html
    assert "hit@10 against cosine" in html


def drawn(monkeypatch, draw) -> list[Figure]:
    figures = []
    save = Figure.savefig

    def saved(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(module.Figure, "savefig", saved)
    draw()
    return figures


def test_curves_are_means_over_seeds_with_their_range(results, monkeypatch):
    charts = []
    figures = drawn(monkeypatch, lambda: charts.extend(curve_charts("amn", results)))
    by_name = {chart.name: figure.axes[0] for chart, figure in zip(charts, figures, strict=True)}
    assert list(by_name) == [
        "amn-validation_cosine",
        *("amn-loss_mse", "amn-loss_infonce", "amn-weight_mse", "amn-weight_infonce", "amn-share_mse"),
        *("amn-share_infonce", "amn-gradient_cosine_mse_infonce", "amn-lr"),
    ]
    axes = by_name["amn-validation_cosine"]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines[MSE_ONLY] == [0.6, 0.6]
    assert lines[GRADIENT] == pytest.approx([0.55, 0.55])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.5, 0.6)
    # A run without a term has no line in its charts; what is undefined is a gap.
    assert [line.get_label() for line in by_name["amn-weight_infonce"].lines] == [GRADIENT]
    assert np.isnan(by_name["amn-gradient_cosine_mse_infonce"].lines[0].get_ydata()).all()


def test_the_frontier_and_the_collapse_map_show_the_figures(results, monkeypatch):
    rows = summarise(results)
    figures = drawn(monkeypatch, lambda: module.overview_charts(results, rows))
    assert len(figures) == 6
    frontier, collapse, subspace = (figure.axes[0] for figure in figures[3:])
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in frontier.lines]
    assert points[:3] == [(pytest.approx(0.1), 0.2)] * 3
    # Not the training mean.
    assert len(points) == 3 + 3
    assert [line.get_ydata()[0] for line in collapse.lines] == pytest.approx([0.05] * 3 + [1])
    assert [text.get_text() for text in collapse.texts] == ["uncorrelated", "weak", "healthy", "collapsed"]
    assert [bar.get_width() for bar in subspace.patches] == [0.95] * 3
    assert subspace.lines[0].get_xdata()[0] == 0.56


def test_the_same_results_make_the_same_file_and_styles_stay_inside(results):
    before = dict(mpl.rcParams)
    assert render(results, summarise(results)) == render(results, summarise(results))
    assert dict(mpl.rcParams) == before
