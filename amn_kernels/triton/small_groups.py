"""The loss of small groups, whose similarities fit one program: a training step in two or three launches."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from amn_kernels.backends import Call, Outcome
from amn_kernels.primitives import Row
from amn_kernels.reference.seq_loss import to_groups
from amn_kernels.stats import METRICS, TermOutputs
from amn_kernels.triton import group_kernels
from amn_kernels.triton.group_kernels import MAX_ROWS, SUMS
from amn_kernels.weighting import BalancedWeighting

_TERMS = ("mse", "cosine", "infonce")


class Tile(NamedTuple):
    """How the forward kernel is laid out for a group."""

    rows: int
    dims: int
    warps: int
    stages: int


def tile(size: int, single: bool) -> Tile:
    """The tile for groups of so many rows; ``single``: float32 products, else 16-bit ones."""
    rows = max(16, triton.next_power_of_2(size))
    return _SINGLE[rows] if single else _HALF[rows]


# More dimensions at a time spill, fewer leave the tensor cores idle; the check of the kernels prints the registers.
_HALF = {
    16: Tile(16, 128, 4, 2),
    32: Tile(32, 64, 4, 2),
    64: Tile(64, 64, 8, 2),
    128: Tile(128, 64, 8, 2),
}
_SINGLE = {
    16: Tile(16, 64, 4, 2),
    32: Tile(32, 32, 4, 2),
    64: Tile(64, 32, 8, 2),
    128: Tile(128, 16, 8, 2),
}


def why_unsupported(call: Call) -> str | None:
    """Why a call has to take the large path; None if it is one of small groups."""
    options = call.options
    others = [term for term in options.terms if term not in _TERMS]
    size = _group_size(call)
    reasons = {
        f"groups of {size} rows, more than {MAX_ROWS}": size > MAX_ROWS,
        f"terms {', '.join(others)}": bool(others),
        "extra_negatives": call.extra_negatives is not None,
        "positives='ids'": options.positives == "ids",
        "false_negative_margin": options.false_negative_margin is not None,
        "a target that requires a gradient": torch.is_grad_enabled() and call.target.requires_grad,
        "float64": torch.float64 in (call.pred.dtype, call.target.dtype),
        "rows over ranks": options.over_ranks,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def run(call: Call) -> Outcome:
    """Loss, outputs and weights of a call for which `why_unsupported` has no reason."""
    weighting = call.weighting
    balanced = weighting if isinstance(weighting, BalancedWeighting) else None
    weights = call.weights if weighting is None else None
    loss, values, gram, metrics, weights = _SmallGroups.apply(
        call.pred, call.target, call.temperature, weights, call.mask, call.ids, call.options, balanced, _needs(call)
    )
    outputs = TermOutputs(values, gram if gram.numel() else None, metrics)
    if weighting is not None and balanced is None:
        weights = weighting(values.detach(), outputs.gram)
        loss = torch.dot(values, weights)
    return Outcome(loss, outputs, weights)


def _group_size(call: Call) -> int:
    """Rows of a group: what `to_groups` makes the second dimension."""
    if call.pred.dim() == 2 or call.options.negatives == "all":
        return call.pred.numel() // call.pred.shape[-1]
    return call.pred.shape[0 if call.options.negatives == "step" else 1]


def _needs(call: Call) -> bool:
    wanted = (call.pred, call.temperature)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in wanted)


class _SmallGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, target, temperature, weights, mask, ids, options, weighting, needs):
        """Loss [], values [m], Gram matrix [m, m] or [0, 0], metrics [5] and weights [m]."""
        # The backward reads what was read here, so input that has to be copied into groups is copied once.
        groups = [
            None if x is None else to_groups(x, options.negatives, pred.dim() - 1) for x in (pred, target, mask, ids)
        ]
        p, t, mask, ids = groups
        count, size, dim = p.shape
        m = len(options.terms)
        place = _places(options)
        sends = sum(1 << i for i, term in enumerate(options.terms) if term not in options.monitor)
        attends = needs and place["INFONCE"] >= 0 and bool(sends >> place["INFONCE"] & 1)
        both = options.direction == "both"
        kind = "fixed" if weights is not None else None if weighting is None else weighting.kind

        real = {"dtype": torch.float32, "device": pred.device}
        values, metrics, loss = torch.empty(m, **real), torch.empty(len(METRICS), **real), torch.empty((), **real)
        gram = torch.empty((m, m) if needs else (0, 0), **real)
        weights = torch.empty(m, **real) if weights is None else weights
        rows = torch.empty(Row.COL_OTHERS + 1 if both else Row.COL_MAX, count * size, **real | {"dtype": torch.float64})
        attention = torch.empty(count * size if attends else 0, dim, **real)
        tau_slope = torch.empty((), **real) if attends and temperature is not None else None
        single = count == 1
        partial = None if single else torch.empty(count, SUMS, **real | {"dtype": torch.float64})

        results = (weights, values, gram, metrics, loss, tau_slope)
        state = (None,) * 6
        numbers = (0, 1, 0.0, 0.0)
        if weighting is not None:
            state = (
                weighting.mean,
                weighting.updates,
                weighting.calls,
                weighting.skipped,
                weighting.lambdas,
                weighting.most,
            )
            log_decay = math.log(weighting.decay) if weighting.decay > 0 else -math.inf
            numbers = (weighting.anchor, weighting.update_every, 1 - weighting.decay, log_decay)
        finish = {
            **place, "SENDS": sends, "GRAM": needs, "WEIGHTING": kind,
            "UPDATE": weighting is not None and weighting.training,
        }  # fmt: skip
        layout = tile(size, single=torch.float32 in (p.dtype, t.dtype) or p.dtype != t.dtype)
        group_kernels.forward_kernel[(count,)](
            p, t, mask, ids, temperature, rows, attention, partial, *results, *state, options.temperature, size, dim,
            count, *p.stride(), *t.stride(), *_strides(mask), *_strides(ids), *numbers, **finish, ATTENDS=attends,
            BOTH=both, ONE_GROUP=single, BLOCK_M=layout.rows, BLOCK_D=layout.dims, num_warps=layout.warps,
            num_stages=layout.stages,
        )  # fmt: skip
        if not single:
            group_kernels.finish_kernel[(1,)](
                partial, temperature, *results, *state, options.temperature, dim, count, *numbers, **finish, BLOCK=64,
                num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(pred, target, temperature, weights, rows, attention, tau_slope)
        ctx.options, ctx.place, ctx.sends = options, place, sends
        ctx.mark_non_differentiable(gram, metrics)
        ctx.set_materialize_grads(False)  # zeros for what has no gradient would be launches in vain
        if kind != "fixed":
            ctx.mark_non_differentiable(weights)
        return loss, values, gram, metrics, weights

    @staticmethod
    def backward(ctx, grad_loss, grad_values, *_):
        pred, target, temperature, weights, rows, attention, tau_slope = ctx.saved_tensors
        options = ctx.options
        if grad_loss is None and grad_values is None:
            return (None,) * 9
        p, t = (to_groups(x, options.negatives, pred.dim() - 1) for x in (pred, target))
        count, size, dim = p.shape
        grad = torch.empty_like(pred, memory_format=torch.contiguous_format)
        grad_tau = None if tau_slope is None else torch.empty_like(temperature)
        grouped = to_groups(grad, options.negatives, pred.dim() - 1)
        block = min(1024, triton.next_power_of_2(dim))
        group_kernels.backward_kernel[(count * size,)](
            p, t, attention, rows, grad, grad_tau, grad_loss, grad_values, weights, tau_slope, temperature,
            options.temperature, size, dim, count, *p.stride(), *t.stride(), *grouped.stride()[:2], **ctx.place,
            SENDS=ctx.sends, BLOCK_D=block, num_warps=4,
        )  # fmt: skip
        return grad, None, grad_tau, *(None,) * 6


def _places(options) -> dict[str, int]:
    """The place of each term among those that are computed, -1 for the others, by the name of the kernels' argument."""
    return {term.upper(): options.terms.index(term) if term in options.terms else -1 for term in _TERMS}


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else x.stride()
