"""The audit: before a training, which term of the loss would take it over, measured at the prediction."""

import copy
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from amn_kernels.module import FusedSeqLoss
from amn_kernels.weighting import HINGES

DROWNS = 10.0
"""A term drowns another if it pulls on the prediction more than this many times as hard, and also more than this many
times as hard as the ratio of their λ asks for. The first alone would forbid a wanted 95:5; the second alone would
accuse fixed weights that were calibrated, whose λ are far apart because the gradients are."""
MEASURED_BATCHES = 8
PROBE_LR = 1e-4
"""Learning rate of the probe's AdamW. AdamW's first steps are this long in every parameter, however small the gradient:
at 1e-3, 20 of them took the AMN on the bundled verses from a cosine of 0.55 to 0.50 by MSE alone; at 1e-4 to 0.57."""
BAR_CELLS = 14


@dataclass(frozen=True)
class TermFigures:
    """One term, averaged over the measured batches."""

    value: float
    weight: float
    contribution: float
    """weight · value."""
    grad_norm: float
    """Norm of the unweighted gradient with respect to the prediction."""
    ratio: float | None
    """weight · grad_norm over that of the anchor; None where the anchor sends no gradient."""
    share: float
    """weight · grad_norm over the sum of all terms."""


@dataclass(frozen=True)
class Measurement:
    """The loss at one state of the model."""

    terms: dict[str, TermFigures]
    cosine_similarity: float
    chance: float | None
    """InfoNCE of a guess, in nats; None without infonce."""
    conflict: float | None
    """The smallest cosine between the gradients of two terms; below 0 they pull against each other."""
    conflict_pair: tuple[str, str] | None


@dataclass(frozen=True)
class AuditReport:
    """What the audit found; `print` gives the verdict, a rich console the table too, `as_dict` everything."""

    weighting: str
    lambdas: dict[str, float]
    anchor: str
    start: Measurement
    after_probe: Measurement | None
    """None for a plain function, and for ``probe_steps=0``."""
    probe_steps: int
    dominated: bool
    """A term drowns another, see `DROWNS`."""
    calibrated: dict[str, float]
    """λ for ``weighting="fixed"`` that give shares in proportion to the given λ, at the start."""
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields by name, nested."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return self.verdict

    def __rich__(self):
        from rich.console import Group

        tables = [_table("at the start", self.start, self)]
        if self.after_probe is not None:
            tables.append(_table(f"after {self.probe_steps} steps", self.after_probe, self))
        return Group(*tables, self.verdict)


def audit(
    model: nn.Module | Callable[[Any], Tensor],
    loader: Iterable[tuple[Any, Tensor]],
    criterion: FusedSeqLoss,
    *,
    probe_steps: int = 20,
) -> AuditReport:
    """Measures what each term of `criterion` would do to the prediction of `model`, at the start and after a few steps.

    Works on copies: parameters, buffers and modes of model and criterion, and torch's random numbers, stay as they are.

    Args:
        model: Maps a context to a prediction of the target's shape. A module is measured in training mode; any other
            callable is measured as it is and not probed.
        loader: Gives (context, target), in the batches of the training: InfoNCE's gradient depends on their size. The
            first max(8, probe_steps) are read; tensors are moved to the model's device. The loss gets no mask, ids or
            extra negatives.
        criterion: The loss, with whatever state it has.
        probe_steps: Steps of AdamW between the two measurements; 0 leaves the second out.

    Raises:
        ValueError: probe_steps is negative or not a whole number, or the loader is empty.
        FloatingPointError: A loss or a gradient isn't finite.
    """
    if isinstance(probe_steps, bool) or not isinstance(probe_steps, int) or probe_steps < 0:
        raise ValueError(f"probe_steps must be a whole number >= 0, got {probe_steps!r}")
    module = model if isinstance(model, nn.Module) else None
    parameters = [] if module is None else list(module.parameters())
    device = parameters[0].device if parameters else None
    probed = probe_steps > 0 and any(parameter.requires_grad for parameter in parameters)
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        # A DataLoader too draws random numbers.
        batches = [_move(batch, device) for batch in islice(loader, max(MEASURED_BATCHES, probe_steps))]
        if not batches:
            raise ValueError("loader gave no batch")
        start = _measure(_copied(model), batches, _copied(criterion))
        after = None
        if module is not None and probed:
            probe_model, probe_criterion = _copied(module), _copied(criterion)
            _probe(probe_model, batches, probe_criterion, probe_steps)
            after = _measure(probe_model, batches, probe_criterion)
    options = criterion.options
    lambdas = {term: float(getattr(options, term)) for term in options.enabled}
    anchor = options.anchor or options.default_anchor
    calibrated = calibrate(lambdas, {name: term.grad_norm for name, term in start.terms.items()}, anchor)
    measurements = {"at the start": start}
    if after is not None:
        measurements[f"after {probe_steps} steps"] = after
    drowning = _worst_drowning(lambdas, measurements)
    weighting = options.weighting if isinstance(options.weighting, str) else "callable"
    return AuditReport(
        weighting=weighting,
        lambdas=lambdas,
        anchor=anchor,
        start=start,
        after_probe=after,
        probe_steps=probe_steps if probed else 0,
        dominated=drowning is not None,
        calibrated=calibrated,
        verdict=_verdict(weighting, lambdas, measurements, drowning, calibrated),
    )


def calibrate(lambdas: dict[str, float], grad_norms: dict[str, float], anchor: str) -> dict[str, float]:
    """λ_i · norm_anchor / norm_i: as fixed weights they give shares in proportion to λ while the gradients last.

    Hinges are not amplified, and a term without a gradient keeps its λ, as with ``weighting="gradient"``.
    """
    calibrated = {}
    for term, weight in lambdas.items():
        scale = grad_norms[anchor] / grad_norms[term] if grad_norms[anchor] and grad_norms[term] else 1.0
        calibrated[term] = weight * (min(scale, 1.0) if term in HINGES else scale)
    return calibrated


def _copied(module: Any) -> Any:
    return copy.deepcopy(module).train() if isinstance(module, nn.Module) else module


def _move(batch: tuple[Any, Tensor], device: torch.device | None) -> list:
    return [part.to(device) if device is not None and isinstance(part, Tensor) else part for part in batch]


def _measure(predict: Callable[[Any], Tensor], batches: list, criterion: FusedSeqLoss) -> Measurement:
    options = criterion.options
    sums: defaultdict[Any, float] = defaultdict(float)  # by name, or by kind and name
    batches = batches[:MEASURED_BATCHES]
    for context, target in batches:
        with torch.no_grad():
            pred = predict(context)
        with torch.enable_grad():
            criterion(pred.detach().requires_grad_(), target)
        stats = criterion.stats
        for name in options.enabled:
            sums["value", name] += float(stats.value[name])
            sums["weight", name] += float(stats.weight[name])
            sums["contribution", name] += float(stats.contribution[name])
            sums["grad_norm", name] += float(stats.grad_norm[name])
            sums["pull", name] += float(stats.weight[name] * stats.grad_norm[name])
        for pair, cosine in stats.gradient_cosine.items():
            # The angle to a term without a gradient is undefined: no conflict.
            sums["cosine", pair] += float(cosine.nan_to_num(nan=1.0))
        sums["cosine_similarity"] += float(stats.cosine_similarity)
        sums["chance"] += float(stats.chance) if stats.chance is not None else 0.0
    means = {key: total / len(batches) for key, total in sums.items()}
    for (kind, name), number in ((key, number) for key, number in means.items() if isinstance(key, tuple)):
        if not math.isfinite(number):
            raise FloatingPointError(f"the audit found a {kind} of {name} that isn't finite: {number}")
    pulls = {name: means["pull", name] for name in options.enabled}
    total, anchor = sum(pulls.values()), pulls[options.anchor or options.default_anchor]
    terms = {
        name: TermFigures(
            **{kind: means[kind, name] for kind in ("value", "weight", "contribution", "grad_norm")},
            ratio=pull / anchor if anchor else None,
            share=pull / total if total else 0.0,
        )
        for name, pull in pulls.items()
    }
    angles = {key[1]: mean for key, mean in means.items() if isinstance(key, tuple) and key[0] == "cosine"}
    worst = min(angles, key=lambda names: angles[names], default=None)
    return Measurement(
        terms=terms,
        cosine_similarity=means["cosine_similarity"],
        chance=means["chance"] if "infonce" in options.terms else None,
        conflict=None if worst is None else angles[worst],
        conflict_pair=worst,
    )


def _probe(model: nn.Module, batches: list, criterion: FusedSeqLoss, steps: int) -> None:
    optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=PROBE_LR)
    with torch.enable_grad():
        for step in range(steps):
            context, target = batches[step % len(batches)]
            optimizer.zero_grad()
            criterion(model(context), target).backward()
            optimizer.step()


@dataclass(frozen=True)
class _Drowning:
    """`strong` pulls `pull` times as hard as `weak`, where the λ ask for `asked` times."""

    strong: str
    weak: str
    pull: float
    asked: float
    share: float
    when: str


def _worst_drowning(lambdas: dict[str, float], measurements: dict[str, Measurement]) -> _Drowning | None:
    found = []
    for when, measurement in measurements.items():
        shares = {name: term.share for name, term in measurement.terms.items()}
        for strong in shares:
            # A hinge is meant to fade: one that hardly pulls is met, not drowned.
            for weak in (name for name in shares if name not in HINGES and shares[name] > 0):
                pull, asked = shares[strong] / shares[weak], lambdas[strong] / lambdas[weak]
                if pull > DROWNS and pull > DROWNS * asked:
                    found.append(_Drowning(strong, weak, pull, asked, shares[strong], when))
    return max(found, key=lambda drowning: drowning.pull / drowning.asked, default=None)


def _verdict(
    weighting: str,
    lambdas: dict[str, float],
    measurements: dict[str, Measurement],
    drowning: _Drowning | None,
    calibrated: dict[str, float],
) -> str:
    *_, last = measurements.values()
    first, balanced = measurements["at the start"], weighting == "gradient"
    lines = []
    if drowning is not None:
        lines.append(
            f"{drowning.strong} would drive {_percent(drowning.share)} of the update ({drowning.when}): it pulls on "
            f"the prediction {drowning.pull:,.0f} times as hard as {drowning.weak}, where the lambdas ask for "
            f"{drowning.asked:.3g}. {drowning.weak} is drowned."
        )
    elif len(lambdas) == 1:
        lines.append(f"{next(iter(lambdas))} is the only term: nothing can drown it.")
    else:
        shares = ", ".join(f"{name} {_percent(term.share)}" for name, term in last.terms.items())
        lines.append(f"No term drowns another. Shares of the update: {shares}.")
    for name, term in first.terms.items():
        if term.grad_norm == 0:
            lines.append(f"{name} sends no gradient at the start.")
    if last is not first:
        # As shown, and without a sign of 0.
        before, after = (round(measurement.cosine_similarity, 3) + 0.0 for measurement in (first, last))
        moved = "stayed at" if before == after else f"{'rose' if before < after else 'fell'} from {before:.3f} to"
        steps = next(reversed(measurements)).removeprefix("after ")
        lines.append(f"In {steps} the cosine between prediction and target {moved} {after:.3f}.")
    if last.conflict is not None and last.conflict_pair is not None and last.conflict < 0:
        a, b = last.conflict_pair
        lines.append(f"{a} and {b} pull against each other (gradient cosine {last.conflict:.2f}).")
    if drowning is not None:
        asked = ", ".join(f"{name} {_percent(share)}" for name, share in _proportions(lambdas).items())
        numbers = ", ".join(f"{name}={number:.3g}" for name, number in calibrated.items())
        if not balanced:
            lines.append(f"Recommended: weighting='gradient' keeps the shares that the lambdas ask for ({asked}).")
        lines.append(f"Fixed weights that give these shares at the start: {numbers}.")
    return "\n".join(lines)


def _proportions(lambdas: dict[str, float]) -> dict[str, float]:
    return {name: weight / sum(lambdas.values()) for name, weight in lambdas.items()}


def _percent(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def _bar(share: float) -> str:
    eighths = round(8 * BAR_CELLS * share)
    full, rest = divmod(eighths, 8)
    return ("█" * full + " ▏▎▍▌▋▊▉"[rest]).strip().ljust(BAR_CELLS)


def _table(when: str, measurement: Measurement, report: AuditReport):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    notes = [when, f"cosine {measurement.cosine_similarity:.3f}"]
    if measurement.chance is not None:
        notes.append(f"infonce of a guess {measurement.chance:.3g}")
    if measurement.conflict is not None and measurement.conflict_pair is not None:
        notes.append(f"gradient cosine of {' and '.join(measurement.conflict_pair)} {measurement.conflict:+.2f}")
    table = Table(title=", ".join(notes), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("term", "value", "weight", "gradient", f"/ {report.anchor}", "asked", "share"):
        table.add_column(heading, justify="left" if heading == "term" else "right", no_wrap=True)
    table.add_column("the update", no_wrap=True)
    asked = _proportions(report.lambdas)
    for name, term in measurement.terms.items():
        table.add_row(
            name,
            f"{term.value:.3g}",
            f"{term.weight:.3g}",
            f"{term.grad_norm:.3g}",
            "" if term.ratio is None else f"{term.ratio:,.0f}" if term.ratio >= 1000 else f"{term.ratio:.3g}",
            _percent(asked[name]),
            _percent(term.share),
            _bar(term.share),
        )
    return table
