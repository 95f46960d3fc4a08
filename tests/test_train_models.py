"""The predictors: sizes, start and mathematics."""

import math

import pytest
import torch

from amn_kernels.train.models import AMN, MODELS, build_model, register_model


def randomised(dim: int) -> AMN:
    torch.manual_seed(0)
    model = AMN(dim)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_amn_has_its_published_size():
    assert sum(parameter.numel() for parameter in build_model("amn", 768).parameters()) == 1_510_912


@pytest.mark.parametrize(("dim", "steps"), [(768, 5), (10, 1)])
def test_amn_starts_at_the_mean_of_the_context_and_learns_from_there(dim, steps):
    torch.manual_seed(0)
    model, context = build_model("amn", dim), torch.randn(4, steps, dim)
    pred = model(context)
    torch.testing.assert_close(pred, context.mean(dim=1), rtol=0, atol=0)
    (pred - torch.randn(4, dim)).square().sum().backward()
    assert model.residual[-1].weight.grad.abs().max() > 0


def test_amn_computes_attention_and_residual_as_documented():
    dim = 12
    model, context = randomised(dim), torch.randn(3, 5, dim)
    pred = model(context)
    for row in range(3):
        baseline = context[row].mean(dim=0)
        query = model.query.weight @ baseline + model.query.bias
        keys = [model.key.weight @ vector + model.key.bias for vector in context[row]]
        weights = [math.exp(torch.dot(key, query).item() / math.sqrt(256)) for key in keys]
        mixed = sum(weight * vector for weight, vector in zip(weights, context[row], strict=True)) / sum(weights)
        expected = baseline + model.residual(torch.cat([baseline, mixed])[None])[0]
        torch.testing.assert_close(pred[row], expected, rtol=1e-5, atol=1e-6)


def test_amn_layers_are_in_the_documented_order():
    names = [type(layer).__name__ for layer in AMN(8).residual]
    assert names == ["Linear", "GELU", "LayerNorm", "Linear", "GELU", "LayerNorm", "Linear"]


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match=r"unknown model 'rnn', expected one of \['amn'"):
        build_model("rnn", 8)


SIZES = {"amn": 1_510_912, "lstm": 5_120_768, "gru": 7_095_552, "transformer": 17_867_520}
OTHERS = ("lstm", "gru", "transformer")


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    assert set(SIZES) == set(MODELS)
    assert sum(parameter.numel() for parameter in build_model(name, 768).parameters()) == SIZES[name]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("dim", "steps"), [(10, 1), (7, 9)])
def test_any_size_and_length(name, dim, steps):
    torch.manual_seed(0)
    model = build_model(name, dim).eval()
    context = torch.randn(3, steps, dim)
    pred = model(context)
    assert pred.shape == (3, dim)
    # A row's prediction is its own context's, and depends on every step of it.
    torch.testing.assert_close(model(context[1:2]), pred[1:2], rtol=1e-4, atol=1e-5)
    if name == "amn":  # the start is the mean whatever the parameters; make it depend on them
        torch.nn.init.normal_(model.residual[-1].weight)
    for step in range(steps):
        changed = context.clone()
        changed[:, step] += 1
        assert (model(changed) - model(context)).abs().max() > 1e-6


@pytest.mark.parametrize("name", OTHERS)
def test_predictions_start_no_longer_than_the_vectors(name):
    torch.manual_seed(0)
    pred = build_model(name, 384)(torch.nn.functional.normalize(torch.randn(4, 5, 384), dim=-1))
    assert 0 < pred.norm(dim=1).min() <= pred.norm(dim=1).max() < 1


@pytest.mark.parametrize("name", OTHERS)
def test_residual_starts_at_the_mean_of_the_context_and_learns_from_there(name):
    torch.manual_seed(0)
    model, context = build_model(name, 10, residual=True), torch.randn(4, 5, 10)
    pred = model(context)
    torch.testing.assert_close(pred, context.mean(dim=1), rtol=0, atol=0)
    (pred - torch.randn(4, 10)).square().sum().backward()
    assert max(parameter.grad.abs().max() for parameter in model.parameters() if parameter.grad is not None) > 0


def test_the_transformer_is_causal():
    """An earlier step's hidden vector does not see a later one."""
    torch.manual_seed(0)
    model, context = build_model("transformer", 8).eval(), torch.randn(2, 5, 8)
    hidden = []
    model.decoder.register_forward_hook(lambda module, given, output: hidden.append(output))
    model(context)
    changed = context.clone()
    changed[:, 3] += 1
    model(changed)
    torch.testing.assert_close(hidden[0][:, :3], hidden[1][:, :3], rtol=0, atol=1e-6)
    assert (hidden[0][:, 3:] - hidden[1][:, 3:]).abs().amax(dim=(0, 2)).min() > 1e-3


def test_amn_has_no_residual_option():
    with pytest.raises(ValueError, match=r"residual is not an option of the model 'amn'"):
        build_model("amn", 8, residual=True)


def test_models_of_your_own(monkeypatch):
    monkeypatch.setattr("amn_kernels.train.models.MODELS", dict(MODELS))
    register_model("last", lambda dim: torch.nn.Identity())
    assert isinstance(build_model("last", 8), torch.nn.Identity)
    with pytest.raises(ValueError, match="there is a model 'last' already"):
        register_model("last", torch.nn.Identity)
