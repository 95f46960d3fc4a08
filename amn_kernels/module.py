"""`FusedSeqLoss`: the loss as a module, with what has to be remembered from call to call."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from amn_kernels import backends, functional
from amn_kernels.checks import check_inputs, check_state
from amn_kernels.constants import Constants
from amn_kernels.options import LossOptions
from amn_kernels.reference.seq_loss import compute_dtype
from amn_kernels.stats import LossStats
from amn_kernels.weighting import make_weighting


class _Last:
    """What the last call left. Not an attribute of the module, whose assignment looks for parameters each time."""

    def __init__(self):
        self.stats: LossStats | None = None
        self.told: set[str] = set()


class FusedSeqLoss(nn.Module):
    """Weighted sum of MSE, cosine, InfoNCE, moment and variance loss in one op, with exact gradients.

    The arguments are the fields of `amn_kernels.options.LossOptions`, documented there; `forward` takes the tensors
    of `amn_kernels.functional.seq_loss`, documented there with what is raised.

    >>> criterion = FusedSeqLoss(mse=1.0, infonce=0.5)
    >>> loss = criterion(pred, target)
    >>> loss.backward()
    >>> criterion.stats.as_dict()
    """

    def __init__(
        self,
        *,
        mse: float = 1.0,
        cosine: float = 0.0,
        infonce: float = 0.0,
        moment: float = 0.0,
        variance: float = 0.0,
        weighting: str | Callable = "gradient",
        anchor: str | None = None,
        ema: float = 0.99,
        temperature: float = 0.07,
        learnable_temperature: bool = False,
        direction: str = "pred_to_target",
        negatives: str = "all",
        variance_target: float | None = None,
        false_negative_margin: float | None = None,
        positives: str = "diagonal",
        update_every: int = 1,
        monitor: tuple[str, ...] = (),
        process_group: Any = None,
        gather_negatives: bool = False,
        backend: str | None = None,
        chunk_bytes: int | None = None,
        check_finite: bool = False,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.options = LossOptions(**arguments)
        self._backend = backends.requested(self.options.backend)
        self._constants = Constants(*((self.options.lambdas, dtype) for dtype in (torch.float32, torch.float64)))
        if learnable_temperature:
            self.log_temperature = nn.Parameter(torch.empty((), dtype=torch.float32))
            self.reset_parameters()
        self.weighting = make_weighting(self.options)
        self._last = _Last()

    def reset_parameters(self) -> None:
        """Set a learned temperature back to the option, where no checkpoint fills it (docs/integrations.md)."""
        if self.options.learnable_temperature:
            nn.init.constant_(self.log_temperature, math.log(self.options.temperature))

    def forward(
        self,
        pred: Tensor,  # [N, D] or [B, T, D]
        target: Tensor,  # same shape
        *,
        mask: Tensor | None = None,  # [N] or [B, T] bool
        extra_negatives: Tensor | None = None,  # [K, D]
        ids: Tensor | None = None,  # [N] or [B, T] integers
    ) -> Tensor:  # []
        """The loss; see `amn_kernels.functional.seq_loss` for arguments, result and errors."""
        check_inputs(pred, target, self.options, mask, extra_negatives, ids)
        real = compute_dtype(pred, target)
        single, double = self._constants.on(pred.device)
        temperature = None
        if self.options.learnable_temperature:
            check_state(self.log_temperature.device, pred.device)
            # In what is computed in: the module may have been cast to 16 bits.
            temperature = self.log_temperature.to(real).exp()
        loss, self._last.stats = functional.evaluate(
            pred,
            target,
            self.options,
            self._backend,
            weights=double if real is torch.float64 else single,
            weighting=self.weighting,
            told=self._last.told,
            temperature=temperature,
            mask=mask,
            extra_negatives=extra_negatives,
            ids=ids,
        )
        return loss

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._constants.follow(fn)
        return self

    @property
    def stats(self) -> LossStats:
        """Diagnostics of the last call; raises RuntimeError before the first."""
        if self._last.stats is None:
            raise RuntimeError("FusedSeqLoss.stats: the loss has not been called yet")
        return self._last.stats

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        default = LossOptions()
        names = (field.name for field in dataclasses.fields(LossOptions) if field.init)
        shown = (name for name in names if getattr(self.options, name) != getattr(default, name))
        return ", ".join(f"{name}={getattr(self.options, name)!r}" for name in shown)
