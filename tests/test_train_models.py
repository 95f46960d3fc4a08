"""The predictors: sizes, start and mathematics."""

import math

import pytest
import torch

from amn_kernels.train.models import AMN, build_model


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
