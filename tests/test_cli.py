"""The command line: exit codes, messages, and training and evaluation end to end on users' files."""

import json
import subprocess
import sys

import numpy as np
import pytest

from amn_kernels import cli
from amn_kernels.data import load_windows, split_windows
from amn_kernels.train.baselines import fit_baselines


@pytest.fixture
def user_file(tmp_path, request):
    """A user's NPZ in the form named by the parameter: articles of 12 noisy copies of one vector."""
    order = np.random.default_rng(0)
    vectors = np.repeat(order.standard_normal((30, 8)), 12, axis=0) + 0.3 * order.standard_normal((360, 8))
    vectors = vectors.astype(np.float32)
    path = tmp_path / "user.npz"
    if getattr(request, "param", "vectors") == "vectors":
        np.savez(path, vectors=vectors, article=np.repeat(np.arange(30), 12))
    else:
        starts = np.arange(355)
        np.savez_compressed(path, contexts=vectors[starts[:, None] + np.arange(5)], targets=vectors[starts + 5])
    return path


@pytest.mark.parametrize("user_file", ["vectors", "windows"], indirect=True)
def test_train_and_evaluate_a_users_file(user_file, tmp_path, capsys):
    out, figures = tmp_path / "run", tmp_path / "figures.json"
    options = ["--data", str(user_file), "--out", str(out), "--epochs", "2", "--lambda-info", "0.01"]
    options += ["--weighting", "fixed", "--threads", "1"]
    assert cli.main(["train", *options]) == 0
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[0]["weight_infonce"] == pytest.approx(0.01)
    assert "best epoch" in capsys.readouterr().out

    assert cli.main(["evaluate", str(out), "--json", str(figures)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(figures.read_text())
    # D = 8 doesn't match the bundled documentation, so there is no second set.
    (evaluation,) = content["evaluations"]
    best = max(row["validation_cosine"] for row in history)
    assert evaluation["metrics"]["run"]["cosine"] == pytest.approx(best, abs=1e-6)
    for name in ("mean of context", "copy last", "training mean", "mean-last mix"):
        assert name in printed
        assert f"{evaluation['metrics'][name]['excluded_hit@10']:.3f}" in printed

    other = ["--split", "test", "--ood", str(user_file), "--json", str(figures)]
    assert cli.main(["evaluate", str(out), *other]) == 0
    test, ood = json.loads(figures.read_text())["evaluations"]
    assert (test["name"], ood["name"]) == (f"{user_file}, test", f"{user_file}, out of distribution")
    windows = load_windows(user_file)
    assert (test["windows"], ood["windows"]) == (len(split_windows(windows).test), len(windows))
    assert test["metrics"]["copy last"] != evaluation["metrics"]["copy last"]


def test_audit_says_what_would_happen_and_strict_makes_it_an_exit_code(user_file, tmp_path, capsys):
    # Short vectors, as embeddings of many dimensions have: MSE sees lengths, InfoNCE directions alone.
    short, figures = tmp_path / "short.npz", tmp_path / "audit.json"
    with np.load(user_file) as content:
        np.savez(short, vectors=content["vectors"] * 0.05, article=content["article"])
    cliff = ["audit", "--data", str(short), "--lambda-mse", "0.5", "--lambda-info", "0.5", "--weighting", "fixed"]
    assert cli.main([*cliff, "--json", str(figures)]) == 0
    printed = capsys.readouterr().out
    assert "infonce would drive" in printed
    assert "weighting='gradient'" in printed
    assert "after 20 steps" in printed
    content = json.loads(figures.read_text())
    assert set(content) == {
        *("weighting", "lambdas", "anchor", "start", "after_probe", "probe_steps"),
        *("dominated", "calibrated", "verdict"),
    }
    assert (content["weighting"], content["anchor"]) == ("fixed", "mse")
    assert content["lambdas"] == {"mse": 0.5, "infonce": 0.5}
    assert content["dominated"] is True
    for measurement in (content["start"], content["after_probe"]):
        terms = measurement["terms"]
        assert set(terms["mse"]) == {"value", "weight", "contribution", "grad_norm", "ratio", "share"}
        pulls = {name: term["weight"] * term["grad_norm"] for name, term in terms.items()}
        assert terms["infonce"]["ratio"] == pytest.approx(pulls["infonce"] / pulls["mse"])
        assert terms["infonce"]["share"] == pytest.approx(pulls["infonce"] / sum(pulls.values()))
    assert content["verdict"] in printed

    assert cli.main([*cliff, "--strict"]) == 1
    assert cli.main([*cliff, "--strict", "--weighting", "gradient"]) == 0
    calibrated = content["calibrated"]
    lambdas = ["--lambda-mse", str(calibrated["mse"]), "--lambda-info", str(calibrated["infonce"])]
    assert cli.main([*cliff, *lambdas, "--strict"]) == 0
    capsys.readouterr()
    assert "there is no folder" in failing(["audit", "--json", "nowhere/figures.json"], capsys)
    assert "probe_steps must be" in failing([*cliff, "--probe-steps", "-1"], capsys)


def failing(arguments: list[str], capsys) -> str:
    """Runs a command that must fail cleanly; returns its one line."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("amn-kernels: error: ")
    return captured.err


def test_expected_errors_are_one_line_and_exit_2(user_file, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert "nowhere.npz: no such file" in failing(["train", "--data", "nowhere.npz", "--out", out], capsys)
    assert "nowhere/config.json" in failing(["evaluate", "nowhere"], capsys)
    assert "there is no folder" in failing(["evaluate", "nowhere", "--json", "nowhere/figures.json"], capsys)
    assert "epochs must be at least 1" in failing(["train", "--epochs", "0"], capsys)
    assert "all weights are 0" in failing(["train", "--lambda-mse", "0", "--out", out], capsys)
    assert "unknown model 'rnn'" in failing(["train", "--model", "rnn", "--out", out], capsys)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    assert "isn't empty" in failing(["train", "--data", str(user_file), "--out", str(tmp_path / "used")], capsys)
    assert "isn't empty" in failing(["demo", "--out", str(tmp_path / "used")], capsys)


def test_evaluate_refuses_windows_of_another_size(user_file, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", "--data", str(user_file), "--out", str(out), "--epochs", "1", "--context", "4"]) == 0
    capsys.readouterr()
    wide = tmp_path / "wide.npz"
    np.savez(wide, vectors=np.ones((60, 9), np.float32), article=np.repeat(np.arange(10), 6))
    for option in ("--data", "--ood"):
        message = failing(["evaluate", str(out), option, str(wide)], capsys)
        assert f"{wide}: windows of 4 vectors of size 9, but the model is trained on 4 of size 8" in message


def test_evaluate_refuses_data_that_changed_since_the_training(user_file, tmp_path, capsys):
    """More articles under the same name are split anew; named, the file is one like any other."""
    out = str(tmp_path / "run")
    assert cli.main(["train", "--data", str(user_file), "--out", out, "--epochs", "1"]) == 0
    with np.load(user_file) as content:
        vectors, article = content["vectors"], content["article"]
    user_file.unlink()
    np.savez(
        user_file, vectors=np.concatenate([vectors, vectors[::-1]]), article=np.concatenate([article, article + 30])
    )
    assert f"{user_file}: not the vectors and articles that {out} was trained on" in failing(["evaluate", out], capsys)
    assert cli.main(["evaluate", out, "--data", str(user_file)]) == 0
    capsys.readouterr()


def test_evaluate_on_other_data_says_what_the_baselines_are_of(user_file, tmp_path, capsys):
    out, other, figures = str(tmp_path / "run"), tmp_path / "other.npz", tmp_path / "figures.json"
    assert cli.main(["train", "--data", str(user_file), "--out", out, "--epochs", "1"]) == 0
    with np.load(user_file) as content:
        np.savez(other, vectors=content["vectors"][::-1], article=content["article"])
    for options, name in (([], user_file), (["--data", str(other)], other)):
        capsys.readouterr()
        assert cli.main(["evaluate", out, *options, "--json", str(figures)]) == 0
        assert f"training windows of {name}, as are the training mean and the subspace" in capsys.readouterr().out
        content = json.loads(figures.read_text())
        windows = load_windows(name)
        fitted = fit_baselines(windows, split_windows(windows).train)
        assert content["fitted_on"] == str(name)
        assert content["mix"]["mean"] == pytest.approx(fitted.mean_coefficient)


def test_a_run_whose_contexts_are_longer_than_the_bundled_pages_is_evaluated(tmp_path, capsys):
    vectors = np.random.default_rng(0).standard_normal((1200, 8)).astype(np.float32)
    np.savez(tmp_path / "long.npz", vectors=vectors, article=np.repeat(np.arange(12), 100))
    options = ["--data", str(tmp_path / "long.npz"), "--context", "90", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *options]) == 0
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    assert "out of distribution" not in capsys.readouterr().out


def test_interrupt_exits_130_without_a_traceback(user_file, tmp_path, capsys, monkeypatch):
    from amn_kernels.train import trainer

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train_epoch", interrupted)
    assert cli.main(["train", "--data", str(user_file), "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_defaults_are_the_documented_ones():
    from amn_kernels.train.config import TrainConfig

    config = TrainConfig()
    assert (config.lambda_mse, config.lambda_cosine, config.lambda_info) == (1.0, 0.0, 0.0)
    assert (config.lambda_moment, config.lambda_variance) == (0.0, 0.0)
    assert config.weighting == "gradient"
    assert (config.epochs, config.lr, config.batch_size, config.temperature, config.seed) == (20, 5e-4, 32, 0.07, 0)


# Makes the train extra unimportable, then runs the command line in a fresh interpreter.
WITHOUT_EXTRA = """
import importlib.util, sys
from amn_kernels import cli
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in cli.TRAIN_EXTRA else find(name, package)
sys.modules.update(dict.fromkeys(cli.TRAIN_EXTRA))
sys.exit(cli.main())
"""


@pytest.mark.parametrize(("command", "code"), [("info", 0), ("train", 2), ("--help", 2)])
def test_without_the_train_extra_only_info_works(command, code):
    run = subprocess.run([sys.executable, "-c", WITHOUT_EXTRA, command], capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    if command == "info":
        assert "reference" in run.stdout
    else:
        assert run.stderr.count("\n") == 1
        assert "in a checkout, pip install --no-build-isolation '.[train]'" in run.stderr


def test_help_lists_every_subcommand_and_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for flag in ("--lambda-mse", "--lambda-info", "--lambda-moment", "--batch-size", "--data", "--overwrite"):
        assert flag in printed
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("info", "train", "evaluate", "audit", "demo", "sweep"))


def test_unknown_flag_exits_2():
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--lambda-mes", "1"])
    assert caught.value.code == 2
