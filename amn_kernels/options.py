"""What to compute: the options of the loss, checked once, in one frozen object that every layer below passes on."""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed

FUSED_TERMS = ("mse", "cosine", "infonce", "moment", "variance")
"""The terms that kernels compute, by number: enum Term in csrc/types.h."""

TERMS = (*FUSED_TERMS,)
"""All terms, in the order of every per-term tensor and table."""

# Measured on two cores: pred_to_target takes the same time, within 2%, from 2 to 8 MiB; general at 4,096 rows 12% less
# at 16 MiB than at 4, and no less at 64; both at 8,192 rows 20 to 25% less at 256 MiB, which is all, than at 64.
DEFAULT_CHUNK_BYTES = {
    "cpu": {"pred_to_target": 2 << 20, "general": 16 << 20, "both": 256 << 20},
    "cuda": {"pred_to_target": 64 << 20, "general": 64 << 20, "both": 64 << 20},
    "triton": {"pred_to_target": 64 << 20, "general": 64 << 20, "both": 512 << 20},
}
"""Scratch memory for similarities, by backend and by what has to be done; see `LossOptions.chunk_bytes`.

general: one direction, with several positives in a row or with gradients for keys.
"""

_MOST = 1 << 62  # fits an int64 of the compiled code

_CHOICES = {
    "direction": ("pred_to_target", "both"),
    "negatives": ("all", "step", "sequence"),
    "positives": ("diagonal", "ids"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """The keyword options of `FusedSeqLoss` and `functional.seq_loss`, with their defaults.

    Args:
        mse: Weight λ of the mean squared error, ``mean((p - t)²)`` over rows and dimensions. 0 turns a term off:
            it is then neither computed nor reported.
        cosine: λ of ``mean(1 - cos(p, t))``.
        infonce: λ of the InfoNCE loss with in-batch negatives (van den Oord et al. 2018, arXiv:1807.03748): the
            cross entropy of the row's own target among all targets, with logits ``cos(p_i, t_j) / temperature``.
        moment: λ of the squared difference of batch mean and of standard deviation, per dimension, averaged.
        variance: λ of ``mean_k relu(γ_k - sd_k(p / |p|))``, the variance hinge of VICReg (Bardes et al. 2022,
            arXiv:2105.04906) in normalised space.
        weighting: How the weight of each term follows from its λ. ``"gradient"``: so that term i pulls on the
            prediction λ_i / λ_anchor times as hard as the anchor, whatever its scale; ``"value"``: the same by loss
            values; ``"fixed"``: the weight is λ; or a function of (gramian [m, m], values [m]) of the terms that are
            on, which returns weights [m] that λ is multiplied by. Defined in `amn_kernels.weighting`.
        anchor: The term that keeps its own scale; default: mse if it is on, else the first term that is on.
        ema: Decay of running norms and values, in [0, 1).
        temperature: τ > 0 of InfoNCE.
        learnable_temperature: Make τ a parameter (`FusedSeqLoss` only). Over ranks its gradient too is to be averaged:
            wrap the loss, not the model alone, in DistributedDataParallel.
        direction: ``"pred_to_target"``, or ``"both"`` for the mean of the two cross entropies, as CLIP has it.
        negatives: Which rows of [B, T, D] input are each other's negatives: ``"all"`` B·T, the B rows of one
            ``"step"``, or the T rows of one ``"sequence"``.
        variance_target: γ of the variance term; default: the normalised targets' own deviation per dimension.
        false_negative_margin: A key j other than the own one with ``1 - cos(t_i, k_j)`` below this is not a negative of
            row i, extra negatives included: GISTEmbed (Solatorio 2024, arXiv:2402.16829) with the targets as guide.
            Costs one more matrix product, 2 N² D operations. Default: none.
        positives: ``"diagonal"``: the own target is the positive, and rows with one id are not each other's negatives;
            ``"ids"``: all rows with the own id are positives, and InfoNCE is ``logsumexp_j s_ij`` less the mean of s_ij
            over them, L_out of SupCon (Khosla et al. 2020, arXiv:2004.11362).
        update_every: Update the state of the weighting every so many calls.
        monitor: Names of terms with λ = 0 to compute and report without a gradient. One that is NaN makes the
            loss NaN.
        process_group: A torch.distributed group whose ranks hold parts of one batch: values, weights and statistics are
            those of the whole batch. Gradients are multiplied by the number of ranks, so that the mean over ranks that
            DistributedDataParallel takes is the gradient of the loss.
        gather_negatives: The targets of all ranks of the group (default: of the default group) are keys, passed around
            in a ring so that no rank holds them all; otherwise those of the own rank. Needs ``negatives="all"``.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; default: the environment variable
            AMN_KERNELS_BACKEND, else the best one, in this order, that can do what is asked.
        chunk_bytes: Scratch memory for similarities, in bytes. Default on the CPU: 2 MiB; 16 MiB with
            ``positives="ids"`` or a gradient for keys; 256 MiB with ``direction="both"``, which computes those that
            don't fit twice. Backend "cuda": 64 MiB; "triton": 64 MiB, 512 MiB for both directions. A smaller
            number is raised to what 64 keys for 1,024 rows take, and to 64 rows of all keys (not by "triton" with both
            directions, ``positives="ids"`` or a gradient for keys). It never changes the result beyond rounding.
        check_finite: Raise on NaN or Inf in a row that counts, instead of returning a NaN loss. Synchronises.

    Raises:
        ValueError: A value is outside what is stated above; the message names the option and what was got.
    """

    mse: float = 1.0
    cosine: float = 0.0
    infonce: float = 0.0
    moment: float = 0.0
    variance: float = 0.0
    weighting: str | Callable = "gradient"
    anchor: str | None = None
    ema: float = 0.99
    temperature: float = 0.07
    learnable_temperature: bool = False
    direction: str = "pred_to_target"
    negatives: str = "all"
    variance_target: float | None = None
    false_negative_margin: float | None = None
    positives: str = "diagonal"
    update_every: int = 1
    monitor: tuple[str, ...] = ()
    process_group: Any = None
    gather_negatives: bool = False
    backend: str | None = None
    chunk_bytes: int | None = None
    check_finite: bool = False

    # Derived once, because every call reads them.
    enabled: tuple[str, ...] = field(init=False)
    """Names of the terms with a weight > 0, in the order of `TERMS`."""
    terms: tuple[str, ...] = field(init=False)
    """Names of the terms to compute, in the same order: the enabled and the monitored ones."""
    fused: bool = field(init=False)
    """Whether all of `terms` are among `FUSED_TERMS`."""
    lambdas: tuple[float, ...] = field(init=False)
    """λ of each of `terms`; 0 for a monitored one."""
    over_ranks: bool = field(init=False)
    """Whether the rows of several processes are one batch."""

    def __post_init__(self):
        for term in TERMS:
            if self._take_number(term) < 0:
                raise ValueError(f"{term} must be a finite weight >= 0, got {getattr(self, term)}")
        object.__setattr__(self, "enabled", tuple(term for term in TERMS if getattr(self, term) > 0))
        if not self.enabled:
            raise ValueError(f"all weights are 0; at least one of {', '.join(TERMS)} must be positive")
        if not 0 <= self._take_number("ema") < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        for option in ("temperature", "variance_target", "false_negative_margin"):
            optional = option != "temperature"
            if not (optional and getattr(self, option) is None) and not self._take_number(option) > 0:
                raise ValueError(
                    f"{option} must be finite and > 0{', or None' * optional}, got {getattr(self, option)}"
                )
        for option in ("update_every", "chunk_bytes"):
            value = getattr(self, option)
            if option == "chunk_bytes" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
                raise ValueError(f"{option} must be a whole number in [1, 2**62], got {shown(value)}")
        for option in ("learnable_temperature", "gather_negatives", "check_finite"):
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"{option} must be True or False, got {shown(getattr(self, option))}")
        for option, choices in _CHOICES.items():
            value = getattr(self, option)
            if not (isinstance(value, str) and value in choices):
                raise ValueError(f"{option} must be one of {', '.join(choices)}, got {shown(value)}")
        known = isinstance(self.weighting, str) and self.weighting in ("fixed", "value", "gradient")
        if not (known or callable(self.weighting)):
            raise ValueError(f"weighting must be fixed, value, gradient or a callable, got {shown(self.weighting)}")
        self._check_term_names()
        self._check_infonce()
        terms = tuple(term for term in TERMS if term in self.enabled or term in self.monitor)
        object.__setattr__(self, "terms", terms)
        object.__setattr__(self, "fused", set(terms) <= set(FUSED_TERMS))
        object.__setattr__(self, "lambdas", tuple(getattr(self, term) for term in terms))
        object.__setattr__(self, "over_ranks", self.process_group is not None or self.gather_negatives)

    def _take_number(self, option: str) -> float:
        """Keeps the option as a float and returns it; raises ValueError naming it if it is no finite real number."""
        given = getattr(self, option)
        if isinstance(given, bool) or not isinstance(given, numbers.Real):
            raise ValueError(f"{option} must be a number, got {shown(given)}")
        try:
            value = float(given)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise ValueError(f"{option} must be a finite number, got {shown(given)}")
        object.__setattr__(self, option, value)
        return value

    def _check_term_names(self):
        # A set would do too, but a string would pass letter by letter, and an iterator only once.
        if not isinstance(self.monitor, (tuple, list, set, frozenset)):
            raise ValueError(f"monitor must be a tuple of term names, got {shown(self.monitor)}")
        for name in self.monitor:
            if not (isinstance(name, str) and name in TERMS):
                raise ValueError(f"monitor must name terms of {', '.join(TERMS)}, got {shown(name)}")
            if name in self.enabled:
                raise ValueError(f"monitor is for terms of weight 0, got {name!r} of weight {getattr(self, name)}")
        # In one order, as a set has another one in every process.
        object.__setattr__(self, "monitor", tuple(term for term in TERMS if term in self.monitor))
        if self.anchor is not None and not (isinstance(self.anchor, str) and self.anchor in self.enabled):
            raise ValueError(f"anchor must be one of the terms that are on, {self.enabled}, got {shown(self.anchor)}")

    def _check_infonce(self):
        group = self.process_group
        if group is not None and not isinstance(group, getattr(torch.distributed, "ProcessGroup", ())):
            raise ValueError(f"process_group must be a group of torch.distributed or None, got {shown(group)}")
        if self.gather_negatives and self.negatives != "all":
            raise ValueError(f"gather_negatives=True needs negatives='all', got negatives={self.negatives!r}")
        if "infonce" in (*self.enabled, *self.monitor):
            return
        used = {
            "learnable_temperature=True": self.learnable_temperature,
            "positives='ids'": self.positives == "ids",
            "false_negative_margin": self.false_negative_margin is not None,
            "gather_negatives=True": self.gather_negatives,
        }
        for option, is_on in used.items():
            if is_on:
                raise ValueError(f"{option} needs the infonce term, which is off (weight 0)")

    def __deepcopy__(self, memo: dict) -> "LossOptions":
        # Nothing in it changes, and a process group can't be copied.
        return self

    @property
    def default_anchor(self) -> str:
        """The anchor where none is named: mse if it is on, else the first term that is on."""
        return "mse" if "mse" in self.enabled else self.enabled[0]


def shown(value: Any) -> str:
    """`value` as an error message has it: of something long, its beginning."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"an {type(value).__name__} of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def scratch_bytes(options: LossOptions, defaults: dict[str, int], keys_learn: bool) -> int:
    """`LossOptions.chunk_bytes`, or else what `defaults`, of a backend, have for the options.

    keys_learn: whether target or extra_negatives get a gradient.
    """
    if options.chunk_bytes is not None:
        return options.chunk_bytes
    if options.direction == "both":
        return defaults["both"]
    return defaults["general" if options.positives == "ids" or keys_learn else "pred_to_target"]
