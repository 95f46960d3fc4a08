"""The demo on a few articles, its measurements and its words."""

import dataclasses
import io
import re

import numpy as np
import pytest
import torch

from amn_kernels import cli
from amn_kernels.data import load_bundled, load_windows, split_windows
from amn_kernels.train import demo
from amn_kernels.train.baselines import MEAN, mean_of_context
from amn_kernels.train.demo import RUNS, Ratio, mean_shares, plot_cosines, plot_weights, probe_ratio, verdict
from amn_kernels.train.evaluate import Evaluation
from amn_kernels.train.runs import load_history

MSE_ONLY, FIXED, GRADIENT = (run.name for run in RUNS)


@pytest.fixture(autouse=True)
def same_threads():
    """Training sets torch's threads for the process; other tests shouldn't notice."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def evaluation(cosines: dict[str, float]) -> Evaluation:
    metrics = {name: {"cosine": cosine, "hit@10": 0.2} for name, cosine in cosines.items()}
    return Evaluation(
        "set", windows=100, clusters=10, clustered_by="articles", metrics=metrics, intervals={}, collapse={}
    )


def words(mse_only: float, fixed: float, grad_norm: float, gradient: float = 0.54) -> str:
    inside = evaluation({MSE_ONLY: mse_only, FIXED: fixed, GRADIENT: gradient, MEAN: 0.55})
    inside.metrics[GRADIENT]["hit@10"] = 0.25
    ratio = Ratio(value=700, grad_norm=grad_norm)
    shares = {MSE_ONLY: {"mse": 1.0}, FIXED: {"mse": 0.01, "infonce": 0.99}, GRADIENT: {"mse": 0.48, "infonce": 0.52}}
    return verdict(inside, inside, dict.fromkeys((MSE_ONLY, FIXED, GRADIENT), ratio), shares)


def test_verdict_follows_the_figures():
    text = words(mse_only=0.57, fixed=0.27, grad_norm=2000)
    assert (
        "MSE only, beside the untrained mean of the context: cosine higher (0.570 against 0.550), hit@10 level" in text
    )
    assert "fixed 0.5/0.5, beside the untrained mean of the context: cosine lower (0.270 against 0.550)" in text
    assert "2,000 times as hard as MSE: MSE was drowned, at the price of 0.280 in cosine" in text
    text = words(mse_only=0.551, fixed=0.56, grad_norm=2000)
    assert "cosine level (0.551 against 0.550)" in text
    assert "yet the cosine held" in text
    assert "drowned" not in text
    assert "drowned" not in words(mse_only=0.57, fixed=0.27, grad_norm=2)


def test_verdict_on_balance_is_beside_mse_alone():
    *_, line = words(mse_only=0.6, fixed=0.27, grad_norm=2000, gradient=0.57).splitlines()
    assert line.startswith(f"{GRADIENT}, beside the untrained mean of the context: cosine higher (0.570 against 0.550)")
    assert "MSE had 48% of the update and InfoNCE 52%" in line
    assert "95.0% of the cosine (0.570 against 0.600) and 125.0% of the hit@10 (0.250 against 0.200)" in line
    # No ratio to a cosine that isn't positive.
    *_, line = words(mse_only=-0.1, fixed=0.27, grad_norm=2000).splitlines()
    assert "beside MSE only: cosine 0.540 against -0.100 and" in line


def test_probe_ratio_matches_autograd_on_the_formulas():
    windows = load_windows()
    rows = split_windows(windows).validation[:256]
    context, target = windows.batch(rows)
    pred = mean_of_context(context).requires_grad_()
    mse = torch.nn.functional.mse_loss(pred, target)
    logits = torch.nn.functional.normalize(pred, dim=1) @ torch.nn.functional.normalize(target, dim=1).T / 0.07
    infonce = torch.nn.functional.cross_entropy(logits, torch.arange(256))
    norms = [torch.autograd.grad(loss, pred, retain_graph=True)[0].norm().item() for loss in (infonce, mse)]
    ratio = probe_ratio(mean_of_context, windows, rows)
    np.testing.assert_allclose(ratio.value, (infonce / mse).item(), rtol=1e-4)
    np.testing.assert_allclose(ratio.grad_norm, norms[0] / norms[1], rtol=1e-4)
    # The reason for the demo: at the start one term already pulls a thousand times as hard as the other.
    assert ratio.grad_norm > 1000


def test_overwriting_leaves_no_earlier_pictures_beside_the_first_run(tmp_path, monkeypatch):
    for name in (demo.PLOT, demo.WEIGHTS_PLOT, "notes.txt"):
        (tmp_path / name).write_text("earlier")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    assert cli.main(["demo", "--out", str(tmp_path), "--overwrite"]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_drawing_leaves_the_earlier_picture(tmp_path, monkeypatch):
    def interrupted(figure, file, **options):
        (file.write if isinstance(file, io.BytesIO) else file.write_bytes)(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Figure, "savefig", interrupted)
    row = {"epoch": 1, "validation_cosine": 0.5, "weight_mse": 0.5, "share_mse": 1.0}
    for draw in (lambda path: plot_cosines(path, {"a": [row]}, 0.5), lambda path: plot_weights(path, {"a": [row]})):
        path = tmp_path / "plot.png"
        path.write_bytes(b"whole")
        with pytest.raises(KeyboardInterrupt):
            draw(path)
        assert path.read_bytes() == b"whole"


def test_plot_is_a_png(tmp_path):
    history = [{"epoch": 1, "validation_cosine": 0.5}, {"epoch": 2, "validation_cosine": 0.6}]
    plot_cosines(tmp_path / "plot.png", {"run": history}, baseline=0.55)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_weights_and_shares_are_drawn_by_run_and_epoch(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(demo.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    row = {"weight_mse": 0.5, "weight_infonce": 2e-4, "share_mse": 0.4, "share_infonce": 0.6}
    history = [{"epoch": 1, **row}, {"epoch": 2, **row, "weight_infonce": 1e-4, "share_mse": 0.2, "share_infonce": 0.8}]
    assert mean_shares(history) == {"mse": pytest.approx(0.3), "infonce": pytest.approx(0.7)}
    plot_weights(tmp_path / "plot.png", {"a": history[:1], "b": history})
    _, weights, _, shares = figures[0].axes
    assert weights.get_title() == "b"
    assert {line.get_label(): list(line.get_ydata()) for line in weights.lines} == {
        "mse": [0.5, 0.5],
        "infonce": [2e-4, 1e-4],
    }
    assert {line.get_label(): list(line.get_ydata()) for line in shares.lines} == {
        "mse": [0.4, 0.2],
        "infonce": [0.6, 0.8],
    }


@pytest.mark.filterwarnings("default::amn_kernels.stats.DominanceWarning")
def test_demo_on_a_few_articles(tmp_path, monkeypatch, capsys):
    vectors, article = load_bundled("verses")
    rows = article < 12
    np.savez(tmp_path / "few.npz", vectors=vectors[rows], article=article[rows])
    settings = dataclasses.replace(demo.SETTINGS, data=tmp_path / "few.npz", epochs=2, batch_size=64)
    monkeypatch.setattr(demo, "SETTINGS", settings)
    out = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(out)]) == 0
    printed, warned = capsys.readouterr()
    # The loss itself says that the fixed weights let one term drown the other: once, in a line.
    assert re.fullmatch(r"amn-kernels: warning: the gradient of infonce is [\d,]+ times that of mse .*\n", warned)
    for name in (MSE_ONLY, FIXED, GRADIENT, MEAN, "copy last", "training mean", "mean-last mix"):
        assert len(re.findall(rf"^ ?{re.escape(name)} .* 0\.\d\d\d", printed, flags=re.MULTILINE)) == 1, name
    assert f"{FIXED}, beside the untrained mean of the context" in printed
    for name in ("validation-cosine.png", "weights.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert re.search(r"MSE had \d+% of the update and InfoNCE \d+%", printed)
    weights = {run.folder: load_history(out / run.folder)[-1] for run in RUNS}
    assert "weight_infonce" not in weights["mse"]
    assert weights["fixed"]["weight_infonce"] == weights["fixed"]["weight_mse"] == 0.5
    assert weights["gradient"]["weight_mse"] == 0.5
    assert weights["gradient"]["weight_infonce"] < 0.01
    # A second demo needs consent to replace the first.
    assert cli.main(["demo", "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
