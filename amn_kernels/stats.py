"""What a call of the loss reports: values, weights and diagnostics, as device tensors until somebody reads them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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


@dataclass(slots=True)
class LossStats:
    """Diagnostics of one call of the loss. All tensors are detached; only `as_dict` synchronises.

    A term that was not computed is absent from every dictionary, never 0.
    """

    terms: tuple[str, ...]
    differentiated: tuple[str, ...]  # the terms that send a gradient
    values: Tensor  # [m]
    weights: Tensor  # [m]
    gram: Tensor | None  # [m, m]
    metrics: Tensor  # [5]

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
        """Norm of the unweighted term's gradient with respect to pred, [N, D] taken as one vector.

        Empty where the backend did no gradient work, as under ``torch.no_grad()``; a monitored term is absent.
        """
        if self.gram is None:
            return {}
        norms = self._by_term(self.gram.diagonal().clamp(min=0).sqrt())
        # A monitored term has weight 0 exactly and no gradient was computed for it.
        return {term: norm for term, norm in norms.items() if term in self.differentiated}

    @property
    def cosine_similarity(self) -> Tensor:
        """Mean cosine between pred and target."""
        return self._metric("cosine_similarity")

    @property
    def top1(self) -> Tensor | None:
        """Share of rows whose own target is the most similar key (ties are misses); None without infonce."""
        return self._metric("top1") if "infonce" in self.terms else None

    @property
    def chance(self) -> Tensor | None:
        """InfoNCE of a guess, ``mean ln(number of valid keys)``, in nats; None without infonce."""
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
        """Everything as flat floats, ``loss_mse``, ``weight_mse``, ``contribution_mse``, ``grad_norm_mse``, ...

        The one place that waits for the device.
        """
        named = {}
        for prefix, numbers in {
            "loss": self.value,
            "weight": self.weight,
            "contribution": self.contribution,
            "grad_norm": self.grad_norm,
        }.items():
            named.update({f"{prefix}_{term}": number for term, number in numbers.items()})
        named.update(
            {
                name: number
                for name, number in zip(METRICS, self.metrics.unbind(), strict=True)
                if "infonce" in self.terms or name not in _INFONCE_METRICS
            }
        )
        return dict(zip(named, torch.stack(list(named.values())).tolist(), strict=True))

    def _by_term(self, numbers: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.terms, numbers.unbind(), strict=True))

    def _metric(self, name: str) -> Tensor:
        return self.metrics[METRICS.index(name)]
