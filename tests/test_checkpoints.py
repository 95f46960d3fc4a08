"""Checkpoints: the round trip, rotation, kills at any moment, damage, and the probe that knows an architecture."""

import itertools
import os
import random
import signal
import time

import pytest
import torch
from torch import nn

from amn_kernels.train.checkpoints import (
    check_probe,
    load_checkpoint,
    newest_checkpoint,
    probe_tensors,
    save_checkpoint,
)
from amn_kernels.train.models import AMN
from amn_kernels.train.replay import AMNTwin


def state_of(step):
    return {"step": step, "weights": torch.full((3, 4), float(step)), "nested": {1: [None, {"x": 2.5}], "a": "b"}}


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path, 7, state_of(7), keep=1)
    state = load_checkpoint(newest_checkpoint(tmp_path))
    assert torch.equal(state.pop("weights"), torch.full((3, 4), 7.0))
    assert state == {"step": 7, "nested": {1: [None, {"x": 2.5}], "a": "b"}}


def test_state_of_an_optimiser_goes_on_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]

    def update(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    update(models[0], optimizers[0], torch.randn(4, 3))
    save_checkpoint(tmp_path, 1, {"model": models[0].state_dict(), "optimizer": optimizers[0].state_dict()}, keep=1)
    state = load_checkpoint(newest_checkpoint(tmp_path))
    models[1].load_state_dict(state["model"])
    optimizers[1].load_state_dict(state["optimizer"])
    x = torch.randn(4, 3)
    for model, optimizer in zip(models, optimizers, strict=True):
        update(model, optimizer, x)
    assert torch.equal(models[0].weight, models[1].weight)


def test_only_the_newest_are_kept(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (1, 5, 20, 100):
        save_checkpoint(tmp_path, step, state_of(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000020", "step-000000100"]
    assert load_checkpoint(newest_checkpoint(tmp_path))["step"] == 100


def test_a_checkpoint_that_is_there_stays_as_it_is(tmp_path):
    path = save_checkpoint(tmp_path, 1, state_of(1), keep=1)
    before = (path / "tensors.safetensors").stat().st_mtime_ns
    save_checkpoint(tmp_path, 1, state_of(1), keep=1)
    assert (path / "tensors.safetensors").stat().st_mtime_ns == before


def test_what_cannot_be_saved_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(TypeError, match=r"nested\.model can't be saved: Linear"):
        save_checkpoint(tmp_path, 1, {"nested": {"model": nn.Linear(1, 1)}}, keep=1)
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_damage_is_an_error_that_names_the_file(tmp_path, name, damage):
    path = save_checkpoint(tmp_path, 1, state_of(1), keep=1) / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else os.urandom(len(data)))
    with pytest.raises(ValueError, match=f"{name}: damaged"):
        load_checkpoint(newest_checkpoint(tmp_path))


def save_forever(folder, last, tell):
    """The child of a test: saves step after step and tells each one that is done."""
    try:
        # A fork has none of the pool's threads, and would wait for them.
        torch.set_num_threads(1)
        for step in itertools.count(last + 1):
            save_checkpoint(folder, step, {"step": step, "weights": torch.full((200, 500), float(step))}, keep=2)
            os.write(tell, step.to_bytes(8, "little"))
    finally:
        os._exit(1)  # never back into the tests


def test_kills_at_random_moments_lose_nothing(tmp_path):
    """A child saves until it is killed, 60 times, at a random moment of the second to third save."""
    began = time.perf_counter()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "weights": torch.zeros(200, 500)}, keep=2)
    seconds = (time.perf_counter() - began) / 2
    moments, last, cut_short = random.Random(0), 2, 0
    for _ in range(60):
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            save_forever(tmp_path, last, tell)
        os.close(tell)
        done = [os.read(told, 8)]
        time.sleep(moments.uniform(0, 2 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while data := os.read(told, 8):
            done.append(data)
        os.close(told)
        cut_short += any(tmp_path.glob(".step-*"))
        state = load_checkpoint(newest_checkpoint(tmp_path))
        assert state["step"] >= int.from_bytes(done[-1], "little") > last
        assert (state["weights"] == state["step"]).all()
        last = state["step"]
    assert cut_short > 10  # many kills were in the middle of a save, before its rename or while old ones went
    save_checkpoint(tmp_path, last + 1, state_of(last + 1), keep=2)
    assert len(list(tmp_path.iterdir())) == 2  # what the killed ones left is gone


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def test_a_twin_with_the_same_shapes_is_refused(tmp_path):
    """Weights of AMN load into a class without its baseline and attention; their predictions give them away."""
    model, contexts = randomised(AMN(8)), torch.randn(4, 5, 8)
    tensors = {**model.state_dict(), **probe_tensors(model, contexts)}
    check_probe(tmp_path / "own", AMN(8), tensors)
    with pytest.raises(ValueError, match="the weights fit AMNTwin in name and shape, but its predictions are off"):
        check_probe(tmp_path / "twin", AMNTwin(8), tensors)
    with pytest.raises(ValueError, match=r"other: damaged, or not of this model"):
        check_probe(tmp_path / "other", AMN(9), tensors)
    with pytest.raises(ValueError, match=r"bare: damaged, or not of this model .'probe\.context'"):
        check_probe(tmp_path / "bare", AMN(8), model.state_dict())


def test_predictions_that_are_not_finite_are_no_other_architecture(tmp_path):
    model, contexts = randomised(AMN(8)), torch.randn(4, 5, 8)
    nn.init.constant_(model.residual[-1].bias, torch.nan)
    tensors = {**model.state_dict(), **probe_tensors(model, contexts)}
    with pytest.raises(ValueError, match="nan: damaged, or of a training that diverged: its saved predictions aren't"):
        check_probe("nan", AMN(8), tensors)


def test_probes_are_predicted_without_tf32():
    class Recorder(nn.Module):
        def forward(self, context):
            seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
            return context[:, -1]

    seen, before = [], (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32)
    probe_tensors(Recorder(), torch.randn(4, 5, 8))
    assert seen == [(True, False)]
    assert (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32) == before
