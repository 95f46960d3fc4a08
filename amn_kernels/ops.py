"""The compiled ops: loading, shapes for tracing (fakes), and the double backward."""

import math

import torch
from torch import Tensor

from amn_kernels import reference
from amn_kernels.options import TERMS, LossOptions
from amn_kernels.reference.seq_loss import compute_dtype
from amn_kernels.stats import METRICS, TermOutputs

try:
    from amn_kernels import _C
except ImportError as error:
    _C = None
    _LOAD_ERROR = str(error)


def why_unavailable() -> str | None:
    """Why the compiled extension can't be used, or None if it can."""
    return None if _C is not None else f"the compiled extension did not load ({_LOAD_ERROR})"


def cpu_isa() -> str:
    """Instruction set of the CPU kernels on this machine: baseline, avx2 or avx512 (see AMN_CPU_ISA)."""
    return torch.ops.amn_kernels._cpu_isa()


_TERM_IDS = {term: index for index, term in enumerate(TERMS)}  # enum Term in csrc/primitives.h

FUSED_TERMS = frozenset(("mse", "cosine", "infonce"))
"""The terms that the compiled op computes."""


def seq_loss(
    pred: Tensor,  # [..., D]
    target: Tensor,  # [..., D]
    weights: Tensor,  # [m], in the dtype of the values
    terms: tuple[str, ...],
    monitor: tuple[str, ...],
    temperature: float,
    chunk_bytes: int,
) -> tuple[Tensor, TermOutputs]:
    """The fused op: weighted sum and outputs of the terms; serves mse, cosine and infonce without further options."""
    loss, values, gram, metrics = torch.ops.amn_kernels.seq_loss.default(
        pred,
        target,
        weights,
        [_TERM_IDS[term] for term in terms],
        [_TERM_IDS[term] for term in monitor],
        temperature,
        chunk_bytes,
    )
    return loss, TermOutputs(values, gram if gram.numel() else None, metrics)


def balance(
    values: Tensor, gram: Tensor | None, mean: Tensor, updates: Tensor, calls: Tensor, *constants_and_options
) -> Tensor:
    """The compiled twin of `amn_kernels.reference.balance.balance`, with its arguments."""
    observed = values.new_empty(0, 0) if gram is None else gram
    return torch.ops.amn_kernels._balance.default(values, observed, mean, updates, calls, *constants_and_options)


_ROW_SCALARS = 13  # kRowScalars in csrc/row_scalars.h


def _forward_fake(pred, target, terms, monitored, temperature, chunk_bytes, with_gradient):
    real = compute_dtype(pred, target)
    n, dim, m = math.prod(pred.shape[:-1]), pred.shape[-1], len(terms)
    attends = with_gradient and _TERM_IDS["infonce"] in terms and _TERM_IDS["infonce"] not in monitored
    return (
        pred.new_empty([m], dtype=real),
        pred.new_empty([m, m] if with_gradient else [0, 0], dtype=real),
        pred.new_empty([len(METRICS)], dtype=real),
        pred.new_empty([_ROW_SCALARS, n], dtype=torch.float64),
        pred.new_empty([n if attends else 0, dim], dtype=real),
    )


def _backward_fake(grad_values, pred, target, rows, attention, terms, monitored, temperature):
    return pred.new_empty(pred.shape)


def _balance_fake(values, *state_and_options):
    return torch.empty_like(values)


def _save_for_double_backward(ctx, inputs, output):
    grad_values, pred, target, _, _, ctx.terms, ctx.monitored, ctx.temperature = inputs
    ctx.save_for_backward(grad_values, pred, target)


def _double_backward(ctx, grad):
    """Gradient of the gradient, through the plain PyTorch definition; differentiable again."""
    names = list(_TERM_IDS)
    monitor = tuple(names[i] for i in ctx.monitored)
    options = LossOptions(
        **{name: float(i in ctx.terms and name not in monitor) for i, name in enumerate(names)},
        monitor=monitor,
        temperature=ctx.temperature,
    )
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Fresh leaves unless a further derivative is wanted: the graph of pred must not be walked here.
        inputs = [x if create_graph and x.requires_grad else x.detach().requires_grad_() for x in ctx.saved_tensors]
        grad_values, pred, target = inputs
        values = reference.term_outputs(pred, target, options).values
        (grad_pred,) = torch.autograd.grad(values, pred, grad_values, create_graph=True)
        gradients = torch.autograd.grad(grad_pred, inputs, grad, create_graph=create_graph, allow_unused=True)
    return *gradients, None, None, None, None, None


if _C is not None:
    torch.library.register_fake("amn_kernels::_seq_loss_forward", _forward_fake)
    torch.library.register_fake("amn_kernels::_seq_loss_backward", _backward_fake)
    torch.library.register_fake("amn_kernels::_balance", _balance_fake)
    torch.library.register_autograd(
        "amn_kernels::_seq_loss_backward", _double_backward, setup_context=_save_for_double_backward
    )
