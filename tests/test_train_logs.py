"""What a training says: the bar with the time left, and the scalars for TensorBoard."""

import dataclasses
import io
import itertools
import re
import sys

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import RUN_FILES, config_of, data, one_thread, quiet  # noqa: F401  fixtures
from test_train_resume import KilledError

from amn_kernels.train import trainer
from amn_kernels.train.logs import progress_bar
from amn_kernels.train.runs import load_history
from amn_kernels.train.trainer import train


def terminal(**options) -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None, **options)


def test_bar_counts_the_batches_of_all_epochs_and_says_what_time_is_left():
    now = [0.0]
    console = terminal(get_time=lambda: now[0])
    with progress_bar(console, epochs=3, batches=10) as show:
        show(2, 4)  # resumed: 14 of 30 are done, of which nothing says how long they took
        for done in range(5, 9):
            now[0] += 30.0
            show(2, done)
    last = [line for line in console.file.getvalue().splitlines() if "epoch 2/3" in line][-1]
    assert re.search(r"18/30\s+0:06:00 left", last), last  # 12 more of 30 s


def test_bar_is_for_terminals_only(data, tmp_path):  # noqa: F811
    for console in (quiet(), terminal()):
        train(config_of(data, tmp_path / str(console.is_terminal), epochs=2), console)
        assert ("28/28" in console.file.getvalue()) == console.is_terminal  # 2 epochs of 14 batches


def test_tensorboard_has_the_history(data, tmp_path):  # noqa: F811
    config = config_of(data, tmp_path / "run", epochs=2, lambda_info=0.5, tensorboard=True)
    train(config, quiet())
    train(dataclasses.replace(config, epochs=3, resume=True), quiet())
    events = EventAccumulator(str(config.out / "tensorboard")).Reload()
    rows = load_history(config.out)
    assert set(events.Tags()["scalars"]) == rows[0].keys() - {"epoch"}
    for name in ("validation_cosine", "weight_infonce", "lr"):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx([row[name] for row in rows], rel=1e-6)
    train(dataclasses.replace(config, epochs=1, overwrite=True), quiet())
    events = EventAccumulator(str(config.out / "tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("lr")] == [1]


@pytest.mark.parametrize("moment", ["save", "epoch_line"])  # just before the epoch's checkpoint, and just after
def test_tensorboard_misses_no_epoch_of_a_killed_run(data, tmp_path, monkeypatch, moment):  # noqa: F811
    config = config_of(data, tmp_path / "run", epochs=3, tensorboard=True)
    calls, done = itertools.count(1), getattr(trainer, moment)

    def dying(*arguments):
        if next(calls) == 2:
            raise KilledError
        return done(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, moment, dying)
        with pytest.raises(KilledError):
            train(config, quiet())
    train(dataclasses.replace(config, resume=True), quiet())
    events = EventAccumulator(str(config.out / "tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("lr")] == [1, 2, 3]


def test_without_tensorboards_package_an_earlier_run_stays(data, tmp_path, monkeypatch):  # noqa: F811
    config = config_of(data, tmp_path / "run", epochs=1)
    train(config, quiet())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard needs a package"):
        train(dataclasses.replace(config, overwrite=True, tensorboard=True), quiet())
    assert sorted(path.name for path in config.out.iterdir()) == RUN_FILES
