"""A backend against the plain definition in float64 over combinations of options: loss, gradients, Gram matrix and
statistics. A seeded sample of all combinations, in which every pair of choices of two options occurs.
"""

import itertools
import random
from typing import NamedTuple

import torch
from error_rule import make_rows, relative_error

from amn_kernels import functional
from amn_kernels.options import TERMS, LossOptions
from amn_kernels.reference import term_outputs

CHOICES = {
    "terms": ("infonce", "mse infonce", "mse cosine infonce", "cosine moment infonce", "variance infonce", "all"),
    "monitor": (None, "infonce", "mse", "moment"),
    "direction": ("pred_to_target", "both"),
    "negatives": ("all", "step", "sequence"),
    "shape": ((24, 1, 7), (1, 24, 3), (4, 6, 5), (3, 70, 16), (70, 3, 16)),
    "mask": (False, True),
    "ids": (None, "diagonal", "ids"),
    "margin": (None, 0.05, 0.7),
    "extra": (0, 3, 40),
    "gradients": ("pred", "target", "pred target", "pred extra temperature", "pred target extra temperature", ""),
    "variance_target": (None, 0.3),
    "tau": ("number", "tensor"),  # one that requires a gradient is a tensor
    "chunk_bytes": (None, 1, 3000),
    "dtype": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "layout": ("dense", "steps first", "every second column"),
}


class Tolerances(NamedTuple):
    """Relative errors; to that of a gradient the rounding of a half type's own result is added."""

    value: float
    gradient: float
    gram: float


# Rounding of logits up to 1/0.3 and of sums; the result's own for half types. The hinge of the variance term may
# switch in a column whose deviation is its target to within rounding, which is why it is not tighter.
SINGLE, DOUBLE = Tolerances(3e-6, 3e-6, 3e-5), Tolerances(1e-11, 1e-11, 1e-10)


def sample(count, choices=CHOICES, candidates=20):
    """Combinations as dictionaries; the first ones cover every pair of choices, if so many can."""
    chosen = random.Random(0)
    names = list(choices)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(choices[a]))
        for y in range(len(choices[b]))
    }

    def pairs(case):
        return set(itertools.combinations(case.items(), 2))

    cases = []
    while len(cases) < count:
        drawn = [{name: chosen.randrange(len(choices[name])) for name in names} for _ in range(candidates)]
        best = max(drawn, key=lambda case: len(pairs(case) & missing)) if missing else drawn[0]
        missing -= pairs(best)
        cases.append({name: choices[name][index] for name, index in best.items()})
    assert not missing
    return cases


def label(case):
    return "-".join(str(value).removeprefix("torch.").replace(" ", "+") for value in case.values())


def laid_out(x, layout):
    if layout == "steps first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every second column":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    return x


def options_of(case):
    names = TERMS if case["terms"] == "all" else case["terms"].split()
    weights = {term: 0.3 + 0.2 * i if term in names else 0.0 for i, term in enumerate(TERMS)}
    if case["monitor"] is not None:
        weights[case["monitor"]] = 0.0
    if not any(weights.values()):
        weights["cosine"] = 1.0
    return dict(
        **weights,
        monitor=() if case["monitor"] is None else (case["monitor"],),
        direction=case["direction"],
        negatives=case["negatives"],
        positives=case["ids"] or "diagonal",
        false_negative_margin=case["margin"],
        variance_target=case["variance_target"],
        temperature=0.3,
        weighting="fixed",
    )


def inputs_of(case, device):
    """Tensors in the dtype of the case; a zero row of each kind and, masked, rows of NaN."""
    batch, steps, dim = case["shape"]
    pred, target = make_rows(batch, steps, dim, dtype=torch.float64, distance=0.5, seed=1)
    pred.view(-1, dim)[3] = 0
    target.view(-1, dim)[5] = 0
    target.view(-1, dim)[7] = target.view(-1, dim)[8]  # duplicates, which a margin leaves out
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    if case["mask"]:
        tensors["mask"] = torch.rand(batch, steps, generator=generator) > 0.3
        for x in (pred, target):
            x[~tensors["mask"]] = torch.nan
    if case["ids"]:
        tensors["ids"] = torch.randint(0, 5, (batch, steps), generator=generator)
    if case["extra"]:
        tensors["extra_negatives"] = make_rows(case["extra"], dim, dtype=torch.float64, seed=3)[0].to(case["dtype"])
    tensors = {name: x.to(device) for name, x in tensors.items()}
    pred, target = (laid_out(x.to(device, case["dtype"]), case["layout"]) for x in (pred, target))
    return pred, target, tensors


def temperature_of(case, device):
    """The tensor that counts in place of the option, as a learned one that has moved; None: the option."""
    if case["tau"] == "number" and "temperature" not in case["gradients"]:
        return None
    return torch.tensor(0.45, dtype=torch.float64 if case["dtype"] == torch.float64 else torch.float32, device=device)


def run(case, pred, target, tensors, compute):
    """Loss, gradients by name, Gram matrix and metrics by `compute(pred, target, temperature, tensors)`."""
    leaves = {"pred": pred, "target": target, "extra": tensors.get("extra_negatives")}
    leaves["temperature"] = temperature_of(case, pred.device)
    leaves = {name: x for name, x in leaves.items() if x is not None}
    wanted = [name for name in case["gradients"].split() if name in leaves]
    for name in wanted:
        leaves[name] = leaves[name].detach().requires_grad_()
    tensors = {**tensors, **({"extra_negatives": leaves["extra"]} if "extra" in leaves else {})}
    loss, gram, metrics = compute(leaves["pred"], leaves["target"], leaves.get("temperature"), tensors)
    found = [None] * len(wanted)
    if loss.requires_grad:  # else no term depends on what was asked for
        found = torch.autograd.grad(loss, [leaves[name] for name in wanted], allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaves[name]) if x is None else x for name, x in zip(wanted, found, strict=True)
    }
    return loss.detach(), gradients, gram, metrics


def check(case, backend, device="cpu", tolerances=None):
    """The backend against the plain definition in float64: loss, every gradient, Gram matrix and metrics."""
    tolerances = tolerances or (DOUBLE if case["dtype"] == torch.float64 else SINGLE)
    options = options_of(case)
    pred, target, tensors = inputs_of(case, device)
    checked = LossOptions(**options)

    def computed(pred, target, temperature, tensors):
        loss, stats = functional.evaluate(
            pred,
            target,
            LossOptions(**options, chunk_bytes=case["chunk_bytes"]),
            backend,
            temperature=temperature,
            **tensors,
        )
        return loss, stats.gram, stats.metrics

    def plain(pred, target, temperature, tensors):
        outputs = term_outputs(pred, target, checked, temperature=temperature, **tensors)
        return outputs.values @ outputs.values.new_tensor(checked.lambdas), outputs.gram, outputs.metrics

    loss, gradients, gram, metrics = run(case, pred, target, tensors, computed)
    double = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    true_loss, true_gradients, true_gram, true_metrics = run(case, pred.double(), target.double(), double, plain)
    assert relative_error(loss, true_loss) <= tolerances.value
    assert gradients.keys() == true_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == (pred.dtype if name != "temperature" else loss.dtype)
        own = torch.finfo(gradient.dtype).eps if gradient.dtype in (torch.bfloat16, torch.float16) else 0
        assert relative_error(gradient, true_gradients[name]) <= tolerances.gradient + own, name
    assert (gram is None) == (true_gram is None)
    if gram is not None:
        norms = true_gram.diagonal().sqrt()
        scale = (norms.unsqueeze(1) * norms).clamp(min=1e-30)
        assert ((gram.double() - true_gram).abs() / scale).max() <= tolerances.gram
    assert relative_error(metrics, true_metrics) <= tolerances.value
