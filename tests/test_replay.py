"""The replay: what it trains and keeps, the wrong class for the right weights, and what its table says."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from amn_kernels import cli
from amn_kernels.data import load_windows
from amn_kernels.train import replay as module
from amn_kernels.train.comparison import WRONG_LOADER, find_goals, markdown_table, summarise
from amn_kernels.train.demo import FIXED, GRADIENT, MSE_ONLY
from amn_kernels.train.metrics import mean_cosine
from amn_kernels.train.models import AMN
from amn_kernels.train.replay import PLANS, REPLAYED, AMNTwin, ReplayConfig
from amn_kernels.train.report import common_options
from amn_kernels.train.runs import load_history, load_run

RUNS = [run.name for run in REPLAYED]


def write_vectors(path, seed: int):
    """Short noisy copies of one vector an article: MSE is small beside InfoNCE."""
    order = np.random.default_rng(seed)
    vectors = np.repeat(order.standard_normal((30, 8)), 12, axis=0) + 0.3 * order.standard_normal((360, 8))
    np.savez(path, vectors=(0.1 * vectors).astype(np.float32), article=np.repeat(np.arange(30), 12))
    return str(path)


@pytest.fixture
def options(tmp_path):
    """Of a replay on a user's vectors, with others out of distribution, in a moment."""
    data, ood = write_vectors(tmp_path / "user.npz", 0), write_vectors(tmp_path / "other.npz", 1)
    out = str(tmp_path / "replay")
    return ["replay", "--data", data, "--ood", ood, "--seeds", "0,3", "--epochs", "1", "--out", out]


def test_replay_end_to_end_and_again(options, tmp_path, capsys, monkeypatch):
    out = tmp_path / "replay"
    assert cli.main(options) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert sorted((run["run"], run["seed"]) for run in results["runs"]) == sorted(
        (name, seed) for name in [*RUNS, WRONG_LOADER] for seed in (0, 3)
    )
    for run in results["runs"]:
        cosine = run["inside"]["metrics"]["cosine"]
        assert f"amn, {run['run']}, seed {run['seed']}: cosine {cosine:.3f} inside" in printed
        if run["run"] == WRONG_LOADER:
            assert run["history"] == []
            continue
        folder = out / "amn" / next(r.folder for r in REPLAYED if r.name == run["run"]) / f"seed-{run['seed']}"
        assert run["history"] == load_history(folder)
        assert cosine == pytest.approx(run["history"][0]["validation_cosine"], abs=1e-6)
        assert run["outside"]["metrics"]["cosine"] != cosine
    assert (out / "report.html").read_text().startswith("<!doctype html>")

    # What is done is not trained again, whatever the other options add to it.
    before = (out / "results.json").read_text()
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("trained again"))
    assert cli.main(options) == 0
    assert (out / "results.json").read_text() == before
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        cli.main([*options, "--epochs", "2"])


def test_an_interrupted_replay_goes_on_where_it_stopped(options, tmp_path, monkeypatch, capsys):
    trained, train = [], module.train

    def counting(config, console):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(config.out)
        return train(config, console)

    monkeypatch.setattr(module, "train", counting)
    assert cli.main(options) == 130
    assert len(json.loads((tmp_path / "replay" / "results.json").read_text())["runs"]) == 3
    rest = []
    monkeypatch.setattr(module, "train", lambda config, console: (rest.append(config.out), train(config, console))[1])
    assert cli.main(options) == 0
    assert len(rest) == 2 * len(REPLAYED) - 2
    assert not set(rest) & set(trained)
    capsys.readouterr()


def test_figures_are_of_the_windows_that_are_named(options, tmp_path, monkeypatch):
    """Other windows out of distribution are measured, other data trained on, whatever the name of their file."""
    out, trained, train = tmp_path / "replay", [], module.train
    monkeypatch.setattr(module, "train", lambda config, console: (trained.append(config.out), train(config, console)))
    options += ["--seeds", "0"]

    def results(*more):
        trained.clear()
        assert cli.main([*options, *more]) == 0
        return json.loads((out / "results.json").read_text())

    first = results()
    assert len(trained) == len(REPLAYED)
    third = write_vectors(tmp_path / "third.npz", 2)
    second = results("--ood", third)
    assert trained == []
    assert second["data"]["outside"]["name"] == third
    windows = load_windows(third)
    for before, after in zip(first["runs"], second["runs"], strict=True):
        assert after["inside"] == before["inside"]
        if after["run"] != WRONG_LOADER:
            folder = next(run.folder for run in REPLAYED if run.name == after["run"])
            model = load_run(out / "amn" / folder / "seed-0").model
            cosine = mean_cosine(model, windows, np.arange(len(windows)))
            assert after["outside"]["metrics"]["cosine"] == pytest.approx(cosine, abs=1e-6)
    # The bundled documentation does not fit, so there is no second set.
    place = options.index("--ood")
    del options[place : place + 2]
    assert all("outside" not in run for run in results()["runs"])
    assert trained == []
    # Of a run that is gone nothing can be measured, and figures without a fingerprint may be of anything.
    shutil.rmtree(out / "amn" / "mse")
    path = out / "results" / "amn-fixed-seed-0.json"
    path.write_text(path.read_text().replace('"fingerprint"', '"something"'))
    results("--ood", third)
    assert [folder.parent.name for folder in trained] == ["mse", "fixed"]
    write_vectors(tmp_path / "user.npz", 5)
    results("--ood", third)
    assert len(trained) == len(REPLAYED)


def test_runs_keep_the_environment_that_they_were_trained_in(options, tmp_path, monkeypatch):
    out = tmp_path / "replay"

    def replayed(processor, *more):
        monkeypatch.setattr(module, "environment", lambda: {"amn-kernels": "0.1.0", "processor": processor})
        assert cli.main([*options, *more]) == 0
        runs = json.loads((out / "results.json").read_text())["runs"]
        page = (out / "report.html").read_text()
        assert all((name in page) == (name in str(runs)) for name in ("machine A", "machine B", "not recorded"))
        return {run["seed"]: run["environment"]["processor"] if run["environment"] else None for run in runs}

    assert replayed("machine A", "--seeds", "0") == {0: "machine A"}
    assert replayed("machine B") == {0: "machine A", 3: "machine B"}
    # Measured again, not trained again.
    third = write_vectors(tmp_path / "third.npz", 2)
    assert replayed("machine B", "--ood", third, "--seeds", "0") == {0: "machine A"}


def test_an_earlier_page_does_not_stand_beside_other_figures(options, tmp_path, monkeypatch):
    page, train, trained = tmp_path / "replay" / "report.html", module.train, []
    options += ["--seeds", "0"]
    assert cli.main(options) == 0
    whole = page.read_text()

    def interrupted(config, console):
        # Of the first run there are no figures yet.
        assert page.exists() == (not trained)
        trained.append(config.out)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(config, console)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", interrupted)
        assert cli.main([*options, "--epochs", "2"]) == 130
    assert not page.exists()
    assert cli.main([*options, "--epochs", "2"]) == 0
    assert page.read_text() != whole


def test_a_run_trained_anew_has_figures_of_its_own(options, tmp_path, monkeypatch):
    """A training that took the place of the one whose figures are there must not be measured for it."""
    options += ["--seeds", "0"]
    assert cli.main(options) == 0
    kept = {path: path.read_text() for path in (tmp_path / "replay" / "results").iterdir()}
    assert cli.main([*options, "--epochs", "2"]) == 0
    for path, text in kept.items():
        path.write_text(text)
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("trained again"))
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        cli.main([*options, "--ood", write_vectors(tmp_path / "third.npz", 2)])


def test_damaged_figures_are_named(options, tmp_path, capsys):
    (tmp_path / "replay" / "results").mkdir(parents=True)
    path = tmp_path / "replay" / "results" / "amn-mse-seed-0.json"
    for content in ("{", "[]", "[{}]"):
        path.write_text(content)
        assert cli.main(options) == 2
        assert f"{path}: not the figures of a run" in capsys.readouterr().err


def test_the_twin_takes_amns_weights_and_is_another_function():
    torch.manual_seed(0)
    model, context = AMN(8).eval(), torch.randn(40, 5, 8)
    torch.nn.init.normal_(model.residual[-1].weight, std=0.01)
    twin = AMNTwin(8).eval()
    twin.load_state_dict(model.state_dict())
    assert {name: value.shape for name, value in twin.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    own, mistaken = model(context), twin(context)
    assert torch.cosine_similarity(own, context.mean(dim=1)).mean() > 0.5
    assert torch.cosine_similarity(mistaken, context.mean(dim=1)).mean().abs() < 0.3
    # Only the last vector is read.
    torch.testing.assert_close(twin(context.roll(1, 1)[:, -1:]), twin(context.roll(1, 1)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "amn,rnn"}, r"model must be all or names from amn, .*, got rnn"),
        ({"seeds": "0,x"}, r"seeds must be numbers with commas between them, got '0,x'"),
        ({"epochs": 0}, r"epochs must be at least 1, got 0"),
        ({"seeds": str(2**63)}, r"seed must be in .*, got 9223372036854775808"),
    ],
)
def test_options_that_cannot_be_replayed(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        module.replay(ReplayConfig(out=tmp_path / "replay", **options), None)
    assert not (tmp_path / "replay").exists()


def test_windows_out_of_distribution_must_be_as_long_as_those_of_the_training(options, tmp_path, capsys):
    vectors = np.random.default_rng(0).standard_normal((40, 4, 8)).astype(np.float32)
    np.savez(tmp_path / "short.npz", contexts=vectors, targets=vectors[:, 0])
    assert cli.main([*options, "--ood", str(tmp_path / "short.npz")]) == 2
    assert "windows of 4 vectors of size 8, but the model is trained on 5 of size 8" in capsys.readouterr().err
    assert not (tmp_path / "replay").exists()


def test_a_model_or_seed_given_twice_is_trained_once(tmp_path):
    config = ReplayConfig(model="amn,lstm,amn", seeds="0,3,0", out=tmp_path)
    assert config.models() == ["amn", "lstm"]
    assert config.plan("amn").seeds == (0, 3)


def test_every_model_has_the_runs_and_the_others_once_more_on_the_mean(tmp_path):
    config = ReplayConfig(model="all", out=tmp_path)
    cells = [(options.model, run.name, options.seed, options.residual) for run, options in module._trainings(config)]
    assert len(set(cells)) == len(cells) == 4 * 3 + 3 * (4 + 2)
    for model, plan in PLANS.items():
        assert [cell for cell in cells if cell[0] == model and not cell[3]] == [
            (model, name, seed, False) for seed in plan.seeds for name in RUNS
        ]
    assert {cell[:2] for cell in cells if cell[3]} == {
        (model, name) for model in ("lstm", "gru", "transformer") for name in (MSE_ONLY, GRADIENT)
    }


def figures(cosine: float, hit: float, skill: tuple[float, float] | None, verdict: str = "healthy") -> dict:
    names = ("cosine", "hit@10", "excluded_hit@10", "skill_mean")
    return {
        "metrics": dict(zip(names, (cosine, hit, hit, 0.0), strict=True)),
        "intervals": dict.fromkeys(names, (cosine, cosine)) | {"skill_mean": skill},
        "collapse": {"verdict": verdict, "words": "because"},
    }


def results_of(cells: dict[tuple[str, str], list[dict]], outside: dict[tuple[str, str], dict] | None = None) -> dict:
    """Results with the given figures by (model, run), one for each seed."""
    options = {"weighting": "w", "lambda_mse": 0.5, "lambda_info": 0.5, "epochs": 8, "lr": 1e-3, "batch_size": 256}
    options |= {"schedule": "plateau", "warmup": 0}
    runs = [
        {
            "model": model,
            "run": run,
            "seed": seed,
            "options": options,
            "history": [] if run == WRONG_LOADER else [{"share_mse": 0.25, "share_infonce": 0.75}],
            "inside": of_seed,
            **({"outside": outside[model, run]} if outside else {}),
        }
        for (model, run), seeds in cells.items()
        for seed, of_seed in enumerate(seeds)
    ]
    mean = {"mean of context": figures(0.55, 0.2, (0, 0))}
    return {"runs": runs, "untrained": {"inside": mean, "outside": mean}}


def test_rows_are_means_over_seeds_beside_mse_only():
    better, worse = (0.01, 0.02), (-0.02, -0.01)
    results = results_of(
        {
            ("amn", MSE_ONLY): [figures(0.56, 0.15, better), figures(0.58, 0.17, better)],
            ("amn", FIXED): [figures(0.28, 0.20, worse), figures(0.29, 0.24, worse)],
            ("amn", GRADIENT): [figures(0.54, 0.20, worse), figures(0.56, 0.22, better)],
        }
    )
    alone, fixed, gradient = summarise(results)
    assert alone.inside.metrics["cosine"] == pytest.approx(0.57)
    assert alone.inside.seeds == (0.56, 0.58)
    assert alone.configuration == "w, λ 0.5/0.5, 8 epochs, lr 0.001, plateau, batch 256, seeds 0, 1"
    assert (fixed.kept, fixed.gained) == (pytest.approx(0.285 / 0.57), pytest.approx(0.22 / 0.16))
    assert fixed.analysis.startswith("Off the cliff: InfoNCE is 75.0% of the update; keeps 50.0% of the cosine")
    assert gradient.analysis.startswith(
        "InfoNCE is 75.0% of the update; keeps 96.5% of the cosine of MSE only with 1.31"
    )
    assert "above the mean of the context (0.570, mean 0.550)" in alone.analysis
    # The mean of the bounds holds 0.
    assert "In distribution level with the mean of the context (0.550" in gradient.analysis
    assert {goal.text.split(" ")[2]: goal.met for goal in find_goals([alone, fixed, gradient])} == {
        "is": True,
        "falls": True,
        "keeps": True,
        "has": True,
    }


@pytest.mark.parametrize(
    ("alone", "fixed", "gradient", "met"),
    [
        (figures(0.57, 0.2, (0.01, 0.02)), 0.3, figures(0.56, 0.25, (0, 0)), [True, True, True, True]),
        (figures(0.57, 0.2, (-0.01, 0.02)), 0.5, figures(0.53, 0.23, (0, 0)), [False, False, False, False]),
    ],
)
def test_goals_follow_the_figures(alone, fixed, gradient, met):
    cells = {MSE_ONLY: alone, FIXED: figures(fixed, 0.2, (0, 0)), GRADIENT: gradient}
    rows = summarise(results_of({("lstm", run): [cell] for run, cell in cells.items()}))
    assert [goal.met for goal in find_goals(rows)] == met


def test_without_an_interval_nothing_is_above_the_mean_in_words_or_goals():
    (alone,) = summarise(results_of({("amn", MSE_ONLY): [figures(0.6, 0.2, None)]}))
    (goal,) = find_goals([alone])
    words = "not known to differ from the mean of the context (0.600, mean 0.550)"
    assert (goal.text, goal.met) == (f"MSE only is {words} in distribution", False)
    assert alone.analysis.endswith(f"In distribution {words}.")


def test_analysis_says_what_the_panel_found_and_what_the_mean_mends():
    cells = {
        ("lstm", MSE_ONLY): figures(0.58, 0.1, (0.01, 0.02)),
        ("lstm + mean", MSE_ONLY): figures(0.58, 0.1, (0, 0)),
    }
    outside = {
        ("lstm", MSE_ONLY): figures(0.1, 0.01, (-0.9, -0.8), "weak"),
        ("lstm + mean", MSE_ONLY): figures(0.4, 0.01, (-0.2, -0.1)),
    }
    plain, added = summarise(results_of({key: [cell] for key, cell in cells.items()}, outside))
    assert plain.analysis.endswith(
        "Out of distribution below the mean of the context (0.100, mean 0.550). Weak: because."
    )
    assert added.analysis.endswith("Without the mean its model has 0.100 there.")
    (wrong,) = summarise(results_of({("amn", WRONG_LOADER): [figures(0.0, 0.0, (-2, -1), "uncorrelated")]}))
    assert "fit every shape of another class" in wrong.analysis
    assert wrong.analysis.endswith("Uncorrelated: because.")
    assert (wrong.kept, wrong.gained, wrong.shares) == (None, None, {})


def test_markdown_table_has_what_is_kept_and_gained():
    cells = {
        ("amn", MSE_ONLY): [figures(0.56, 0.15, (0.01, 0.02))],
        ("amn", GRADIENT): [figures(0.54, 0.20, (-0.02, 0.02))],
    }
    results = results_of(cells)
    for of_set in results["untrained"].values():
        of_set["copy last"] = figures(0.45, 0.24, (0, 0))
    assert markdown_table(summarise(results), results["untrained"]).splitlines()[2:] == [
        "| amn | MSE only | 0.560 |  | 0.150 |  |  |",
        "| amn | gradient 0.5/0.5 | 0.540 | 96.4% | 0.200 | 1.33x |  |",
        "| untrained | mean of context | 0.550 | | 0.200 | | 0.550 |",
        "| untrained | copy last | 0.450 | | 0.240 | | 0.450 |",
    ]


def test_the_committed_replay_is_shown():
    folder = Path(__file__).parents[1]
    results = json.loads((folder / "docs/replay/results.json").read_text())
    rows = summarise(results)
    page = (folder / "docs/replay/report.html").read_text()
    for row in rows:
        assert f"<td><small>{row.configuration}</small></td>" in page
    common = re.findall(r"<dt>(\w+)</dt>", page[page.index("Options common to all runs") :])
    assert common == list(common_options(results["runs"]))
    table = markdown_table(rows, results["untrained"])
    assert f"<!-- replay -->\n{table}<!-- /replay -->" in (folder / "docs/replay.md").read_text()
    # What the README says of each seed of AMN.
    readme = (folder / "README.md").read_text()
    of = {
        (run["run"], run["seed"]): run["inside"]["metrics"]
        for run in results["runs"]
        if run["model"] == "amn" and run["seed"] in (0, 1, 2)
    }

    def of_mse_only(name, metric, digits):
        seeds = [f"{of[name, seed][metric] / of[MSE_ONLY, seed][metric]:{digits}}".strip("%") for seed in (0, 1, 2)]
        return f"{seeds[0]}, {seeds[1]} and {seeds[2]}"

    kept, gained = of_mse_only(GRADIENT, "cosine", ".1%"), of_mse_only(GRADIENT, "hit@10", ".2f")
    said = " ".join(readme.split())
    assert f"gradient 0.5/0.5 kept {kept}% of the cosine of MSE only, with {gained} times its hit@10" in said
    assert f"Fixed 0.5/0.5 kept {of_mse_only(FIXED, 'cosine', '.1%')}%" in said


def test_readme_shows_the_demo_of_seed_0():
    """`make demo` trains what the replay does of AMN and seed 0, so the committed figures have its table."""
    folder = Path(__file__).parents[1]
    results = json.loads((folder / "docs/replay/results.json").read_text())
    runs = {run["run"]: run for run in results["runs"] if (run["model"], run["seed"]) == ("amn", 0)}
    inside, outside = (results["untrained"][key] for key in ("inside", "outside"))
    figures_of = {name: (runs[name]["inside"], runs[name]["outside"]) for name in (MSE_ONLY, FIXED, GRADIENT)}
    for title, name in (
        ("mean of the context", "mean of context"),
        ("copy of the last vector", "copy last"),
        ("best mix of mean and last", "mean-last mix"),
    ):
        figures_of[f"{title}, untrained"] = (inside[name], outside[name])
    readme = (folder / "README.md").read_text().replace("**", "")
    for title, (within, beyond) in figures_of.items():
        shown = [within["metrics"][metric] for metric in ("cosine", "hit@10", "excluded_hit@10")]
        cells = " | ".join(f"{figure:.3f}" for figure in (*shown, beyond["metrics"]["cosine"]))
        assert f"| {title} | {cells} |" in readme
