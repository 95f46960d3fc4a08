"""A run's files: written whole or not at all, also when interrupted, and read with what is wrong named."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_train import RUN_FILES, config_of, data, one_thread, quiet  # noqa: F401  fixtures
from torch import nn

from amn_kernels.data import load_windows
from amn_kernels.train import runs, trainer
from amn_kernels.train.checkpoints import newest_checkpoint
from amn_kernels.train.models import AMN, MODELS
from amn_kernels.train.runs import (
    interrupts_deferred,
    load_history,
    load_run,
    prepare_folder,
    save_config,
    save_epoch,
    write_atomically,
)
from amn_kernels.train.trainer import train


@pytest.fixture
def interrupts():
    """Makes SIGINT raise KeyboardInterrupt; a test run in the background inherits a SIGINT that is ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def contents(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_in_use_is_refused_and_overwrite_leaves_nothing_of_the_old_run(data, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    train(config_of(data, out, epochs=2), quiet())
    before = contents(out)
    with pytest.raises(FileExistsError, match="--overwrite"):
        train(config_of(data, out), quiet())
    assert contents(out) == before
    (out / "notes.txt").write_text("mine")
    prepare_folder(out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    with pytest.raises(FileExistsError, match="is a file"):
        prepare_folder(out / "notes.txt", overwrite=True)


class KilledError(BaseException):
    """In place of kill -9: nothing can catch it."""


def test_an_overwriting_that_is_killed_leaves_nothing_to_go_on_from(data, tmp_path, monkeypatch):  # noqa: F811
    """Before any of what it does to files: the earlier run is whole, or a resumed run is none of it."""
    old = config_of(data, tmp_path / "old", epochs=2)
    train(old, quiet())
    (old.out / "tensorboard").mkdir()

    def dying(operation, moment, operations):
        def call(*arguments, **options):
            if next(operations) == moment:
                raise KilledError
            return operation(*arguments, **options)

        return call

    for moment in itertools.count():
        out = tmp_path / f"killed-{moment}"
        shutil.copytree(old.out, out)
        operations = itertools.count()
        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (shutil, "rmtree"), (Path, "unlink")):
                patch.setattr(owner, name, dying(getattr(owner, name), moment, operations))
            try:
                prepare_folder(out, overwrite=True)
                break
            except KilledError:
                pass
        if contents(out) == contents(old.out):
            continue
        console = quiet()
        try:
            train(dataclasses.replace(old, out=out, resume=True), console)
        except FileExistsError:
            train(dataclasses.replace(old, out=out, overwrite=True), console)
        assert "resumed from" not in console.file.getvalue(), moment
        assert sorted(path.name for path in out.iterdir()) == RUN_FILES
    assert moment > 5
    assert not list(out.iterdir())


def test_a_run_killed_while_its_first_file_is_written_starts_again(data, tmp_path):  # noqa: F811
    config = config_of(data, tmp_path / "run", epochs=1, resume=True)
    child = os.fork()
    if child == 0:
        try:
            runs.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
            prepare_folder(config.out, overwrite=False, resume=True)
            save_config(config.out, config, load_windows(data))
        finally:
            os._exit(1)  # never back into the tests
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    (litter,) = config.out.iterdir()
    assert litter.name.startswith(".config.json.")
    train(config, quiet())
    assert sorted(path.name for path in config.out.iterdir()) == RUN_FILES
    # A run that has checkpoints is rid of it too; what an editor leaves stays.
    for name in (litter.name, ".last.safetensors.abcd1234", ".config.json.swp"):
        (config.out / name).write_text("")
    train(dataclasses.replace(config, epochs=2), quiet())
    assert sorted(path.name for path in config.out.iterdir()) == [".config.json.swp", *RUN_FILES]


def test_bad_data_leaves_an_earlier_run_alone(data, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    train(config_of(data, out, epochs=1), quiet())
    with pytest.raises(FileNotFoundError):
        train(config_of(tmp_path / "nowhere.npz", out, overwrite=True), quiet())
    assert sorted(path.name for path in out.iterdir()) == RUN_FILES


@pytest.mark.usefixtures("interrupts")
def test_interrupt_in_an_epoch_saves_the_update_at_hand_and_says_how_to_go_on(data, tmp_path, monkeypatch):  # noqa: F811
    out, console = tmp_path / "run", quiet()
    epochs = iter(range(1, 9))

    def interrupted(*arguments):
        is_third = next(epochs) == 3
        for step in trainer_epoch(*arguments):
            if is_third and step % 14 == 5:  # of 14 updates
                os.kill(os.getpid(), signal.SIGINT)
            yield step

    trainer_epoch = trainer.train_epoch
    monkeypatch.setattr(trainer, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(data, out, epochs=8), console)
    assert [row["epoch"] for row in load_history(out)] == [1, 2]
    load_run(out)
    assert newest_checkpoint(out / "checkpoints").name == "step-000000033"
    said = console.file.getvalue().replace("\n", " ")
    assert f"interrupted in epoch 3 after 5 of 14 batches; all is saved, --resume --out {out} goes on" in said


@pytest.mark.usefixtures("interrupts")
def test_interrupt_while_saving_waits_until_all_files_are_in_step(data, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "run"
    written = []

    def interrupting(path, content):
        write_atomically(path, content)
        written.append(path.name)
        if written.count("last.safetensors") == 2 and path.name == "last.safetensors":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runs, "write_atomically", interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(data, out, epochs=8), quiet())
    assert written[-1] == "history.jsonl"
    assert [row["epoch"] for row in load_history(out)] == [1, 2]


@pytest.mark.usefixtures("interrupts")
def test_deferred_interrupt_restores_the_handler():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("interrupts")
def test_an_ignored_interrupt_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_deferred():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, step):
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    if step == "write":
        monkeypatch.setattr(runs.os, "fdopen", fail)
    else:
        monkeypatch.setattr(runs.os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new and longer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_killed_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    child = os.fork()
    if child == 0:
        # Between the bytes and the rename, the worst moment.
        runs.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(path, "new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert path.read_text() == "old"


def test_written_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    write_atomically(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_config_survives_the_round_trip(data, tmp_path):  # noqa: F811
    config = config_of(data, tmp_path / "run", epochs=1, lambda_info=0.25, weighting="value")
    train(config, quiet())
    assert load_run(tmp_path / "run").config == config


class Tied(nn.Module):
    """Two layers of the same weights."""

    def __init__(self, dim):
        super().__init__()
        self.first, self.second = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.second.weight = self.first.weight

    def forward(self, context):
        """context: [B, T, D] -> [B, D]."""
        return self.second(self.first(context.mean(dim=1)))


def test_tied_weights_are_saved_and_loaded(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(MODELS, "tied", Tied)
    config = config_of(data, tmp_path / "run", epochs=1, model="tied")
    train(config, quiet())
    model = load_run(config.out).model
    assert model.first.weight is model.second.weight
    train(dataclasses.replace(config, epochs=2, resume=True), quiet())
    assert len(load_history(config.out)) == 2


def test_what_is_not_finite_is_null_in_the_history(tmp_path):
    history = [{"epoch": 1, "loss_mse": math.inf, "top1": math.nan, "lr": 0.5}]
    save_epoch(tmp_path, AMN(8), torch.ones(2, 3, 8), history, is_best=True)
    assert load_history(tmp_path) == [{"epoch": 1, "loss_mse": None, "top1": None, "lr": 0.5}]


def test_damaged_runs_name_the_file(data, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load_run(out)
    train(config_of(data, out, epochs=1), quiet())
    checkpoint = (out / "best.safetensors").read_bytes()
    (out / "best.safetensors").write_bytes(checkpoint[:1000])
    with pytest.raises(ValueError, match=r"best\.safetensors: damaged"):
        load_run(out)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"dim": 9}))
    (out / "best.safetensors").write_bytes(checkpoint)
    with pytest.raises(ValueError, match=r"best\.safetensors: damaged, or not of this model"):
        load_run(out)
    (out / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json: not a run's configuration"):
        load_run(out)
