"""The written-out gradients of `amn_kernels.reference.gradients` against automatic differentiation of the terms."""

import itertools

import pytest
import torch

from amn_kernels.options import TERMS, LossOptions
from amn_kernels.reference import term_outputs

B, T, D, K = 3, 4, 5, 6
EVERY_TERM = dict.fromkeys(TERMS, 1.0)


def angles_error(gram, values, pred):
    """Largest error of the Gram matrix, relative to the norms of the two gradients of an entry."""
    gradients = torch.stack([torch.autograd.grad(v, pred, retain_graph=True)[0].flatten() for v in values])
    truth = gradients @ gradients.T
    norms = truth.diagonal().sqrt()
    return ((gram - truth).abs() / (norms.unsqueeze(1) * norms).clamp(min=1e-30)).max().item()


@pytest.mark.parametrize("negatives", ["all", "step", "sequence"])
@pytest.mark.parametrize("direction", ["pred_to_target", "both"])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("variance_target", [None, 0.4])
def test_gram_matrix_is_that_of_the_gradients(negatives, direction, with_mask, variance_target):
    cases = itertools.product((None, "diagonal", "ids"), (False, True), (None, 0.6))
    for seed, (positives, with_extra, margin) in enumerate(cases):
        generator = torch.Generator().manual_seed(seed)
        pred, target = (torch.randn(B, T, D, dtype=torch.float64, generator=generator) for _ in range(2))
        pred[0, 1], target[1, 2] = 0, 0  # zero vectors: no gradient from cosine and infonce
        pred.requires_grad_()
        options = LossOptions(
            **EVERY_TERM,
            direction=direction,
            negatives=negatives,
            temperature=0.3,
            variance_target=variance_target,
            positives=positives or "diagonal",
            false_negative_margin=margin,
            weighting="fixed",
        )
        outputs = term_outputs(
            pred,
            target,
            options,
            mask=torch.rand(B, T, generator=generator) > 0.3 if with_mask else None,
            ids=torch.randint(0, 3, (B, T), generator=generator) if positives else None,
            extra_negatives=torch.randn(K, D, dtype=torch.float64, generator=generator) if with_extra else None,
        )
        assert angles_error(outputs.gram, outputs.values, pred) <= 1e-12


def test_gram_matrix_near_convergence_in_float32():
    generator = torch.Generator().manual_seed(0)
    target, noise = (torch.randn(64, 48, generator=generator) for _ in range(2))
    options = LossOptions(mse=1.0, cosine=1.0, infonce=1.0, weighting="fixed")
    grams = []
    for dtype in (torch.float32, torch.float64):
        pred = (target + 1e-3 * noise).to(dtype).requires_grad_()
        grams.append(term_outputs(pred, target.to(dtype), options).gram.double())
    torch.testing.assert_close(*grams, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 33, 256])
@pytest.mark.parametrize("masked", [False, True])
def test_gram_matrix_of_constant_columns(masked, n, dtype):
    """Moment pulls by the means alone and variance not at all, whatever the rounding of a mean of equal numbers."""
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(n, D, dtype=dtype, generator=generator) for _ in range(2))
    mask = torch.arange(n) % 3 != 0 if masked else torch.ones(n, dtype=torch.bool)
    leaf = pred[1:2].expand_as(pred).clone().requires_grad_()
    options = LossOptions(mse=0.0, moment=1.0, variance=1.0, weighting="fixed")
    norms = term_outputs(leaf, target, options, mask=mask).gram.diagonal().sqrt()
    count = mask.sum()
    wanted = 2 / (count * D) * (pred[1] - target[mask].mean(dim=0)).norm() * count.sqrt()
    torch.testing.assert_close(norms[0], wanted, rtol=1e-5, atol=0)
    assert norms[1] == 0


def test_no_gram_matrix_without_gradients():
    rows = torch.randn(4, 3)
    assert term_outputs(rows, rows, LossOptions()).gram is None
    with torch.no_grad():
        assert term_outputs(rows.requires_grad_(), rows, LossOptions()).gram is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("of", ["pred", "target"])
def test_a_row_that_is_not_finite_shows_in_every_norm(of, bad):
    """It must not pass for a zero vector: balanced weights skip what is not finite."""
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(12, D, dtype=torch.float64, generator=generator) for _ in range(2))
    (pred if of == "pred" else target)[3, 1] = bad
    options = LossOptions(mse=1.0, cosine=1.0, infonce=1.0, moment=1.0, weighting="fixed")
    gram = term_outputs(pred.requires_grad_(), target, options).gram
    assert not gram.diagonal().isfinite().any()
