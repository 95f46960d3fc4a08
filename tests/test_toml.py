"""Options from a TOML file: they count, flags override them, and mistakes are named."""

import json

import numpy as np
import pytest

from amn_kernels import cli
from amn_kernels.train.config import TrainConfig
from amn_kernels.train.toml import expand_config


def expand(tmp_path, text, *arguments):
    path = tmp_path / "options.toml"
    path.write_text(text)
    return expand_config(["--config", str(path), *arguments], TrainConfig)


def test_values_become_flags(tmp_path):
    flags = expand(
        tmp_path, 'lr = 0.01\nmodel = "gru"\nresidual = true\ncompile = false\nlambda_info = 1', "--seed", "3"
    )
    assert flags == [
        "--lr", "0.01", "--model", "gru", "--residual", "--no-compile", "--lambda-info", "1", "--seed", "3",
    ]  # fmt: skip


@pytest.mark.parametrize("flag", [["--lr", "0.5"], ["--lr=0.5"]])
def test_flags_win(tmp_path, flag):
    assert expand(tmp_path, "lr = 0.01\nseed = 2", *flag) == ["--seed", "2", *flag]
    assert expand(tmp_path, "residual = true", "--no-residual") == ["--no-residual"]


def test_without_the_flag_nothing_changes():
    assert expand_config(["--lr", "1"], TrainConfig) == ["--lr", "1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lamda_info = 1", "unknown option 'lamda_info', did you mean 'lambda_info'?"),
        ("something = 1", "unknown option 'something'"),
        ("lr = [1, 2]", r"lr must be one value, got \[1, 2\]"),
        ("[train]\nlr = 1", "unknown option 'train'"),
        ("lr = ", "can't be read as TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        expand(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.toml: can't be read"):
        expand_config([f"--config={tmp_path / 'nowhere.toml'}"], TrainConfig)
    with pytest.raises(ValueError, match="--config needs a file"):
        expand_config(["--config"], TrainConfig)


@pytest.mark.parametrize("command", ["train", "audit", "demo", "sweep", "replay"])
def test_every_command_with_options_reads_them_from_a_file(tmp_path, capsys, command):
    path = tmp_path / "options.toml"
    path.write_text("no_such_option = 1")
    assert cli.main([command, "--config", str(path)]) == 2
    assert f"{path}: unknown option 'no_such_option'" in capsys.readouterr().err


def test_on_the_command_line(tmp_path, capsys):
    vectors = np.random.default_rng(0).standard_normal((120, 4), dtype=np.float32)
    np.savez(tmp_path / "data.npz", vectors=vectors, article=np.repeat(np.arange(12), 10))
    path = tmp_path / "options.toml"
    path.write_text(f'data = "{tmp_path / "data.npz"}"\nepochs = 2\nlambda_info = 0.25\nbatch_size = 8')
    out = tmp_path / "run"
    assert cli.main(["train", "--config", str(path), "--epochs", "1", "--out", str(out)]) == 0
    saved = json.loads((out / "config.json").read_text())
    assert (saved["epochs"], saved["lambda_info"], saved["batch_size"]) == (1, 0.25, 8)
    path.write_text("probe_steps = 0\nbatch_size = 8\nstrict = true")
    assert cli.main(["audit", "--config", str(path), "--data", str(tmp_path / "data.npz")]) == 0
    assert "(at the start)" not in capsys.readouterr().out
    path.write_text("epoch = 2")
    assert cli.main(["train", "--config", str(path)]) == 2
    assert "unknown option 'epoch', did you mean 'epochs'?" in capsys.readouterr().err
