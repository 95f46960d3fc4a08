"""The compiled ops: loading, shapes for tracing (fakes), and the double backward."""

import importlib.util
import math
from pathlib import Path

import torch
from torch import Tensor

from amn_kernels import reference
from amn_kernels.options import DEFAULT_CHUNK_BYTES, FUSED_TERMS, LossOptions, scratch_bytes
from amn_kernels.primitives import COLUMNS, PLAIN_ROWS, Row
from amn_kernels.reference.seq_loss import compute_dtype, without_autocast
from amn_kernels.stats import METRICS, TermOutputs


def _check_build() -> None:
    """Raises ImportError where there is no compiled extension, or one for another torch.

    PyTorch's C++ interface changes from one minor version to the next, and loading what does not fit may crash.
    """
    if importlib.util.find_spec("amn_kernels._C") is None:
        raise ImportError("the package was installed without compiled code, AMN_EXT=0")
    built_for, here = _built()[0], ".".join(torch.__version__.split(".")[:2])
    if built_for not in ("", here):
        raise ImportError(f"compiled for torch {built_for}, this is torch {here}: install the package anew")


def _built() -> tuple[str, str]:
    """What setup.py wrote beside the extension: the torch it is for, as "2.13", and why it has no CUDA kernels."""
    path = Path(__file__).with_name("_C.torch")
    torch_version, _, without_cuda = path.read_text().partition("\n") if path.exists() else ("", "", "")
    return torch_version, without_cuda


try:
    _check_build()
    from amn_kernels import _C
except ImportError as error:
    _C = None
    _LOAD_ERROR = str(error)

# Asked here, as torch.compile can't trace the questions.
_WITHOUT_CUDA = _built()[1]
_HAS_CUDA = bool(_C) and torch._C._dispatch_has_kernel_for_dispatch_key("amn_kernels::_seq_loss_forward", "CUDA")


def why_unavailable() -> str | None:
    """Why the compiled extension can't be used, or None if it can."""
    return None if _C is not None else f"the compiled extension did not load ({_LOAD_ERROR})"


def has_cuda() -> bool:
    """Whether the extension was compiled with CUDA kernels; there need not be a device."""
    return _HAS_CUDA


def why_no_cuda() -> str | None:
    """Why the compiled CUDA kernels can't be used, or None if they can."""
    if reason := why_unavailable():
        return reason
    if not has_cuda():
        return f"the extension was built without CUDA sources ({_WITHOUT_CUDA or 'AMN_CUDA=1 says why'})"
    if not torch.cuda.is_available():
        return "there is no CUDA device, or its driver does not load"
    return None


def cpu_isa() -> str:
    """Instruction set of the CPU kernels on this machine: baseline, avx2 or avx512 (see AMN_CPU_ISA)."""
    return torch.ops.amn_kernels._cpu_isa()


_TERM_IDS = {term: index for index, term in enumerate(FUSED_TERMS)}
NEGATIVES = {"all": 0, "step": 1, "sequence": 2}  # enum Negatives in csrc/seq_loss.h, as the next
_NEEDS_PRED, _NEEDS_TARGET, _NEEDS_EXTRA, _NEEDS_TEMPERATURE = 1, 2, 4, 8  # enum Needs


def seq_loss(
    pred: Tensor,  # [N, D] or [B, T, D]
    target: Tensor,  # same shape
    options: LossOptions,
    weights: Tensor,  # [m], in the dtype of the values
    temperature: Tensor | None = None,  # [], where it is learned
    mask: Tensor | None = None,  # [N] or [B, T] bool
    extra_negatives: Tensor | None = None,  # [K, D]
    ids: Tensor | None = None,  # [N] or [B, T]
) -> tuple[Tensor, TermOutputs]:
    """The fused op: weighted sum and outputs of the terms."""
    loss, values, gram, metrics = torch.ops.amn_kernels.seq_loss_fixed.default(
        pred,
        target,
        weights,
        mask,
        ids,
        extra_negatives,
        temperature,
        *choices_of(options),
        _chunk_bytes(pred, target, extra_negatives, options),
    )
    return loss, TermOutputs(values, gram if gram.numel() else None, metrics)


def seq_loss_balanced(
    pred: Tensor,  # [N, D] or [B, T, D]
    target: Tensor,  # same shape
    options: LossOptions,
    state_and_options: tuple,
    temperature: Tensor | None = None,  # [], where it is learned
    mask: Tensor | None = None,  # [N] or [B, T] bool
    extra_negatives: Tensor | None = None,  # [K, D]
    ids: Tensor | None = None,  # [N] or [B, T]
) -> tuple[Tensor, TermOutputs, Tensor]:
    """The fused op with balanced weights: weighted sum, outputs of the terms, weights [m].

    `state_and_options` are the arguments of `amn_kernels.reference.balance.balance` from ``mean`` on.
    """
    loss, values, gram, metrics, weights = torch.ops.amn_kernels.seq_loss_balanced.default(
        pred,
        target,
        *state_and_options,
        mask,
        ids,
        extra_negatives,
        temperature,
        *choices_of(options),
        _chunk_bytes(pred, target, extra_negatives, options),
    )
    return loss, TermOutputs(values, gram if gram.numel() else None, metrics), weights


def _chunk_bytes(pred: Tensor, target: Tensor, extra_negatives: Tensor | None, options: LossOptions) -> int:
    keys_learn = target.requires_grad or (extra_negatives is not None and extra_negatives.requires_grad)
    defaults = DEFAULT_CHUNK_BYTES["cuda" if pred.is_cuda else "cpu"]
    return scratch_bytes(options, defaults, keys_learn and torch.is_grad_enabled())


def choices_of(options: LossOptions) -> tuple:
    """The options as the ops take them, from `terms` to `variance_target`."""
    return (
        [_TERM_IDS[term] for term in options.terms],
        [_TERM_IDS[term] for term in options.monitor],
        options.temperature,
        options.direction == "both",
        NEGATIVES[options.negatives],
        options.positives == "ids",
        -1.0 if options.false_negative_margin is None else options.false_negative_margin,
        -1.0 if options.variance_target is None else options.variance_target,
    )


def options_of(
    terms, monitored, temperature, both, negatives, positives_by_id, margin, variance_target, chunk_bytes=None
) -> LossOptions:
    """Undo `choices_of`; every λ is 1."""
    names = list(_TERM_IDS)
    monitor = tuple(names[i] for i in monitored)
    return LossOptions(
        **{name: float(i in terms and name not in monitor) for i, name in enumerate(names)},
        monitor=monitor,
        temperature=temperature,
        direction="both" if both else "pred_to_target",
        negatives=list(NEGATIVES)[negatives],
        positives="ids" if positives_by_id else "diagonal",
        false_negative_margin=None if margin < 0 else margin,
        variance_target=None if variance_target < 0 else variance_target,
        chunk_bytes=chunk_bytes,
    )


def balance(
    values: Tensor, gram: Tensor | None, mean: Tensor, updates: Tensor, calls: Tensor, *constants_and_options
) -> Tensor:
    """The compiled twin of `amn_kernels.reference.balance.balance`, with its arguments."""
    observed = values.new_empty(0, 0) if gram is None else gram
    return torch.ops.amn_kernels._balance.default(values, observed, mean, updates, calls, *constants_and_options)[0]


def forward_fake(
    pred, target, mask, ids, extra_negatives, learned_temperature, terms, monitored, temperature, both, negatives,
    positives_by_id, false_negative_margin, variance_target, chunk_bytes, needs,
):  # fmt: skip
    """Empty results of a `_seq_loss_forward`, of whichever library."""
    real = compute_dtype(pred, target)
    n, dim, m = math.prod(pred.shape[:-1]), pred.shape[-1], len(terms)
    attends = needs != 0 and _TERM_IDS["infonce"] in terms and _TERM_IDS["infonce"] not in monitored
    attending = n if needs & (_NEEDS_PRED | _NEEDS_TEMPERATURE) else 0
    keys = n if needs & _NEEDS_TARGET else 0
    extra = extra_negatives.shape[0] if attends and needs & _NEEDS_EXTRA else 0
    gram = m if needs & _NEEDS_PRED else 0
    columns = COLUMNS if _TERM_IDS["moment"] in terms or _TERM_IDS["variance"] in terms else 0
    scalars = len(Row) if both or positives_by_id or columns or keys else PLAIN_ROWS
    return (
        pred.new_empty([m], dtype=real),
        pred.new_empty([gram, gram], dtype=real),
        pred.new_empty([len(METRICS)], dtype=real),
        pred.new_empty([scalars, n + keys + extra], dtype=torch.float64),
        pred.new_empty([attending + keys + extra if attends else 0, dim], dtype=real),
        pred.new_empty([columns, dim], dtype=real),
    )


def backward_fake(
    grad_loss, weights, grad_values, pred, target, mask, ids, extra_negatives, learned_temperature, *rest
):  # fmt: skip
    """Empty results of a `_seq_loss_backward`."""
    differentiable = _differentiable(pred, target, extra_negatives, learned_temperature, rest[-1])
    return [x.new_empty(x.shape) for x in differentiable]


def _differentiable(pred, target, extra_negatives, learned_temperature, needs) -> list[Tensor]:
    """The tensors that need a gradient, in the order of the op's results."""
    candidates = (pred, target, extra_negatives, learned_temperature)
    return [x for i, x in enumerate(candidates) if needs & (1 << i)]


def balance_fake(values, *state_and_options):
    """Empty weights."""
    return torch.empty_like(values)


def incoming(grad_loss: Tensor | None, weights: Tensor | None, grad_values: Tensor | None) -> Tensor:  # [], [m], [m]
    """What arrives at the values [m] from a loss with these weights, and from themselves."""
    if grad_loss is None:
        return grad_values
    of_loss = grad_loss * weights
    return of_loss if grad_values is None else of_loss + grad_values


def save_for_double_backward(ctx, inputs, output):
    """What `double_backward` needs of a call of a `_seq_loss_backward`."""
    ctx.save_for_backward(*inputs[:9])
    ctx.choices = list(inputs[12:])  # rows, attention and columns, between these, follow from the others


def double_backward(ctx, grads):
    """Gradient of the gradients, through the plain PyTorch definition; differentiable again."""
    grad_loss, weights, grad_values, pred, target, mask, ids, extra_negatives, learned_temperature = ctx.saved_tensors
    given = (incoming(grad_loss, weights, grad_values), pred, target, extra_negatives, learned_temperature)
    arrived, of_pred, of_target, of_extra, of_temperature = _second_derivatives(*given, mask, ids, ctx.choices, grads)
    of_loss = None if grad_loss is None or arrived is None else torch.dot(arrived, weights)
    of_values = None if grad_values is None else arrived
    # PyTorch takes an empty list among the arguments for one of tensors, and wants one back.
    of_choices = [[] if choice == [] else None for choice in ctx.choices]
    return (
        of_loss, None, of_values, of_pred, of_target, None, None, of_extra, of_temperature, None, None, None,
        *of_choices,
    )  # fmt: skip


# Off for the products of the inner backwards as well.
@without_autocast
def _second_derivatives(
    grad_values, pred, target, extra_negatives, learned_temperature, mask, ids, choices, grads
):  # fmt: skip
    """What `grads` of the gradients send to the first five arguments."""
    *choices, needs = choices
    options = options_of(*choices)
    create_graph = torch.is_grad_enabled()

    # Without the graph that it comes from; where a further derivative is wanted, an alias at its end. Arguments may be
    # made of one another, and grad_values of the loss: these paths are walked by the caller, not here.
    def alone(x):
        return x.view_as(x) if create_graph and x.requires_grad else x.detach().requires_grad_()

    with torch.enable_grad():
        given = (grad_values, pred, target, extra_negatives, learned_temperature)
        leaves = [None if x is None else alone(x) for x in given]
        grad_values, pred, target, extra_negatives, learned_temperature = leaves
        values = reference.term_outputs(
            pred,
            target,
            options,
            temperature=learned_temperature,
            mask=mask,
            extra_negatives=extra_negatives,
            ids=ids,
        ).values
        wanted = _differentiable(pred, target, extra_negatives, learned_temperature, needs)
        first = torch.autograd.grad(values, wanted, grad_values, create_graph=True, allow_unused=True)
        pairs = [(f, g) for f, g in zip(first, grads, strict=True) if f is not None and g is not None]
        second = dict.fromkeys(range(len(leaves)))
        differentiable = [i for i, leaf in enumerate(leaves) if leaf is not None]
        if pairs:
            gradients = torch.autograd.grad(
                [f for f, _ in pairs],
                [leaves[i] for i in differentiable],
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
            second.update(zip(differentiable, gradients, strict=True))
    return list(second.values())


def _forward_fake(pred, target, weights, *rest):
    outputs = forward_fake(pred, target, *rest)
    return outputs[0].new_empty([0] if weights is None else []), *outputs


def _balance_fake(values, *rest):
    return balance_fake(values, *rest), values.new_empty([])


if _C is not None:
    torch.library.register_fake("amn_kernels::_seq_loss_forward", _forward_fake)
    torch.library.register_fake("amn_kernels::_seq_loss_backward", backward_fake)
    torch.library.register_fake("amn_kernels::_balance", _balance_fake)
    torch.library.register_autograd(
        "amn_kernels::_seq_loss_backward", double_backward, setup_context=save_for_double_backward
    )
