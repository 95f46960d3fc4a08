"""Training: what it learns, its history, repeatability, and what may be asked of it."""

import contextlib
import dataclasses
import io

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

from amn_kernels import FusedSeqLoss, LossStats
from amn_kernels.data import IndexedWindows, split_windows
from amn_kernels.train import config as config_module
from amn_kernels.train import trainer
from amn_kernels.train.checkpoints import check_probe, load_checkpoint, newest_checkpoint
from amn_kernels.train.config import TrainConfig
from amn_kernels.train.models import MODELS, Predictor, build_model
from amn_kernels.train.ranks import Ranks, own_device
from amn_kernels.train.runs import load_history, load_run
from amn_kernels.train.trainer import train
from amn_kernels.train.training import make_batches, make_training

RUN_FILES = ["best.safetensors", "checkpoints", "config.json", "history.jsonl", "last.safetensors"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Vectors that a trained model can predict better than the mean: each is the last one, turned by a fixed angle."""
    order = np.random.default_rng(0)
    angle, dim = 0.9, 8
    turn = np.kron(np.eye(dim // 2), [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    vectors = []
    for _ in range(40):
        vector = order.standard_normal(dim)
        for _ in range(12):
            vectors.append(vector / np.linalg.norm(vector))
            vector = turn @ vector
    path = tmp_path_factory.mktemp("data") / "turns.npz"
    np.savez(path, vectors=np.array(vectors, dtype=np.float32), article=np.repeat(np.arange(40), 12))
    return path


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def config_of(data, out, **changes) -> TrainConfig:
    return dataclasses.replace(TrainConfig(data=data, out=out, epochs=3, batch_size=16, lr=2e-3), **changes)


def test_training_beats_the_mean_of_the_context_where_there_is_something_to_learn(data, tmp_path):
    history = train(config_of(data, tmp_path / "run", epochs=12), quiet())
    # The mean of vectors on a circle points to its middle: an untrained model's cosine is negative here.
    assert history[-1]["validation_cosine"] > 0.8


def test_history_and_files(data, tmp_path):
    out = tmp_path / "run"
    console = quiet()
    options = {"lambda_mse": 0.5, "lambda_info": 0.25, "lambda_cosine": 0.125, "weighting": "fixed"}
    history = train(config_of(data, out, **options), console)
    assert sorted(path.name for path in out.iterdir()) == RUN_FILES
    assert load_history(out) == history
    assert [row["epoch"] for row in history] == [1, 2, 3]
    lambdas = {"mse": 0.5, "infonce": 0.25, "cosine": 0.125}
    for row in history:
        assert {name for name in row if name.startswith("loss_")} == {f"loss_{term}" for term in lambdas}
        for term, weight in lambdas.items():
            assert row[f"weight_{term}"] == pytest.approx(weight)
            assert row[f"contribution_{term}"] == pytest.approx(weight * row[f"loss_{term}"], rel=1e-5)
        assert sum(row[f"share_{term}"] for term in lambdas) == pytest.approx(1)
        assert 0 < row["gradient_cosine_cosine_infonce"] <= 1
        assert row["lr"] == 2e-3
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("epoch")]
    assert len(lines) == 3
    for line, row in zip(lines, history, strict=True):
        contribution = row["contribution_infonce"]
        assert f"infonce {row['loss_infonce']:.4g} x 0.25 = {contribution:.3g} ({row['share_infonce']:.1%})" in line
        assert f"cosine train {row['train_cosine']:.4f} validation {row['validation_cosine']:.4f}" in line


def test_a_row_of_the_history_has_the_means_of_its_batches(data, tmp_path, monkeypatch):
    told, as_dict = [], LossStats.as_dict
    monkeypatch.setattr(LossStats, "as_dict", lambda stats: told.append(as_dict(stats)) or told[-1])
    history = train(config_of(data, tmp_path / "run", lambda_info=0.25, lambda_cosine=0.125), quiet())
    batches = len(told) // len(history)
    assert batches > 1
    for number, row in enumerate(history):
        of_epoch = told[number * batches : (number + 1) * batches]
        for name in told[0]:
            values = [numbers[name] for numbers in of_epoch]
            assert row[name] == pytest.approx(np.mean(values), rel=1e-9), name


def test_balanced_terms_pull_in_proportion_to_their_lambdas(data, tmp_path):
    # With small steps, because running norms lag behind gradients that change fast.
    history = train(config_of(data, tmp_path / "run", lambda_mse=0.75, lambda_info=0.25, lr=1e-4), quiet())
    for row in history:
        assert row["share_infonce"] == pytest.approx(0.25, abs=0.1)
        assert row["weight_mse"] == pytest.approx(0.75)
        # The weights move with the gradients: fixed ones would keep 0.25.
        assert row["weight_infonce"] < 0.1
    assert history[0]["weight_infonce"] != history[-1]["weight_infonce"]


def test_saved_criterion_goes_on_with_the_same_weights(data, tmp_path):
    """The state in the run's folder, loaded into a new loss, gives the weights that the old one goes on with."""
    config = config_of(data, tmp_path / "run", epochs=2, lambda_info=0.5)
    kept = []

    def keep(training, *arguments):
        kept[:] = [training.criterion]
        return epoch(training, *arguments)

    epoch = trainer.train_epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_epoch", keep)
        train(config, quiet())
    (criterion,) = kept
    resumed = config.make_criterion()
    fresh = config.make_criterion()
    resumed.load_state_dict(load_checkpoint(newest_checkpoint(config.out / "checkpoints"))["criterion"])
    windows = trainer.load_windows(data)
    for start in range(0, 80, 16):
        context, target = windows.batch(np.arange(start, start + 16))
        weights = []
        for loss in (criterion, resumed, fresh):
            loss(context.mean(dim=1).requires_grad_(), target)
            weights.append(loss.stats.as_dict()["weight_infonce"])
        assert weights[0] == weights[1]
        assert weights[0] != weights[2]


def test_best_checkpoint_is_the_epoch_with_the_best_validation_cosine(data, tmp_path):
    out = tmp_path / "run"
    history = train(config_of(data, out, epochs=4, lambda_info=5.0, lr=0.05), quiet())
    best = max(history, key=lambda row: row["validation_cosine"])
    assert [row["epoch"] for row in history if row["is_best"]][-1] == best["epoch"]
    windows = trainer.load_windows(data)
    config, dim, context, fingerprint, model = load_run(out)
    assert (config.out, dim, context, fingerprint, model.training) == (out, 8, 5, windows.fingerprint, False)
    rows = trainer.split_windows(windows).validation
    assert trainer.mean_cosine(model, windows, rows) == pytest.approx(best["validation_cosine"], abs=1e-6)
    check_probe(out / "last.safetensors", model, load_file(out / "last.safetensors"))
    assert trainer.mean_cosine(model, windows, rows) == pytest.approx(history[-1]["validation_cosine"], abs=1e-6)


def test_same_seed_same_run_other_seed_other_run(data, tmp_path):
    results = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        history = train(config_of(data, tmp_path / name, seed=seed, lambda_info=0.1), quiet())
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in history]
        results.append((rows, (tmp_path / name / "last.safetensors").read_bytes()))
    assert results[0] == results[1]
    assert results[0][0] != results[2][0]


def test_an_epoch_takes_one_clipped_gradient_step_a_batch(data):
    windows = trainer.load_windows(data)
    batches = make_batches(np.arange(48), 16)
    torch.manual_seed(0)
    trained, expected = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(40, 8)) for _ in range(2))
    expected.load_state_dict(trained.state_dict())
    training = make_training(TrainConfig(clip_norm=0.01), windows, split_windows(windows), torch.device("cpu"), Ranks())
    training.model = training.running = trained
    training.optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    training.criterion = FusedSeqLoss(mse=1.0, weighting="fixed")
    assert list(trainer.train_epoch(training, batches)) == [1, 2, 3]
    for rows in batches:
        context, target = windows.batch(rows)
        gradients = torch.autograd.grad(torch.nn.functional.mse_loss(expected(context), target), expected.parameters())
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient * min(1, 0.01 / norm)
    for left, right in zip(trained.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [6, 7])
def test_accumulated_batches_step_like_their_mean(data, count):
    """Also where the last update of an epoch is of fewer batches: 7 by threes."""
    windows = trainer.load_windows(data)
    batches = make_batches(np.arange(16 * count), 16)
    config = TrainConfig(accumulate=3, clip_norm=1e6)
    training = make_training(config, windows, split_windows(windows), torch.device("cpu"), Ranks())
    model, expected = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(40, 8)) for _ in range(2))
    expected.load_state_dict(model.state_dict())
    training.model = training.running = model
    training.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training.criterion = FusedSeqLoss(mse=1.0, weighting="fixed")
    assert list(trainer.train_epoch(training, batches)) == list(range(1, -(-count // 3) + 1))
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for first in range(0, count, 3):
        optimizer.zero_grad()
        context, target = windows.batch(np.concatenate(batches[first : first + 3]))
        torch.nn.functional.mse_loss(expected(context), target).backward()
        optimizer.step()
    for left, right in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_every_epoch_takes_the_training_windows_in_a_new_order(data, tmp_path, monkeypatch):
    epochs = []

    def record(training, batches):
        epochs.append(np.concatenate(list(batches)))
        return []

    monkeypatch.setattr(trainer, "train_epoch", record)
    train(config_of(data, tmp_path / "run", epochs=2, batch_size=1), quiet())
    split = trainer.split_windows(trainer.load_windows(data))
    for rows in epochs:
        np.testing.assert_array_equal(np.sort(rows), split.train)
        assert (rows != split.train).any()
    assert (epochs[0] != epochs[1]).any()


def test_early_stopping_counts_epochs_without_a_better_cosine(data, tmp_path, monkeypatch):
    # Validation and training cosine of epochs 1, 2, ...
    cosines = iter([0.1, 0, 0.3, 0, 0.2, 0, 0.3, 0, 0.9, 0])
    monkeypatch.setattr(trainer, "mean_cosine", lambda *_: next(cosines))
    history = train(config_of(data, tmp_path / "run", epochs=20, patience=2), quiet())
    assert [row["is_best"] for row in history] == [True, True, False, False]


@pytest.mark.parametrize("cosine", [0.5, -0.5])
def test_learning_rate_is_halved_on_a_plateau(data, tmp_path, monkeypatch, cosine):
    monkeypatch.setattr(trainer, "mean_cosine", lambda *_: cosine)
    history = train(config_of(data, tmp_path / "run", epochs=6, patience=0), quiet())
    # Epoch 1 is the best; the third without a better one halves the rate of the next.
    assert [row["lr"] for row in history] == [2e-3] * 4 + [1e-3] * 2


@pytest.mark.parametrize("start", [0.5, -0.5])
def test_learning_rate_stays_while_the_cosine_rises_however_little(data, tmp_path, monkeypatch, start):
    # Validation and training cosine of epochs 1, 2, ...
    cosines = iter([start + 1e-5 * epoch for epoch in range(6) for _ in range(2)])
    monkeypatch.setattr(trainer, "mean_cosine", lambda *_: next(cosines))
    history = train(config_of(data, tmp_path / "run", epochs=6, patience=0), quiet())
    assert all(row["is_best"] for row in history)
    assert [row["lr"] for row in history] == [2e-3] * 6


def test_train_cosine_is_measured_like_the_validation_cosine(data, tmp_path, monkeypatch):
    seen = []

    def record(model, windows, rows, device):
        seen.append((model.training, rows))
        return 0.5

    monkeypatch.setattr(trainer, "mean_cosine", record)
    train(config_of(data, tmp_path / "run", epochs=2), quiet())
    assert not any(training for training, _ in seen)
    split = trainer.split_windows(trainer.load_windows(data))
    for validation, subset in (seen[:2], seen[2:]):
        np.testing.assert_array_equal(validation[1], split.validation)
        assert len(subset[1]) == len(split.validation)
        assert np.isin(subset[1], split.train).all()
    np.testing.assert_array_equal(seen[1][1], seen[3][1])


def test_batches_cover_the_rows_and_leave_out_a_short_last_one():
    assert [batch.tolist() for batch in make_batches(np.arange(7), 3)] == [[0, 1, 2], [3, 4, 5]]
    assert [batch.tolist() for batch in make_batches(np.arange(2), 3)] == [[0, 1]]


def test_divergence_is_reported_and_leaves_no_checkpoint_of_it(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "mean_cosine", lambda *_: float("nan"))
    with pytest.raises(FloatingPointError, match="diverged in epoch 1"):
        train(config_of(data, tmp_path / "run"), quiet())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json"]


@pytest.mark.parametrize(
    ("options", "poisoned", "kept"),  # of 14 updates an epoch
    [
        ({"checkpoint_every": 1}, 18, ["step-000000016", "step-000000017"]),
        # In the last update, with a mean of the weights that lags behind: the epoch's validation is good.
        ({"ema_decay": 0.9}, 28, ["step-000000014"]),
    ],
)
def test_the_last_good_checkpoints_stay_when_training_diverges(data, tmp_path, monkeypatch, options, poisoned, kept):
    """A NaN in a gradient is in all weights after the clipping of norms."""
    config = config_of(data, tmp_path / "run", **options)
    clip, average, calls = trainer.nn.utils.clip_grad_norm_, AveragedModel.update_parameters, []

    def poisoning(parameters, *arguments):
        parameters = list(parameters)
        calls.append(None)
        if len(calls) == poisoned:
            parameters[0].grad[0, 0] = torch.nan
        return clip(parameters, *arguments)

    monkeypatch.setattr(trainer.nn.utils, "clip_grad_norm_", poisoning)
    monkeypatch.setattr(
        AveragedModel, "update_parameters", lambda *given: average(*given) if len(calls) != poisoned else None
    )
    with pytest.raises(FloatingPointError, match="diverged in epoch 2: its predictions aren't finite"):
        train(config, quiet())
    checkpoints = sorted((config.out / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == kept
    assert all(weight.isfinite().all() for path in checkpoints for weight in load_checkpoint(path)["model"].values())
    train(dataclasses.replace(config, resume=True), quiet())
    assert len(load_history(config.out)) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"patience": -1}, "patience must be at least 0"),
        ({"lr": 0.0}, "lr must be positive and finite"),
        ({"lr": float("nan")}, "lr must be positive and finite"),
        ({"clip_norm": float("inf")}, "clip_norm must be positive and finite"),
        ({"weight_decay": -1.0}, "weight_decay must be non-negative"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"warmup": 10}, "warmup needs schedule cosine, got plateau"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"resume": True, "overwrite": True}, "resume and overwrite contradict"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*63\), got -1"),
        ({"seed": 2**63}, r"seed must be in \[0, 2\*\*63\), got 9223372036854775808"),
    ],
)
def test_options_that_cannot_be_trained_with(change, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**change)


def test_the_largest_seed_can_be_trained_with(data, tmp_path):
    assert len(train(config_of(data, tmp_path / "run", epochs=1, seed=2**63 - 1), quiet())) == 1


def test_every_option_reaches_the_loss_and_the_optimiser(data, tmp_path):
    common = {"lambda_info": 0.1, "epochs": 1}
    losses = []
    for name, changes in (
        ("base", {}),
        ("fixed", {"weighting": "fixed"}),
        ("value", {"weighting": "value"}),
        ("temperature", {"temperature": 0.5}),
        ("weight_decay", {"weight_decay": 5.0}),
        ("clip_norm", {"clip_norm": 1e-6}),
        ("moment", {"lambda_moment": 0.5}),
        ("variance", {"lambda_variance": 0.5}),
        ("accumulate", {"accumulate": 2}),
        ("cosine", {"schedule": "cosine"}),
        ("warmup", {"schedule": "cosine", "warmup": 5}),
        ("bf16", {"amp": "bf16"}),
        ("fp16", {"amp": "fp16"}),
        ("lstm", {"model": "lstm"}),
        ("residual", {"model": "lstm", "residual": True}),
    ):
        (row,) = train(config_of(data, tmp_path / name, **common, **changes), quiet())
        losses.append((row["loss_mse"], row["loss_infonce"]))
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_in_half_precision(data, tmp_path, monkeypatch, model, amp):
    monkeypatch.setattr(Predictor, "HIDDEN", 64)
    cosines = [
        train(config_of(data, tmp_path / each, model=model, amp=each, epochs=1), quiet())[-1]["validation_cosine"]
        for each in ("off", amp)
    ]
    assert cosines[0] != cosines[1]
    assert cosines[0] == pytest.approx(cosines[1], abs=0.01)


def test_a_compiled_model_trains_like_the_plain_one(data, tmp_path):
    histories = [
        train(config_of(data, tmp_path / str(compiled), epochs=2, lambda_info=0.3, compile=compiled), quiet())
        for compiled in (False, True)
    ]
    for plain, compiled in zip(*histories, strict=True):
        assert compiled["validation_cosine"] == pytest.approx(plain["validation_cosine"], abs=1e-4)
    load_run(tmp_path / "True")  # its weights have the plain model's names


def test_unknown_device_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="device 'abacus' can't be used"):
        train(config_of(data, tmp_path / "run", device="abacus"), quiet())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("processes", "batch_size", "rows"), [(17, 16, 16), (225, 1000, 224)])
def test_more_processes_than_a_batch_has_windows_are_refused(data, tmp_path, monkeypatch, processes, batch_size, rows):
    monkeypatch.setattr(trainer, "connected_ranks", lambda _: contextlib.nullcontext(Ranks(0, processes)))
    with pytest.raises(ValueError, match=f"a window for each of the {processes} processes, it has {rows}"):
        train(config_of(data, tmp_path / "run", batch_size=batch_size), quiet())
    assert not (tmp_path / "run").exists()


def test_each_of_several_processes_has_a_gpu_of_its_own(monkeypatch):
    numbered, cuda, cpu = (torch.device(name) for name in ("cuda:0", "cuda", "cpu"))
    assert [own_device(device) for device in (numbered, cuda, cpu)] == [numbered, cuda, cpu]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [own_device(device) for device in (cuda, cpu)] == [torch.device("cuda:1"), cpu]
    with pytest.raises(ValueError, match=r"device must be cuda for several processes, .* got cuda:0"):
        trainer.check_device("cuda:0")


# In float32 a transformer makes much of the last place: where a unit of its ReLUs crosses 0 in one run and not in the
# other, the difference grows a hundredfold in a step, as it does from a start that differs by 1e-7. Not so in float64.
@pytest.mark.parametrize(
    ("model", "dtype", "tolerance"),
    [
        ("amn", torch.float32, 1e-5),
        ("lstm", torch.float32, 1e-5),
        ("gru", torch.float32, 1e-5),
        ("transformer", torch.float32, 2e-3),
        ("transformer", torch.float64, 1e-5),
    ],
)
def test_compiled_and_plain_loss_train_alike(data, tmp_path, monkeypatch, model, dtype, tolerance):
    """The same course in validation cosine over five epochs, whichever backend computes the loss."""
    batch = IndexedWindows.batch
    monkeypatch.setattr(Predictor, "HIDDEN", 64)
    monkeypatch.setattr(config_module, "build_model", lambda *args, **options: build_model(*args, **options).to(dtype))
    monkeypatch.setattr(IndexedWindows, "batch", lambda self, rows: tuple(x.to(dtype) for x in batch(self, rows)))
    histories = []
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("AMN_KERNELS_BACKEND", backend)
        config = config_of(data, tmp_path / backend, model=model, epochs=5, lambda_info=0.5, lr=1e-3)
        histories.append([row["validation_cosine"] for row in train(config, quiet())])
    assert histories[0] == pytest.approx(histories[1], abs=tolerance)
