"""The state of the weighting: saved, loaded, cast and reset."""

import pytest
import torch
from error_rule import make_rows
from safetensors import torch as safetensors
from test_weighting import balanced, observe, step  # noqa: F401

from amn_kernels import FusedSeqLoss, extra_state


def test_state_round_trip_continues_as_if_uninterrupted():
    pred, target = make_rows(40, 8)

    def run(criterion, steps):
        for k in steps:
            criterion((pred * (1 + k)).requires_grad_(), target)
        return criterion.stats.weights

    options = {"mse": 0.5, "infonce": 0.5, "weighting": "gradient"}
    whole = run(FusedSeqLoss(**options), range(12))
    first, second = FusedSeqLoss(**options), FusedSeqLoss(**options)
    run(first, range(6))
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(second, range(6, 12)), whole)


def test_state_is_of_tensors_alone_and_survives_safetensors(tmp_path):
    first, second = (FusedSeqLoss(mse=0.5, infonce=0.5) for _ in range(2))
    pred, target = make_rows(20, 8)
    first(pred.requires_grad_(), target)
    safetensors.save_file(first.state_dict(), tmp_path / "loss.safetensors")
    second.load_state_dict(safetensors.load_file(tmp_path / "loss.safetensors"))
    assert second.weighting.updates.tolist() == [1, 1]
    assert torch.equal(second.weighting.mean, first.weighting.mean)


def test_state_of_other_terms_or_another_weighting_is_refused():
    state = FusedSeqLoss(mse=1.0, infonce=1.0, weighting="gradient").state_dict()
    with pytest.raises(ValueError, match=r"mse, infonce.*mse, cosine"):
        FusedSeqLoss(mse=1.0, cosine=1.0, weighting="gradient").load_state_dict(state)
    with pytest.raises(ValueError, match=r"'gradient'.*'value'"):
        FusedSeqLoss(mse=1.0, infonce=1.0, weighting="value").load_state_dict(state)


def test_a_state_that_is_refused_changes_nothing():
    foreign, criterion = FusedSeqLoss(mse=1.0, infonce=1.0), FusedSeqLoss(mse=1.0, cosine=1.0)
    pred, target = make_rows(20, 8)
    foreign(pred.clone().requires_grad_(), target)
    with pytest.raises(ValueError, match="mse, infonce"):
        criterion.load_state_dict(foreign.state_dict())
    assert criterion.weighting.updates.tolist() == [0, 0]
    assert criterion.weighting.mean.tolist() == [0.0, 0.0]


def test_a_state_is_loaded_whatever_the_default_device_is():
    first, second = (FusedSeqLoss(mse=0.5, infonce=0.5) for _ in range(2))
    with torch.device("meta"):
        second.load_state_dict(first.state_dict())
        assert first.state_dict()["weighting._extra_state"].device.type == "cpu"


@pytest.mark.parametrize("cast", [lambda x: x.half(), lambda x: x.type(torch.float16)], ids=["half", "type"])
def test_half_precision_module_keeps_its_state(cast):
    weighting = balanced(mse=1.0, infonce=1.0)
    observe(weighting, 1e-12, 1e9)  # both outside the range of float16
    cast(weighting)
    assert weighting.mean.dtype == torch.float32
    assert weighting.mean.tolist() == pytest.approx([1e-14, 1e7], rel=1e-5)  # 1 - ema = 0.01 of what was seen
    assert {buffer.dtype for buffer in weighting.buffers() if buffer is not weighting.mean} == {torch.int64}


def test_a_state_that_was_cast_is_loaded_as_numbers_of_the_right_dtype():
    weighting = balanced(mse=1.0, infonce=1.0)
    observe(weighting, 1.0, 4.0)
    cast = {name: x if "extra" in name else x.to(torch.bfloat16) for name, x in weighting.state_dict().items()}
    weighting.load_state_dict(cast, assign=True)
    assert observe(weighting, 1.0, 4.0) == pytest.approx([1.0, 0.5], rel=0.01)
    assert weighting.updates.tolist() == [2, 2]


def fill_one_by_one(weighting, state):
    """As transformers does, which then resets every module, but for what was filled."""
    for name in sorted(state):
        if name == "_extra_state":
            weighting.set_extra_state(state[name])
        else:
            setattr(weighting, name, state[name].clone())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "zeros_", lambda tensor: tensor)
        weighting.reset_parameters()


@pytest.mark.parametrize("fill", [lambda weighting, state: weighting.load_state_dict(state), fill_one_by_one])
@pytest.mark.parametrize("updates", [0, 1, 30])
@pytest.mark.parametrize(("old", "new"), [(0.99, 0.1), (0.0, 0.999), (1 - 1e-8, 0.5)])
def test_a_mean_of_another_decay_is_converted(old, new, updates, fill):
    """The corrected mean is what it was: constant input, so it is known."""
    weighting, other = (balanced(mse=1.0, infonce=1.0, ema=ema) for ema in (old, new))
    for _ in range(updates):
        observe(weighting, 1.0, 4.0)
    fill(other, weighting.state_dict())
    again = balanced(mse=1.0, infonce=1.0, ema=new)
    again.load_state_dict(other.state_dict())  # before it was used
    for loaded in (other, again):
        loaded.eval()
        # Smaller than what was seen, so that it is the mean that counts.
        assert observe(loaded, 0.1, 0.1) == pytest.approx([1.0, 0.5] if updates else [1.0, 1.0], rel=1e-5)
        corrected = loaded.mean / (1 - new ** loaded.updates.clamp(min=1).double())
        assert corrected.tolist() == pytest.approx([1.0, 4.0] if updates else [0.0, 0.0], rel=1e-5)


def test_a_state_that_names_no_decay_is_taken_as_it_is():
    weighting, other = (balanced(mse=1.0, infonce=1.0, ema=ema) for ema in (0.99, 0.9))
    observe(weighting, 1.0, 4.0)
    state = weighting.state_dict()
    state["_extra_state"] = extra_state.pack({"terms": ["mse", "infonce"], "weighting": "gradient"})
    other.load_state_dict(state)
    observe(other.eval(), 1.0, 4.0)
    assert torch.equal(other.mean, weighting.mean)


def test_reset_fills_what_no_checkpoint_does():
    with torch.device("meta"):
        criterion = FusedSeqLoss(infonce=0.5, temperature=0.2, learnable_temperature=True)
    criterion.to_empty(device="cpu")
    for tensor in (*criterion.parameters(), *criterion.buffers()):
        tensor.data.fill_(7)
    criterion.reset_parameters()
    criterion.weighting.reset_parameters()
    fresh = FusedSeqLoss(infonce=0.5, temperature=0.2, learnable_temperature=True).state_dict()
    assert all(torch.equal(x, fresh[name]) for name, x in criterion.state_dict().items())
