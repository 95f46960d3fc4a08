"""The loss of groups of at most 128 rows: a program for each, so that a training step is two or three launches.

Forward and backward are one launch each. Several groups need one more in between, which adds up their sums. Weights,
fixed or balanced, and the loss are formed where the sums are, and the backward multiplies by the incoming gradients and
the weights itself. Input whose rows don't have unit stride is copied first.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from amn_kernels import ops
from amn_kernels.backends import Call, Outcome, weighted
from amn_kernels.options import FUSED_TERMS, LossOptions
from amn_kernels.primitives import PLAIN_ROWS, Row
from amn_kernels.reference.seq_loss import to_groups
from amn_kernels.stats import METRICS, TermOutputs
from amn_kernels.triton.group_kernels import finish_groups_kernel, small_groups_kernel
from amn_kernels.triton.launching import launch, row_tile, strides
from amn_kernels.triton.row_combine import row_combine_kernel
from amn_kernels.triton.term_sums import FINISH_BLOCKS, SLOTS
from amn_kernels.weighting import BalancedWeighting

MAX_ROWS = 128
MAX_ROWS_WIDE = 64
"""For both directions, which hold three tiles of similarities at a time, and for ids: at 128 rows they spill."""
MOST_COUNTED = 1 << 26
"""Most mask entries (64 MiB) that all programs may read together: each counts the rows of the whole batch."""
STATE = ("mean", "updates", "calls", "skipped", "lambdas", "most")
"""What the kernels read and write of a `BalancedWeighting`."""


class Tile(NamedTuple):
    """Dimensions that a program has in registers at a time, by the rows of a group, and how it is compiled."""

    dims: int
    warps: int
    stages: int
    registers: int | None = None
    """Most registers of a thread; None: the assembler chooses."""


# Registers decide: more dimensions at a time spill, and so does a similarity tile over fewer warps. The check of the
# compiled kernels prints both; which of those that fit is fastest is not measured. Left to itself, the assembler stops
# at 128 registers for small tiles of float32 on sm_120, and at 168 for 32 rows of bfloat16, and spills a few bytes.
# From 64 rows of half precision on there is one stage: with two, Triton 3.8 keeps a wgmma of sm_90 pending while it
# refills the one buffer that this reads.
_HALF = {16: Tile(64, 4, 2), 32: Tile(64, 4, 2, 255), 64: Tile(64, 8, 1), 128: Tile(32, 8, 1)}
_SINGLE = {16: Tile(32, 4, 2, 255), 32: Tile(16, 4, 2, 255), 64: Tile(16, 8, 2, 255), 128: Tile(16, 8, 1)}


def why_unsupported(call: Call) -> str | None:
    """Why a call takes the path of chunks instead; None if it is one of small groups.

    No reason states the number of rows: a compiled graph would be made for that number alone.
    """
    options = call.options
    is_wide = options.direction == "both" or call.ids is not None
    most = MAX_ROWS_WIDE if is_wide else MAX_ROWS
    columns = [term for term in options.terms if term in ("moment", "variance")]
    reasons = {
        f"groups have more than {most} rows": _group_size(call) > most,
        f"{' and '.join(columns)} are sums over columns": bool(columns),
        "extra_negatives are keys of all groups": call.extra_negatives is not None,
        "positives='ids' needs more sums": options.positives == "ids",
        "false_negative_margin needs a second similarity tile": options.false_negative_margin is not None,
        "the target requires a gradient": torch.is_grad_enabled() and call.target.requires_grad,
        "the temperature is learned": call.temperature is not None,
        "chunk_bytes asks for chunks": options.chunk_bytes is not None,
        "every group would count the rows of a long mask": call.mask is not None and _counted(call) > MOST_COUNTED,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _counted(call: Call) -> int:
    """Rows of the mask that all programs read together."""
    rows = call.pred.numel() // call.pred.shape[-1]
    return rows * rows // _group_size(call)


def _group_size(call: Call) -> int:
    """Rows of a group: what `to_groups` makes the second dimension."""
    if call.pred.dim() == 2 or call.options.negatives == "all":
        return call.pred.numel() // call.pred.shape[-1]
    return call.pred.shape[0 if call.options.negatives == "step" else 1]


_CHOICES = "int[] terms, int[] monitored, float temperature, bool both, int negatives"
_LIBRARY = torch.library.Library("amn_kernels_triton", "FRAGMENT")
_LIBRARY.define(
    "_small_groups_forward(Tensor pred, Tensor target, Tensor? mask, Tensor? ids, Tensor? weights, Tensor(a!)? mean,"
    " Tensor(b!)? updates, Tensor(c!)? calls, Tensor(d!)? skipped, Tensor? lambdas, Tensor? most,"
    f" {_CHOICES}, bool needs, str weighting, int anchor, float decay, int update_every, bool update)"
    " -> (Tensor loss, Tensor values, Tensor gram, Tensor metrics, Tensor balanced, Tensor rows, Tensor attention)"
)
_LIBRARY.define(
    "_small_groups_backward(Tensor? grad_loss, Tensor? weights, Tensor? grad_values, Tensor pred, Tensor target,"
    f" Tensor rows, Tensor attention, {_CHOICES}) -> Tensor"
)


def _grouped(x: Tensor | None, negatives: int, row_dims: int) -> Tensor | None:
    return None if x is None else to_groups(x, list(ops.NEGATIVES)[negatives], row_dims)


def _rows(x: Tensor, negatives: int) -> Tensor:  # [G, M, D] with unit stride along D
    grouped = _grouped(x, negatives, x.dim() - 1)
    return grouped if grouped.stride(-1) == 1 else grouped.contiguous()


def _results(pred, terms, monitored, both, needs, weighting) -> tuple[Tensor, ...]:
    """Empty results of the forward, in its order."""
    n, dim, m = pred.numel() // pred.shape[-1], pred.shape[-1], len(terms)
    attends = needs and FUSED_TERMS.index("infonce") in terms and FUSED_TERMS.index("infonce") not in monitored
    real, double = torch.float32, torch.float64
    return (
        pred.new_empty((), dtype=real),
        pred.new_empty(m, dtype=real),
        pred.new_empty((m, m) if needs else (0, 0), dtype=real),
        pred.new_empty(len(METRICS), dtype=real),
        pred.new_empty(0 if weighting in ("", "fixed") else m, dtype=real),
        pred.new_empty(Row.COL_OTHERS + 1 if both else PLAIN_ROWS, n, dtype=double),
        pred.new_empty(n if attends else 0, dim, dtype=real),
    )


def forward(
    pred, target, mask, ids, weights, mean, updates, calls, skipped, lambdas, most, terms, monitored, temperature, both,
    negatives, needs, weighting, anchor, decay, update_every, update,
):  # fmt: skip
    """The op `_small_groups_forward`; its schema has the arguments."""
    results = _results(pred, terms, monitored, both, needs, weighting)
    loss, values, gram, metrics, balanced, rows, attention = results
    p, t = _rows(pred, negatives), _rows(target, negatives)
    groups, size, dim = p.shape
    mask, ids = (_grouped(x, negatives, pred.dim() - 1) for x in (mask, ids))
    partial = torch.empty(SLOTS, groups, dtype=torch.float64, device=pred.device)
    outputs = (
        balanced if weights is None else weights, values, gram if needs else None, metrics, loss,
        mean, updates, calls, skipped, lambdas, most,
    )  # fmt: skip
    numbers = (temperature, decay, math.log(decay) if decay > 0 else -math.inf)
    what = {
        "LIST": tuple(terms), "SENDS": tuple(term not in monitored for term in terms),
        "HAS_INFONCE": FUSED_TERMS.index("infonce") in terms, "WEIGHTING": weighting or None, "UPDATE": update,
        "ANCHOR": anchor,
    }  # fmt: skip
    half = p.dtype == t.dtype and p.dtype != torch.float32
    block = max(16, triton.next_power_of_2(size))
    tile = (_HALF if half else _SINGLE)[block]
    with torch.cuda.device_of(pred):
        launch(
            small_groups_kernel, groups, p, t, mask, ids, rows, attention, partial, *outputs, *numbers, size, dim,
            groups, update_every, *strides(p), *strides(t), *_strides(mask), *_strides(ids), **what,
            ATTENDS=attention.numel() > 0, BOTH=both, ONE_GROUP=groups == 1, BLOCK_M=block, BLOCK_D=tile.dims,
            warps=tile.warps, num_stages=tile.stages, registers=tile.registers,
        )  # fmt: skip
        if groups > 1:
            launch(
                finish_groups_kernel, 1, partial, *outputs, *numbers, dim, groups, update_every, **what,
                BLOCK=FINISH_BLOCKS, warps=4,
            )  # fmt: skip
    return results


def backward(
    grad_loss, weights, grad_values, pred, target, rows, attention, terms, monitored, temperature, both, negatives
):
    """The op `_small_groups_backward`."""
    p, t = _rows(pred, negatives), _rows(target, negatives)
    _, size, dim = p.shape
    grad = torch.empty_like(pred, memory_format=torch.contiguous_format)
    grouped = _grouped(grad, negatives, pred.dim() - 1)
    tile = row_tile(dim)
    count = rows.shape[1]
    places = {
        name.upper(): terms.index(i) if i in terms and i not in monitored else -1 for i, name in enumerate(FUSED_TERMS)
    }
    with torch.cuda.device_of(pred):
        launch(
            row_combine_kernel, triton.cdiv(count, tile.rows), grad_loss, weights, grad_values, p, t,
            attention if attention.numel() else None, None, rows, None, grad, temperature, count, size, dim,
            *strides(p), *strides(t), size * dim, dim, *strides(grouped), rows.stride(0), **places, BLOCK_M=tile.rows,
            BLOCK_D=tile.cols, warps=tile.warps,
        )  # fmt: skip
    return grad


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else x.stride()


def _forward_fake(
    pred, target, mask, ids, weights, mean, updates, calls, skipped, lambdas, most, terms, monitored, temperature, both,
    negatives, needs, weighting, *balance,
):  # fmt: skip
    return _results(pred, terms, monitored, both, needs, weighting)


def _backward_fake(grad_loss, weights, grad_values, pred, *rest):
    return pred.new_empty(pred.shape)


_LIBRARY.impl("_small_groups_forward", forward, "CompositeExplicitAutograd")
_LIBRARY.impl("_small_groups_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake("amn_kernels_triton::_small_groups_forward", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("amn_kernels_triton::_small_groups_backward", _backward_fake, lib=_LIBRARY)


class _SmallGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, target, mask, ids, weights, state, options, balance):
        loss, values, gram, metrics, balanced, rows, attention = torch.ops.amn_kernels_triton._small_groups_forward(
            pred, target, mask, ids, weights, *state, *_choices(options), True, *balance
        )
        ctx.options, ctx.has_weights = options, balance[0] != ""
        ctx.save_for_backward(pred, target, mask, ids, balanced if weights is None else weights, rows, attention)
        ctx.mark_non_differentiable(gram, metrics, balanced)
        ctx.set_materialize_grads(False)  # zeros for what has no gradient would be launches in vain
        return loss, values, gram, metrics, balanced

    @staticmethod
    def backward(ctx, grad_loss, grad_values, *_):
        pred, target, mask, ids, weights, rows, attention = ctx.saved_tensors
        if not ctx.has_weights:  # then it is nobody's loss, but torch.compile gives it a gradient of 0
            grad_loss = None
        if grad_loss is None and grad_values is None:
            return (None,) * 8
        incoming = (grad_loss, None if grad_loss is None else weights, grad_values)
        if torch.is_grad_enabled():  # a further derivative is wanted: the op that has one
            columns = attention[:0]
            (grad,) = torch.ops.amn_kernels_triton._seq_loss_backward(
                *incoming, pred, target, mask, ids, None, None, rows, attention, columns,
                *ops.choices_of(ctx.options), 1,
            )  # fmt: skip
        else:
            grad = torch.ops.amn_kernels_triton._small_groups_backward(
                *incoming, pred, target, rows, attention, *_choices(ctx.options)
            )
        return grad, *(None,) * 7


def _choices(options: LossOptions) -> tuple:
    return ops.choices_of(options)[:5]


def run(call: Call) -> Outcome:
    """Loss, outputs and weights of a call for which `why_unsupported` has no reason."""
    pred, options, weighting = call.pred, call.options, call.weighting
    state, balance, weights = (None,) * len(STATE), ("", 0, 0.0, 1, False), None
    if weighting is None:
        weights, balance = call.weights, ("fixed", *balance[1:])
    elif isinstance(weighting, BalancedWeighting):
        state = weighting.arguments(pred.device)[: len(STATE)]
        balance = (weighting.kind, weighting.anchor, weighting.decay, weighting.update_every, weighting.training)
    if torch.is_grad_enabled() and pred.requires_grad:
        loss, values, gram, metrics, balanced = _SmallGroups.apply(
            pred, call.target, call.mask, call.ids, weights, state, options, balance
        )
    else:
        loss, values, gram, metrics, balanced, *_ = torch.ops.amn_kernels_triton._small_groups_forward(
            pred, call.target, call.mask, call.ids, weights, *state, *_choices(options), False, *balance
        )
    outputs = TermOutputs(values, gram if gram.numel() else None, metrics)
    if balance[0] == "":  # a weighting that is not a kernel
        return weighted(call, outputs)
    return Outcome(loss, outputs, balanced if weights is None else weights)
