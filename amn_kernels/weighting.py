"""How the weight of each term follows from its λ: the weightings, with their state.

A weighting is called with the values [m] and the Gram matrix [m, m] of the term gradients and returns weights [m]. All
arithmetic is on the device, without a host read, so it can be captured and compiled.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from amn_kernels import extra_state, ops, triton
from amn_kernels.checks import check_state
from amn_kernels.constants import Constants
from amn_kernels.options import LossOptions
from amn_kernels.reference.balance import MOST, balance, bias
from amn_kernels.reference.seq_loss import without_autocast

HINGES = frozenset(("moment", "variance"))
"""Penalties that fade to zero when they are met; amplified, they would pull hardest when they have least to say."""


def make_weighting(options: LossOptions) -> nn.Module | None:
    """The weighting that the options name; None for fixed weights, which need no state and no arithmetic."""
    if options.weighting == "fixed":
        return None
    if callable(options.weighting):
        return CallableWeighting(options)
    return BalancedWeighting(options)


class BalancedWeighting(nn.Module):
    """Weights by which each term pulls λ_i / λ_anchor times as hard as the anchor, which keeps its own scale.

    ``"gradient"``: x_i is the squared norm G_ii of the term's gradient; ``"value"``: x_i is the term's value. Per term
    there is a running mean E_i of x_i, bias-corrected as in Kingma & Ba 2015 (arXiv:1412.6980, section 3); an update
    counts as at most `SPIKE` times the mean once that has seen `SPIKE_AFTER` of them. With N = sqrt(E) and
    M_i = max(N_i, current norm) for gradient, N = M = E for value::

        w_anchor = λ_anchor,    w_i = λ_i clamp(N_anchor / M_i, LEAST, MOST),    hinges: w_i at most λ_i

    A term or an anchor that has no running mean yet keeps λ_i. The state moves only in training mode, every
    ``update_every`` calls, and only by values that are finite and positive; others are counted in `skipped`.

    Buffers (float32, or int64 for counters): ``mean`` [m] before bias correction, ``updates`` [m], ``calls`` [],
    ``skipped`` [m]. Beside them a state_dict has what they belong to; a mean of another ``ema`` is converted.
    """

    mean: Tensor
    updates: Tensor

    def __init__(self, options: LossOptions):
        super().__init__()
        self.terms = options.terms
        self.kind = options.weighting
        self.decay = options.ema
        self.update_every = options.update_every
        self.anchor = options.terms.index(options.anchor or options.default_anchor)
        m = len(self.terms)
        self.register_buffer("mean", torch.zeros(m, dtype=torch.float32))
        self.register_buffer("updates", torch.zeros(m, dtype=torch.int64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros(m, dtype=torch.int64))
        most = [1.0 if term in HINGES else MOST for term in self.terms]
        self.constants = Constants((options.lambdas, torch.float64), (most, torch.float32))
        self._mean_decay = self.decay

    def reset_parameters(self) -> None:
        """Forget what was seen, as FSDP asks for, and transformers through `_init_weights` (docs/integrations.md)."""
        for buffer in self.buffers():  # not the decay: transformers leaves what a checkpoint has filled as it is
            nn.init.zeros_(buffer)

    @torch.no_grad()
    def forward(self, values: Tensor, gram: Tensor | None) -> Tensor:  # [m], [m, m] -> [m]
        """Weights in the dtype of the values; updates the state in training mode.

        Without a Gram matrix (no gradient for pred was asked for), gradient weights come from the state as it is.
        """
        return _step_for(values.device)(values, gram, *self.arguments(values.device))

    def moves_in_python(self, device: torch.device) -> bool:
        """Whether a call there writes to the state by operations that torch.func sees, and refuses."""
        return self.training and _step_for(device) is balance

    def arguments(self, device: torch.device) -> tuple:
        """State and options, as `amn_kernels.reference.balance.balance` takes them from ``mean`` on.

        Raises ValueError if the state is not on the device of the call.
        """
        buffers = self._buffers  # as attributes they cost a failed search each
        check_state(self.mean.device, device)
        if self._mean_decay != self.decay:
            self._follow_decay()
        return (
            buffers["mean"],
            buffers["updates"],
            buffers["calls"],
            buffers["skipped"],
            *self.constants.on(device),
            self.anchor,
            self.decay,
            self.update_every,
            self.kind == "value",
            self.training,
        )

    def _apply(self, fn, recurse=True):
        # Running squares of norms would overflow or vanish in 16 bits: `.half()` and the like change no dtype.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype is not buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        self.constants.follow(fn)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *further):
        # First of all: torch would ask for it after the buffers were copied.
        if (given := state_dict.get(f"{prefix}_extra_state")) is not None:
            self._check_state(given)
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items()}
        super()._load_from_state_dict(state_dict, prefix, *further)
        for name, dtype in dtypes.items():  # with assign=True they are the tensors of the state themselves
            self._buffers[name] = self._buffers[name].to(dtype)
        if self._mean_decay != self.decay:
            self._follow_decay()

    def get_extra_state(self) -> Tensor:
        """What the numbers in the buffers belong to: terms, weighting and the decay of the mean."""
        return extra_state.pack({"terms": self.terms, "weighting": self.kind, "ema": self._mean_decay})

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError if the state belongs to other terms or another weighting."""
        self._mean_decay = self._check_state(state).get("ema", self.decay)

    def _check_state(self, state: Tensor) -> dict:
        of = extra_state.unpack(state)
        if of["terms"] != list(self.terms) or of["weighting"] != self.kind:
            raise ValueError(
                f"weighting state is of weighting {of['weighting']!r} over {', '.join(of['terms'])}; "
                f"this loss has weighting {self.kind!r} over {', '.join(self.terms)}"
            )
        return of

    @torch.no_grad()
    def _follow_decay(self) -> None:
        """Make a mean that was loaded one of this decay, with the same value once its bias is corrected."""
        self.mean.mul_(bias(self.updates, self.decay) / bias(self.updates, self._mean_decay))
        self._mean_decay = self.decay


def _step_for(device: torch.device) -> Callable[..., Tensor]:
    """`amn_kernels.reference.balance.balance`, or its fused twin for the device."""
    if (ops.why_unavailable() if device.type == "cpu" else ops.why_no_cuda()) is None:
        return ops.balance
    if device.type == "cuda" and triton.why_unavailable() is None and triton.why_unsupported(device) is None:
        from amn_kernels.triton import backend

        return backend.balance
    return balance


@without_autocast
def _call_without_autocast(gramian: Tensor, values: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return function(gramian, values)


class CallableWeighting(nn.Module):
    """Weights λ_i f(Gram, values)_i by a function of the caller, over the terms that are on, in signature order."""

    def __init__(self, options: LossOptions):
        super().__init__()
        assert callable(options.weighting)
        self.function = options.weighting
        self.terms = options.terms
        enabled = [options.terms.index(term) for term in options.enabled]
        self.constants = Constants((options.lambdas, torch.float64), (enabled, torch.int64))

    @torch.no_grad()
    def forward(self, values: Tensor, gram: Tensor | None) -> Tensor:  # [m], [m, m] -> [m]
        """Weights in the dtype of the values; plain λ where no gradient for pred was asked for."""
        lambdas, some = self.constants.on(values.device)
        weights = lambdas.to(values.dtype, copy=True)
        if gram is None:
            return weights
        scale = _call_without_autocast(gram[some][:, some], values[some], self.function)
        if not isinstance(scale, Tensor) or scale.shape != (len(some),):
            raise ValueError(
                f"weighting must return a tensor of shape [{len(some)}], one weight per enabled term, "
                f"got {list(scale.shape) if isinstance(scale, Tensor) else type(scale).__name__}"
            )
        weights[some] *= scale.to(weights)
        return weights

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.constants.follow(fn)
        return self
