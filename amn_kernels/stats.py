"""What a call of the loss reports: values, weights and diagnostics, as device tensors until somebody reads them."""

import itertools
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from amn_kernels.options import LossOptions

METRICS = ("cosine_similarity", "top1", "chance", "pred_norm", "target_norm")
"""The entries of `TermOutputs.metrics`, in order."""

_INFONCE_METRICS = ("top1", "chance")


class TermOutputs(NamedTuple):
    """What every backend returns; float64 for float64 input, else float32."""

    values: Tensor
    """[m] the value of each term, differentiable."""
    gram: Tensor | None
    """[m, m] inner products of the term gradients with respect to pred, or None where they were not computed."""
    metrics: Tensor
    """[5] means over the rows that count, in the order of `METRICS`; top1 and chance are 0 without infonce."""


DOMINANCE = 100.0
"""With fixed weights there is a warning if a term pulls more than this many times as hard as the anchor, and more than
this many times as hard as its λ asks for."""


class DominanceWarning(UserWarning):
    """With fixed weights, one term's gradient all but decides the update."""


class UnbalancedWarning(UserWarning):
    """``weighting="gradient"`` finds no gradient of pred to balance."""


@dataclass(slots=True)
class LossStats:
    """Diagnostics of one call of the loss. All tensors are detached; only `as_dict` synchronises.

    A term that was not computed is absent from every dictionary, never 0. Gradients are those of the terms with respect
    to pred, [N, D] taken as one vector; where no gradient for pred was asked for, as under ``torch.no_grad()``,
    `grad_norm`, `share` and `gradient_cosine` are empty.
    """

    options: LossOptions
    values: Tensor  # [m]
    weights: Tensor  # [m]
    gram: Tensor | None  # [m, m]
    metrics: Tensor  # [5]
    told: set[str]
    """What the user was warned of already; shared by the calls of one loss."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that were computed, in the order of every [m]."""
        return self.options.terms

    @property
    def value(self) -> dict[str, Tensor]:
        """Unweighted value of each term."""
        return self._by_term(self.values)

    @property
    def weight(self) -> dict[str, Tensor]:
        """Weight that was applied to each term; 0 for a monitored one."""
        return self._by_term(self.weights)

    @property
    def contribution(self) -> dict[str, Tensor]:
        """weight · value: the terms of the sum that is the loss."""
        return self._by_term(self.weights * self.values)

    @property
    def grad_norm(self) -> dict[str, Tensor]:
        """Norm of the unweighted gradient of each term that is on."""
        return {} if self.gram is None else self._by_enabled_term(self._norms(self.gram))

    @property
    def share(self) -> dict[str, Tensor]:
        """weight · grad_norm of each term that is on, over the sum of them all; NaN where that is 0."""
        if self.gram is None:
            return {}
        pulls = self.weights * self._norms(self.gram)
        return self._by_enabled_term(pulls / pulls.sum())

    @property
    def gradient_cosine(self) -> dict[tuple[str, str], Tensor]:
        """Cosine of the angle between the gradients of each pair of terms that are on; below 0 they conflict.

        NaN where one of the two sends no gradient, as a hinge that is met. Between cosine and infonce, moment or
        variance it has the error of p - t where targets are much shorter: for infonce in float32 1e-7 at |p| = 100 |t|,
        1e-5 at 10^4 |t|, 2e-3 at 10^6 |t|. Norms, and so weights, and gradients are not concerned.
        """
        if self.gram is None:
            return {}
        norms = self._norms(self.gram)
        cosine = self.gram / (norms.unsqueeze(1) * norms)
        index = {term: self.terms.index(term) for term in self.options.enabled}
        return {(a, b): cosine[index[a], index[b]] for a, b in itertools.combinations(index, 2)}

    @property
    def cosine_similarity(self) -> Tensor:
        """Mean cosine between pred and target."""
        return self._metric("cosine_similarity")

    @property
    def top1(self) -> Tensor | None:
        """Share of rows for which a positive is the most similar key (ties are misses); None without infonce.

        The positive is the own target, or any row with the own id under ``positives="ids"``.
        """
        return self._metric("top1") if "infonce" in self.terms else None

    @property
    def chance(self) -> Tensor | None:
        """InfoNCE of a guess, ``mean ln(number of valid keys)``, in nats; None without infonce.

        Of pred -> target: extra negatives are no keys of the other direction, so that with ``direction="both"`` a guess
        is below this.
        """
        return self._metric("chance") if "infonce" in self.terms else None

    @property
    def pred_norm(self) -> Tensor:
        """Mean norm of the predictions."""
        return self._metric("pred_norm")

    @property
    def target_norm(self) -> Tensor:
        """Mean norm of the targets."""
        return self._metric("target_norm")

    def as_dict(self) -> dict[str, float]:
        """Everything as flat floats: `loss_mse`, `weight_mse`, `share_mse`, `gradient_cosine_mse_infonce` and so on.

        The one place that waits for the device. Warns once per loss, with a `DominanceWarning`, if fixed weights let a
        term drown the anchor.
        """
        named: dict[str, Tensor] = {}
        for prefix, by_term in {
            "loss": self.value,
            "weight": self.weight,
            "contribution": self.contribution,
            "grad_norm": self.grad_norm,
            "share": self.share,
        }.items():
            named.update({f"{prefix}_{term}": number for term, number in by_term.items()})
        named.update({f"gradient_cosine_{a}_{b}": number for (a, b), number in self.gradient_cosine.items()})
        named.update(
            {
                name: number
                for name, number in zip(METRICS, self.metrics.unbind(), strict=True)
                if "infonce" in self.terms or name not in _INFONCE_METRICS
            }
        )
        numbers = dict(zip(named, torch.stack(list(named.values())).tolist(), strict=True))
        self._warn_of_dominance(numbers)
        return numbers

    def warn_of_no_balance(self, stacklevel: int) -> None:
        """Once per loss, where target is trained and pred is not."""
        if self.options.weighting != "gradient" or len(self.options.enabled) < 2 or "no balance" in self.told:
            return
        self.told.add("no balance")
        warnings.warn(
            "weighting='gradient' balances gradients at pred, and pred requires none, so the weights are λ or those of "
            "earlier calls; target requires one: give it as pred, and the other as target",
            UnbalancedWarning,
            stacklevel=stacklevel,
        )

    def _warn_of_dominance(self, numbers: dict[str, float]) -> None:
        options, anchor = self.options, self.options.anchor or self.options.default_anchor
        if options.weighting != "fixed" or not numbers.get(f"share_{anchor}") or "dominance" in self.told:
            return
        ratios = {term: numbers[f"share_{term}"] / numbers[f"share_{anchor}"] for term in options.enabled}
        wanted = {term: getattr(options, term) / getattr(options, anchor) for term in options.enabled}
        term = max(ratios, key=lambda name: ratios[name] / max(1, wanted[name]))
        if ratios[term] > DOMINANCE * max(1, wanted[term]):
            self.told.add("dominance")
            warnings.warn(
                f"the gradient of {term} is {ratios[term]:,.0f} times that of {anchor} at these fixed weights, so "
                f"{term} decides the update alone; weighting='gradient' would keep it at {wanted[term]:g} times",
                DominanceWarning,
                stacklevel=3,
            )

    @staticmethod
    def _norms(gram: Tensor) -> Tensor:  # [m, m] -> [m]
        return gram.diagonal().clamp(min=0).sqrt()

    def _by_term(self, numbers: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.terms, numbers.unbind(), strict=True))

    def _by_enabled_term(self, numbers: Tensor) -> dict[str, Tensor]:
        # A monitored term has no gradient: what its entry holds is not a measurement.
        return {term: number for term, number in self._by_term(numbers).items() if term in self.options.enabled}

    def _metric(self, name: str) -> Tensor:
        return self.metrics[METRICS.index(name)]
