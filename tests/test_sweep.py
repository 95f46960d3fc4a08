"""The sweep: what it trains, what it writes and when, and its picture."""

import json

import numpy as np
import pytest
from rich.console import Console

from amn_kernels import cli
from amn_kernels.train import sweep as module
from amn_kernels.train.demo import SETTINGS
from amn_kernels.train.runs import load_history, load_run
from amn_kernels.train.sweep import MSE_ONLY, WEIGHTINGS, Point, SweepConfig, plot_frontier, run_config


@pytest.fixture
def user_file(tmp_path):
    """Short noisy copies of one vector an article: MSE is small beside InfoNCE."""
    order = np.random.default_rng(0)
    vectors = np.repeat(order.standard_normal((30, 8)), 12, axis=0) + 0.3 * order.standard_normal((360, 8))
    np.savez(tmp_path / "user.npz", vectors=(0.1 * vectors).astype(np.float32), article=np.repeat(np.arange(30), 12))
    return tmp_path / "user.npz"


def test_sweep_end_to_end(user_file, tmp_path, capsys):
    out = tmp_path / "sweep"
    options = ["--data", str(user_file), "--share", "0.5", "--seeds", "0,3", "--epochs", "1", "--out", str(out)]
    assert cli.main(["sweep", *options]) == 0
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((out / "results.json").read_text())
    assert set(content["baselines"]) == {"mean of context", "copy last", "training mean", "mean-last mix"}
    points = content["points"]
    grid = {(MSE_ONLY, 0.0)} | {(weighting, 0.5) for weighting in WEIGHTINGS}
    assert sorted((point["seed"], point["weighting"], point["share"]) for point in points) == sorted(
        (seed, *cell) for seed in (0, 3) for cell in grid
    )
    printed = capsys.readouterr().out
    for point in points:
        folder = out / f"seed-{point['seed']}" / f"{point['weighting'].lower().replace(' ', '-')}-{point['share']:g}"
        config = load_run(folder).config
        assert config.seed == point["seed"]
        (epoch,) = load_history(folder)
        assert epoch["validation_cosine"] == pytest.approx(point["metrics"]["cosine"], abs=1e-6)
        assert f"cosine {point['metrics']['cosine']:.3f}  hit@10 {point['metrics']['hit@10']:.3f}" in printed
        if point["weighting"] == MSE_ONLY:
            assert "loss_infonce" not in epoch
        elif point["weighting"] in ("calibrated", "gradient"):
            assert epoch["share_infonce"] == pytest.approx(point["share"], abs=0.2 * point["share"])
    # A second sweep needs consent to replace the first.
    assert cli.main(["sweep", *options]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_run_options_of_each_weighting(user_file):
    settings = SETTINGS.__class__(data=user_file)
    for weighting in ("fixed", "value", "gradient"):
        config = run_config(settings, weighting, 0.25)
        assert (config.weighting, config.lambda_mse, config.lambda_info) == (weighting, 0.75, 0.25)
    alone = run_config(settings, MSE_ONLY, 0.0)
    assert (alone.lambda_mse, alone.lambda_info) == (1.0, 0.0)
    calibrated = run_config(settings, "calibrated", 0.25)
    assert (calibrated.weighting, calibrated.lambda_mse) == ("fixed", 0.75)
    # InfoNCE's gradient is by far the longer one in this file.
    assert 0 < calibrated.lambda_info < 0.25 / 10


def test_an_interrupted_sweep_keeps_the_runs_that_are_done(user_file, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    train = module.train

    def interrupted(config, console):
        if "value" in config.out.name:
            raise KeyboardInterrupt
        return train(config, console)

    monkeypatch.setattr(module, "train", interrupted)
    options = ["--data", str(user_file), "--share", "0.5", "--epochs", "1", "--out", str(out)]
    assert cli.main(["sweep", *options]) == 130
    points = json.loads((out / "results.json").read_text())["points"]
    assert [point["weighting"] for point in points] == [MSE_ONLY, "fixed", "calibrated"]
    assert (out / "frontier.png").is_file()


def test_overwriting_leaves_no_earlier_figures_beside_the_first_run(user_file, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    out.mkdir()
    for name in ("frontier.png", "results.json", "notes.txt"):
        (out / name).write_text("earlier")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", interrupted)
    assert cli.main(["sweep", "--data", str(user_file), "--out", str(out), "--overwrite"]) == 130
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_shares_that_differ_in_the_last_digits_have_folders_of_their_own(user_file, tmp_path, monkeypatch):
    folders, train = [], module.train

    def recording(config, console):
        folders.append(config.out.name)
        return train(config, console)

    monkeypatch.setattr(module, "train", recording)
    monkeypatch.setattr(module, "WEIGHTINGS", ("fixed",))
    config = SweepConfig(share="0.5,0.50000001", epochs=1, data=user_file, out=tmp_path / "sweep")
    module.sweep(config, Console(quiet=True))
    assert folders == ["mse-only-0", "fixed-0.5", "fixed-0.50000001"]


def test_the_picture_has_a_marker_for_each_run_and_a_line_through_the_means(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(module.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    points = [
        Point(
            "gradient", share, seed, 1 - share, share, {"cosine": 0.5 + share + 0.1 * seed, "hit@10": 0.2 * (1 + seed)}
        )
        for share in (0.5, 0.1)
        for seed in (0, 1)
    ]
    baselines = {name: {"cosine": 0.5, "hit@10": 0.1} for name in ("mean of context", "training mean")}
    plot_frontier(tmp_path / "plot.png", points, baselines, "data")
    (axes,) = figures[0].axes
    runs, means, untrained = axes.lines
    np.testing.assert_allclose(runs.get_xdata(), [0.6, 0.7, 1.0, 1.1])
    assert runs.get_linestyle() == "None"
    np.testing.assert_allclose(means.get_xdata(), [0.65, 1.05])
    np.testing.assert_allclose(means.get_ydata(), [0.3, 0.3])
    assert [line.get_label() for line in (means, untrained)] == ["gradient", "mean of context, untrained"]
    assert [text.get_text() for text in axes.texts] == ["0.1", "0.5"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": "0.1;0.5"}, "share must be numbers with commas"),
        ({"share": "0.1,1.5"}, "share must be numbers between 0 and 1"),
        ({"share": "nan"}, "share must be numbers between 0 and 1"),
        ({"seeds": "0,x"}, "seeds must be numbers with commas"),
        ({"seeds": "0,-1"}, "seed must be in .*, got -1"),
    ],
)
def test_numbers_that_cannot_be_swept(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        module.sweep(SweepConfig(out=tmp_path / "sweep", **options), None)
    assert not (tmp_path / "sweep").exists()


def test_a_number_given_twice_is_swept_once():
    config = SweepConfig(share="0.5,0.1,0.50", seeds="3,0,3")
    assert (config.shares(), config.seed_numbers()) == ([0.5, 0.1], [3, 0])
