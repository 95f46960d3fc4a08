"""A training that was killed goes on bit for bit as if it had not been."""

import dataclasses
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import RUN_FILES, config_of, data, one_thread, quiet  # noqa: F401  fixtures

from amn_kernels.train import trainer
from amn_kernels.train.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from amn_kernels.train.models import MODELS, Predictor
from amn_kernels.train.ranks import Ranks
from amn_kernels.train.replay import AMNTwin
from amn_kernels.train.runs import load_history
from amn_kernels.train.trainer import train


class KilledError(BaseException):
    """In place of kill -9: nothing of the training can catch it."""


def die(*_):
    raise KilledError


def killed_after(updates, config, monkeypatch):
    """Trains until so many updates are done, and stops without a word."""
    epoch = trainer.train_epoch

    def dying(*arguments):
        for step in epoch(*arguments):
            yield step
            if step == updates:
                raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", dying)
        with pytest.raises(KilledError):
            train(config, quiet())


def same_course(left, right):
    """Weights, of the best epoch too, and history, but for how long it took."""
    for name in ("last.safetensors", "best.safetensors"):
        a, b = (load_file(folder / name) for folder in (left, right))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in load_history(out)] for out in (left, right)]
    assert rows[0] == rows[1]


VARIANTS = {
    "amn": {},
    "lstm": {"model": "lstm"},
    "gru": {"model": "gru", "residual": True},
    "transformer": {"model": "transformer"},
    "cosine, ema, accumulate": {"schedule": "cosine", "warmup": 3, "ema_decay": 0.9, "accumulate": 3},
    "fp16": {"amp": "fp16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("one_thread")
def test_goes_on_bit_for_bit(data, tmp_path, monkeypatch, variant):  # noqa: F811
    monkeypatch.setattr(Predictor, "HIDDEN", 32)  # checkpoints of the published sizes take a while
    # 14 updates an epoch, or 5 with accumulation; the newest checkpoint after the kill is in the second one.
    options = {"lambda_info": 0.3, "epochs": 3, "checkpoint_every": 3, **VARIANTS[variant]}
    whole = config_of(data, tmp_path / "whole", **options)
    train(whole, quiet())
    broken = dataclasses.replace(whole, out=tmp_path / "broken")
    killed_after(7 if "accumulate" in options else 19, broken, monkeypatch)
    progress = load_checkpoint(newest_checkpoint(broken.out / "checkpoints"))["progress"]
    assert (progress["epoch"], progress["batch"]) == (2, 3 if "accumulate" in options else 4)
    console = quiet()
    train(dataclasses.replace(broken, resume=True), console)
    assert "resumed from" in console.file.getvalue()
    same_course(whole.out, broken.out)


def test_a_finished_run_goes_on_for_more_epochs(data, tmp_path):  # noqa: F811
    whole = config_of(data, tmp_path / "whole", epochs=4, lambda_info=0.3)
    train(whole, quiet())
    part = dataclasses.replace(whole, out=tmp_path / "part", epochs=2)
    train(part, quiet())
    train(dataclasses.replace(part, epochs=4, resume=True), quiet())
    same_course(whole.out, part.out)


def test_other_options_are_refused_by_name(data, tmp_path):  # noqa: F811
    config = config_of(data, tmp_path / "run", epochs=1)
    train(config, quiet())
    with pytest.raises(
        ValueError, match=r"can't be resumed: the run was started with other options: lr 0.002, now 0.1"
    ):
        train(dataclasses.replace(config, lr=0.1, epochs=2, resume=True), quiet())


def test_another_architecture_of_the_same_shapes_is_refused(data, tmp_path, monkeypatch):  # noqa: F811
    config = config_of(data, tmp_path / "run", epochs=1, lr=0.01)
    train(config, quiet())
    monkeypatch.setitem(MODELS, "amn", AMNTwin)
    with pytest.raises(ValueError, match="can't be resumed: its model: the weights fit AMNTwin in name and shape, but"):
        train(dataclasses.replace(config, epochs=2, resume=True), quiet())


def test_other_data_under_the_same_name_are_refused(data, tmp_path):  # noqa: F811
    path = tmp_path / "data.npz"
    shutil.copy(data, path)
    config = config_of(path, tmp_path / "run", epochs=1)
    train(config, quiet())
    longer = dataclasses.replace(config, epochs=2, resume=True)
    with np.load(data) as arrays:
        vectors, article = arrays["vectors"], arrays["article"]
    for count, other in ((266, vectors[:-24]), (280, vectors[::-1])):
        path.unlink()
        np.savez(path, vectors=other, article=article[: len(other)])
        words = rf"started with other data: .*data\.npz had 280 windows, now it has {count}, and not the same"
        with pytest.raises(ValueError, match=words):
            train(longer, quiet())
    shutil.copy(data, path)
    train(longer, quiet())
    checkpoint = newest_checkpoint(config.out / "checkpoints")
    state = load_checkpoint(checkpoint)
    del state["data"]
    shutil.rmtree(checkpoint)
    save_checkpoint(checkpoint.parent, state["progress"]["step"], state, keep=1)
    with pytest.raises(ValueError, match="can't be resumed: it does not say which data it is of"):
        train(dataclasses.replace(longer, epochs=3), quiet())


def test_a_resume_without_the_weights_of_the_best_epoch_is_refused(data, tmp_path):  # noqa: F811
    """They are no part of a checkpoint: where no later epoch is better, the run could not be evaluated."""
    config = config_of(data, tmp_path / "run", epochs=1)
    train(config, quiet())
    (config.out / "best.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"best\.safetensors: no such file; .* weights of the best epoch, 1"):
        train(dataclasses.replace(config, epochs=2, resume=True), quiet())
    assert [row["epoch"] for row in load_history(config.out)] == [1]


def test_processes_that_would_go_on_from_different_places_are_refused(data, tmp_path, monkeypatch):  # noqa: F811
    """As where each has a disk of its own."""
    config = config_of(data, tmp_path / "run", epochs=1)
    train(config, quiet())
    monkeypatch.setattr(Ranks, "gather", lambda self, x: [x, "step-000000005"])
    with pytest.raises(ValueError, match=r"same files .* checkpoints are \['step-000000014', 'step-000000005'\]"):
        train(dataclasses.replace(config, epochs=2, resume=True), quiet())
    assert len(load_history(config.out)) == 1


@pytest.mark.parametrize("moment", ["in the first epoch", "between the first epoch's files and its checkpoint"])
def test_a_run_killed_before_its_first_checkpoint_starts_again(data, tmp_path, monkeypatch, moment):  # noqa: F811
    whole = config_of(data, tmp_path / "whole", epochs=2)
    train(whole, quiet())
    broken = dataclasses.replace(whole, out=tmp_path / "broken")
    if moment == "in the first epoch":
        killed_after(3, broken, monkeypatch)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "save", die)
            with pytest.raises(KilledError):
                train(broken, quiet())
    train(dataclasses.replace(broken, resume=True), quiet())
    same_course(whole.out, broken.out)
    shutil.rmtree(broken.out / "checkpoints")
    with pytest.raises(FileExistsError, match="isn't empty"):  # a run of several epochs isn't given up so
        train(dataclasses.replace(broken, resume=True), quiet())


def train_and_tell(config, tell, most=3):
    """The child of a test: trains, tells each checkpoint that it has saved, and after so many waits to be killed."""
    save, saves = trainer.save, itertools.count(1)

    def saving(training):
        save(training)
        os.write(tell, b"s")
        if next(saves) == most:
            signal.pause()

    trainer.save = saving
    try:
        train(config, quiet())
    finally:
        os._exit(1)  # never back into the tests


@pytest.mark.usefixtures("one_thread")
def test_kills_at_50_random_moments_do_not_change_the_course(data, tmp_path):  # noqa: F811
    """kill -9 in updates, in saves of checkpoints and of an epoch's files; the run is resumed after each."""
    # 14 updates and as many saves an epoch; each life makes one to three, however fast it is: at most 150 of 196.
    whole = config_of(data, tmp_path / "whole", epochs=14, lambda_info=0.3, checkpoint_every=1, keep=1, patience=0)
    began = time.perf_counter()
    train(whole, quiet())
    update = (time.perf_counter() - began) / (14 * 14)
    broken = dataclasses.replace(whole, out=tmp_path / "broken", resume=True)
    moments = random.Random(0)
    for _ in range(50):
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            train_and_tell(broken, tell)
        os.close(tell)
        assert os.read(told, 1) == b"s"
        time.sleep(moments.uniform(0, 2 * update))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
    assert 1 < len(load_history(broken.out)) < 14
    train(broken, quiet())
    same_course(whole.out, broken.out)
    assert sorted(path.name for path in broken.out.iterdir()) == RUN_FILES  # nothing of writes that were cut short


def test_resume_without_a_run_starts_one(data, tmp_path):  # noqa: F811
    config = config_of(data, tmp_path / "run", epochs=1, resume=True)
    train(config, quiet())
    assert len(load_history(config.out)) == 1


def test_kill_9_and_resume_on_the_command_line(data, tmp_path):  # noqa: F811
    def start(out, *more):
        command = [sys.executable, "-m", "amn_kernels.train", "--data", data, "--out", out, "--batch-size", "16"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        options = ["--epochs", "6", "--threads", "1", "--checkpoint-every", "3", "--lambda-info", "0.5", *more]
        return subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, text=True)

    assert start(tmp_path / "whole").wait() == 0
    process = start(tmp_path / "broken")
    for line in process.stdout:
        if line.startswith("epoch  2"):
            os.kill(process.pid, signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    assert start(tmp_path / "broken", "--resume").wait() == 0
    same_course(tmp_path / "whole", tmp_path / "broken")


def train_on(ranks, data, out, *more):  # noqa: F811
    """Two epochs of the trainer, under torchrun where there are several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    common = ["--data", data, "--batch-size", "16", "--epochs", "2", "--threads", "1", "--lambda-info", "0.5"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, "-m", "amn_kernels.train", *common, "--out", out, *more]
    subprocess.run(command, env=environment, check=True, timeout=300)


@pytest.fixture(scope="module")
def on_two(data, tmp_path_factory):  # noqa: F811
    """Folder of a run on two processes, with all its checkpoints."""
    out = tmp_path_factory.mktemp("runs") / "two"
    train_on(2, data, out, "--checkpoint-every", "5", "--keep", "100")
    return out


def test_two_processes_train_like_one(data, on_two, tmp_path):  # noqa: F811
    """Under torchrun every batch is shared out, and the loss is that of the whole batch."""
    train_on(1, data, tmp_path / "one")
    histories = [load_history(out) for out in (tmp_path / "one", on_two)]
    for row, other in zip(*histories, strict=True):
        # The same sums in another order, over 28 updates of AdamW.
        assert row["validation_cosine"] == pytest.approx(other["validation_cosine"], abs=1e-4)
        assert row["loss_infonce"] == pytest.approx(other["loss_infonce"], rel=1e-4)
    assert not list(on_two.rglob(".*"))  # no write of either process is left unfinished


def test_two_processes_go_on_bit_for_bit(data, on_two, tmp_path):  # noqa: F811
    # What a kill after update 5 leaves, of 14 in an epoch.
    shutil.copytree(on_two / "checkpoints" / "step-000000005", tmp_path / "broken" / "checkpoints" / "step-000000005")
    train_on(2, data, tmp_path / "broken", "--resume")
    same_course(on_two, tmp_path / "broken")
