"""Any input that the loss documents, on every backend that serves it, against the plain definition in float64.

`cases.py` says what is drawn. Two rules: what is finite in the truth has at most twice the error of plain PyTorch
in the same dtype plus a floor (`natural`); what is not finite in the truth is not finite in any backend.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from amn_kernels import functional
from amn_kernels.backends import BACKENDS, Call
from amn_kernels.options import LossOptions
from amn_kernels.reference import seq_loss as definition
from amn_kernels.reference import term_outputs, terms
from amn_kernels.reference.balance import balance
from amn_kernels.weighting import BalancedWeighting
from fuzz.cases import Case

Tensors = dict[str, Tensor | None]
"""The arguments of the loss by name."""

notes: Counter[str] = Counter()
"""How many cases could be compared only in part, by reason."""

# Rounding units of the compute dtype, relative to the sizes that cancel: sums of D products and of N weights.
FLOOR = 32
# Squares of longer vectors overflow in float32. What is finite has to be right even so.
LONG = 1e18

WARM_UP = (3.0, 0.1)
"""By what pred is multiplied in the calls before the one that is compared: weights must not follow from one call."""


@dataclass
class Result:
    """What a backend makes of a case."""

    loss: Tensor
    values: Tensor
    gradients: dict[str, Tensor]
    gram: Tensor | None
    metrics: Tensor
    weights: Tensor
    """Those that were applied."""


def balanced(options: LossOptions, backend: str, pred: Tensor, target: Tensor, tensors: Tensors) -> tuple:
    """The last of some calls with balanced weights: loss and `LossStats`.

    AssertionError where weights or state are not what the plain step makes of the backend's own values and Gram matrix.
    """
    weighting, twin = BalancedWeighting(options), BalancedWeighting(options)
    for scale in (*WARM_UP, None):
        rows = pred if scale is None else (scale * pred.detach()).requires_grad_(pred.requires_grad)
        loss, stats = functional.evaluate(rows, target, options, backend, weighting=weighting, **tensors)
        wanted = balance(stats.values, stats.gram, *twin.arguments(rows.device))
        pairs = {name: (buffer, getattr(twin, name)) for name, buffer in weighting.named_buffers()}
        for name, (got, same) in {**pairs, "weights": (stats.weights, wanted)}.items():
            # 1e-37: below, float32 has fewer digits.
            torch.testing.assert_close(
                got,
                same,
                rtol=1e-5,
                atol=1e-37,
                equal_nan=True,
                msg=f"{backend}: balanced {name}: {got.tolist()}, not {same.tolist()}",
            )
    return loss, stats


def evaluate(
    case: Case, given: Tensors, backend: str | None, *, double: bool = False, weights: Tensor | None = None
) -> Result | None:
    """Loss, gradients and statistics by a backend; None if it does not serve the case.

    The definition for None, at these weights; without, at λ.
    """
    leaves = {name: given[name] for name in ("pred", "target", "extra")}
    if double:
        leaves = {name: None if x is None else x.double() for name, x in leaves.items()}
    real = definition.compute_dtype(leaves["pred"], leaves["target"])
    leaves["temperature"] = None
    if "temperature" in case.gradients:
        leaves["temperature"] = torch.tensor(case.options["temperature"], dtype=real)
        if double:  # the very number that the others got
            single = definition.compute_dtype(given["pred"], given["target"])
            leaves["temperature"] = torch.tensor(case.options["temperature"], dtype=single).double()
    for name in case.gradients:
        leaves[name] = leaves[name].detach().requires_grad_()
    tensors = {"mask": given["mask"], "ids": given["ids"], "extra_negatives": leaves["extra"]}
    tensors["temperature"] = leaves["temperature"]
    options = LossOptions(**{"weighting": "fixed", **case.options}, chunk_bytes=case.chunk_bytes)
    if backend is None:
        values, gram, metrics = term_outputs(leaves["pred"], leaves["target"], options, **tensors)
        weights = values.new_tensor(options.lambdas) if weights is None else weights.to(values.dtype)
        loss = torch.dot(values, weights)
    else:
        if BACKENDS[backend].why_unsupported(Call(leaves["pred"], leaves["target"], options, **tensors)):
            return None
        if options.weighting == "fixed":
            loss, stats = functional.evaluate(leaves["pred"], leaves["target"], options, backend, **tensors)
        else:
            loss, stats = balanced(options, backend, leaves["pred"], leaves["target"], tensors)
        values, gram, metrics = torch.stack(list(stats.value.values())), stats.gram, stats.metrics
        weights = stats.weights
    found = [None] * len(case.gradients)
    if loss.requires_grad:
        wanted = [leaves[name] for name in case.gradients]
        found = torch.autograd.grad(loss, wanted, loss.new_tensor(case.incoming), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaves[name]) if x is None else x for name, x in zip(case.gradients, found, strict=True)
    }
    return Result(loss.detach(), values.detach(), gradients, gram, metrics, weights)


class Natural:
    """What rounding is relative to: the sizes of the numbers that values and gradients are sums of, in float64."""

    def __init__(self, case: Case, given: Tensors):
        options = LossOptions(**case.options)
        mask = given["mask"]
        keep = torch.ones(given["pred"].shape[:-1], dtype=torch.bool) if mask is None else mask
        p, t = (given[name].double()[keep] for name in ("pred", "target"))
        n, dim, tau = max(1, len(p)), p.shape[-1], options.temperature
        columns = torch.ones(len(p), dtype=torch.bool)
        (mean_p, sd_p), (mean_t, sd_t) = terms.column_moments(p, columns), terms.column_moments(t, columns)
        (at_p, unit_p), (at_t, unit_t) = (terms.column_moments(terms.normalize(x), columns) for x in (p, t))
        gamma = unit_t if options.variance_target is None else torch.full_like(unit_t, options.variance_target)
        logits = 1 / min(1.0, tau)
        self.values = {
            "mse": (p - t).square().sum() / (n * dim),
            "cosine": torch.tensor(1.0),
            "infonce": torch.tensor(1 + 4 * logits),
            "moment": (mean_p.abs() + mean_t.abs()).square().mean() + (sd_p + sd_t).square().mean(),
            "variance": (gamma + unit_p + at_p.abs() + at_t.abs()).mean(),
        }
        root = max(1, n - 1) ** 0.5
        means = 2 / (n * dim) * (mean_p.abs() + mean_t.abs()).norm() * n**0.5
        self.of: dict[str, dict[str, float]] = {}
        for name, x in (("pred", p), ("target", t)):
            norms = x.norm(dim=1)
            lengths = (1 / norms[norms >= terms.EPS]).norm()
            spread = unit_p[unit_p > 0].min() if name == "pred" and (unit_p > 0).any() else 1.0
            self.of[name] = {
                "mse": 2 / (n * dim) * (p - t).norm(),
                "cosine": lengths / n,
                "infonce": (1 + logits) * lengths / (n * tau),
                "moment": means + 2 / dim * (sd_p + sd_t).norm() / root,
                "variance": lengths / (dim**0.5 * root) / spread if name == "pred" else 0.0,
            }
        if given["extra"] is not None:
            norms = given["extra"].double().norm(dim=1)
            self.of["extra"] = {"infonce": (1 + logits) * (1 / norms[norms >= terms.EPS]).norm() / tau}
        self.of["temperature"] = {"infonce": torch.tensor((1 + logits) / tau**2)}
        self.options = options
        # Between infonce and a term of p - t, the Gram matrix loses what p - t loses of a target much shorter than p.
        ratio = p.norm(dim=1) / t.norm(dim=1).clamp(min=terms.EPS)
        self.lost = max(1.0, ratio.max().item()) if len(p) else 1.0
        # Where a derivative jumps, rounding decides on which side: at equal deviations for the hinge, at deviation 0
        # for moment and variance, at the margin for false negatives.
        near = (gamma - unit_p).abs() <= 1e-5 * gamma.clamp(min=1e-3)
        flat = torch.cat([sd_p / (mean_p.abs() + sd_p), sd_t / (mean_t.abs() + sd_t)]) < 1e-3
        self.kink = len(p) > 1 and (
            ("variance" in options.terms and bool((near | (unit_p < 1e-3)).any()))
            or ("moment" in options.terms and bool(flat.any()))
        )
        margin = options.false_negative_margin
        if margin is not None and len(p):
            keys = t if given["extra"] is None else torch.cat([t, given["extra"].double()])
            gaps = 1 - terms.normalize(t) @ terms.normalize(keys).T - margin
            self.kink = self.kink or bool((gaps.abs() < 1e-5).any())
        # Of a row that is not finite every size is nan, and so is every term but one that does not look at it.
        self.values = {term: size if size.isfinite() else torch.tensor(1.0) for term, size in self.values.items()}
        every = torch.cat([p, t] if given["extra"] is None else [p, t, given["extra"].double()])
        self.long = bool((every.abs() > LONG).any())
        self.finite = bool(every.isfinite().all())

    def loss(self, weights: Tensor) -> float:
        """Of the weighted sum of the terms."""
        sizes = zip(self.options.terms, weights.tolist(), strict=True)
        return sum(weight * float(self.values[term]) for term, weight in sizes if weight)

    def gradient(self, leaf: str, weights: Tensor) -> float:
        """Norm, of the weighted sum."""
        sizes = zip(self.options.terms, weights.tolist(), strict=True)
        return sum(weight * float(self.of[leaf].get(term, 0.0)) for term, weight in sizes if weight)


def top1_range(case: Case, given: Tensors, eps: float) -> tuple[float, float]:
    """The share of rows that are retrieved, if those whose lead is within rounding count as misses, or as hits."""
    options = LossOptions(**case.options)
    mask = torch.ones(case.shape[:-1], dtype=torch.bool) if given["mask"] is None else given["mask"]
    rows = [torch.where(mask.unsqueeze(-1), given[name].double(), 0) for name in ("pred", "target")]
    ids, extra = given["ids"], None if given["extra"] is None else given["extra"].double()
    pred, target, group_mask = (definition.to_groups(x, options.negatives, mask.dim()) for x in (*rows, mask))
    valid, positive = terms.key_sets(
        target,
        group_mask,
        ids=None if ids is None else definition.to_groups(ids, options.negatives, mask.dim()),
        extra_negatives=extra,
        positives_by_id=options.positives == "ids",
        false_negative_margin=options.false_negative_margin,
    )
    cosines = terms.infonce_logits(pred, target, valid, 1.0, extra_negatives=extra)
    best, rival = (cosines.masked_fill(~keys, -torch.inf).amax(dim=2) for keys in (positive, valid & ~positive))
    lead, count = (best - rival)[group_mask], max(1, int(mask.sum()))
    return float((lead > 64 * eps).sum()) / count, float((lead > -64 * eps).sum()) / count


def check(case: Case, names: list[str] | None = None) -> None:
    """AssertionError naming backend and quantity where a backend disagrees."""
    given = case.tensors()
    natural = Natural(case, given)
    for name in contenders() if names is None else names:
        ours = evaluate(case, given, name)
        if ours is None:
            notes[f"{name} does not serve it"] += 1
            continue
        # Balanced ones are compared where they are made; for fixed ones the definition takes λ.
        weights = None if case.options.get("weighting", "fixed") == "fixed" else ours.weights
        truth = evaluate(case, given, None, double=True, weights=weights)
        plain = evaluate(case, given, None, weights=weights)
        compare(case, given, natural, name, ours, plain, truth)


def compare(case, given, natural: Natural, name: str, ours: Result, plain: Result, truth: Result) -> None:
    """`ours` by the two rules of this module."""
    precision = torch.finfo(plain.loss.dtype)
    eps, smallest = precision.eps, precision.eps * precision.tiny

    def agree(what, got, same, true, size, own=0.0):
        assert got.shape == true.shape, f"{name}: shape of {what}"
        got, same, true = got.double(), same.double(), true.double()
        if not true.isfinite().all():
            assert not got.isfinite().all(), f"{name}: {what} is finite, {got}, the truth is not"
            return
        if not got.isfinite().all():
            assert natural.long, f"{name}: {what} is not finite, the truth is {true}"
            return
        error, theirs = (got - true).norm().item(), (same - true).norm().item()
        allowed = 2 * (theirs if same.isfinite().all() else 0.0) + FLOOR * eps * size + own
        # Subnormal numbers have no relative precision: their steps, before they are multiplied by what arrives.
        allowed += 8 * smallest * max(1.0, abs(case.incoming)) * got.numel() ** 0.5
        assert error <= allowed, f"{name}: {what} is off by {error:.3g}, allowed {allowed:.3g}, of {true.norm():.3g}"

    agree("loss", ours.loss, plain.loss, truth.loss, natural.loss(truth.weights) + truth.loss.abs().item())
    for at, term in enumerate(natural.options.terms):
        size = float(natural.values[term]) + truth.values[at].abs().item()
        agree(f"the value of {term}", ours.values[at], plain.values[at], truth.values[at], size)
    if not natural.finite:
        notes["a row that counts is not finite"] += 1
        if truth.loss.isfinite():
            notes["not finite, and nothing to the loss"] += 1
        return
    if natural.long and not ours.loss.isfinite():
        notes["rows too long for float32, and the loss says so"] += 1
        return
    masked = None if given["mask"] is None else ~given["mask"]
    for leaf, gradient in ours.gradients.items():
        true = truth.gradients[leaf]
        if leaf != "temperature":
            assert gradient.dtype == given[leaf].dtype, f"{name}: dtype of the gradient of {leaf}"
        if leaf in ("pred", "target") and masked is not None:
            assert not gradient[masked].any(), f"{name}: a masked row of {leaf} has a gradient"
        info = torch.finfo(gradient.dtype)
        if true.numel() and true.abs().max() >= info.max:
            notes["the true gradient is too large for its dtype"] += 1
            continue
        if natural.kink:
            notes["at a kink"] += 1
            assert natural.long or gradient.isfinite().all(), f"{name}: the gradient of {leaf} is not finite"
            continue
        own = info.eps * true.norm().item() + info.smallest_normal * info.eps * true.numel() ** 0.5
        size = case.incoming * natural.gradient(leaf, truth.weights) + true.norm().item()
        agree(f"the gradient of {leaf}", gradient, plain.gradients[leaf], true, size, own if info.bits == 16 else 0.0)
    assert (ours.gram is None) == (truth.gram is None), f"{name}: Gram matrix"
    if ours.gram is not None and not natural.kink:
        norms = torch.tensor(
            [
                float(natural.of["pred"][term]) if term in natural.options.enabled else 0.0
                for term in natural.options.terms
            ],
            dtype=torch.float64,
        )
        scale = (norms.unsqueeze(1) * norms).clamp(min=1e-300)
        for at in range(len(norms)):
            for to in range(at + 1):
                size = 4 * scale[at, to].item() * (natural.lost if at != to else 1.0)
                agree(
                    f"<{natural.options.terms[at]}, {natural.options.terms[to]}>",
                    ours.gram[at, to],
                    plain.gram[at, to],
                    truth.gram[at, to],
                    size,
                )
    lengths = [x.item() for x in truth.metrics]
    least = precision.tiny**0.5  # of shorter rows the square underflows
    for at, size, own in ((0, 1.0, 0.0), (2, lengths[2] + 1, 0.0), (3, lengths[3], least), (4, lengths[4], least)):
        agree(f"metric {at}", ours.metrics[at], plain.metrics[at], truth.metrics[at], size, own)
    if "infonce" in natural.options.terms:
        low, high = top1_range(case, given, eps)
        top1 = ours.metrics[1].item()
        assert natural.long or low - 1e-6 <= top1 <= high + 1e-6, f"{name}: top1 is {top1}, not in [{low}, {high}]"


def contenders() -> list[str]:
    """The backends that are compared here."""
    return [name for name in BACKENDS if name != "reference" and not BACKENDS[name].why_unavailable()]
