"""The op over Triton kernels: the schemas, fakes and double backward of the compiled one, under Python's autograd.

To tracing it is opaque, so that `torch.compile(fullgraph=True)` and capture take it as one piece.
"""

import torch
from torch import Tensor

from amn_kernels import algorithm, ops
from amn_kernels.algorithm import Saved
from amn_kernels.infonce import Exchange
from amn_kernels.options import LossOptions, scratch_bytes
from amn_kernels.stats import TermOutputs
from amn_kernels.triton import primitives
from amn_kernels.triton.primitives import TritonPrimitives

_CHOICES = (
    "int[] terms, int[] monitored, float temperature, bool both, int negatives, bool positives_by_id,"
    " float false_negative_margin, float variance_target"
)
_LIBRARY = torch.library.Library("amn_kernels_triton", "DEF")
# As in csrc/ops.cpp.
_LIBRARY.define(
    "_seq_loss_forward(Tensor pred, Tensor target, Tensor? mask, Tensor? ids, Tensor? extra_negatives,"
    f" Tensor? learned_temperature, {_CHOICES}, int chunk_bytes, int needs)"
    " -> (Tensor values, Tensor gram, Tensor metrics, Tensor rows, Tensor attention, Tensor columns)"
)
_LIBRARY.define(
    "_seq_loss_backward(Tensor? grad_loss, Tensor? weights, Tensor? grad_values, Tensor pred, Tensor target,"
    " Tensor? mask, Tensor? ids, Tensor? extra_negatives, Tensor? learned_temperature, Tensor rows, Tensor attention,"
    f" Tensor columns, {_CHOICES}, int needs) -> Tensor[]"
)
_LIBRARY.define(
    "_balance(Tensor values, Tensor? gram, Tensor(a!) mean, Tensor(b!) updates, Tensor(c!) calls,"
    " Tensor(d!) skipped, Tensor lambdas, Tensor most, int anchor, float decay, int update_every, bool by_value,"
    " bool update) -> Tensor"
)
_PRIMITIVES = TritonPrimitives()
_NAMES = ("pred", "target", "extra_negatives", "temperature")  # in the order of enum Needs


def _names_of(needs: int) -> frozenset[str]:
    return frozenset(name for i, name in enumerate(_NAMES) if needs & (1 << i))


def _forward(pred, target, mask, ids, extra_negatives, temperature, *choices):
    *choices, needs = choices
    with torch.cuda.device_of(pred):
        values, gram, metrics, saved = algorithm.forward(
            _PRIMITIVES,
            Exchange(),
            ops.options_of(*choices),
            pred,
            target,
            temperature=temperature,
            mask=mask,
            extra_negatives=extra_negatives,
            ids=ids,
            needs=_names_of(needs),
        )
    return values, values.new_empty(0, 0) if gram is None else gram, metrics, *saved


def _backward(
    grad_loss, weights, grad_values, pred, target, mask, ids, extra_negatives, temperature, rows, attention, columns,
    *choices,
):  # fmt: skip
    *choices, needs = choices
    names = _names_of(needs)
    with torch.cuda.device_of(pred):
        gradients = algorithm.backward(
            _PRIMITIVES,
            ops.options_of(*choices),
            Saved(rows, attention, columns),
            ops.incoming(grad_loss, weights, grad_values),
            pred,
            target,
            temperature=temperature,
            extra_negatives=extra_negatives,
            needs=names,
        )
    return [gradients[name] for name in _NAMES if name in names]


# For whatever device the tensors are on: it is Triton that knows where its kernels run.
_LIBRARY.impl("_seq_loss_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("_seq_loss_backward", _backward, "CompositeExplicitAutograd")
_LIBRARY.impl("_balance", primitives.balance, "CompositeExplicitAutograd")
torch.library.register_fake("amn_kernels_triton::_balance", ops.balance_fake, lib=_LIBRARY)
torch.library.register_fake("amn_kernels_triton::_seq_loss_forward", ops.forward_fake, lib=_LIBRARY)
torch.library.register_fake("amn_kernels_triton::_seq_loss_backward", ops.backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "amn_kernels_triton::_seq_loss_backward",
    ops.double_backward,
    setup_context=ops.save_for_double_backward,
    lib=_LIBRARY,
)


class _SeqLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, target, extra_negatives, temperature, mask, ids, choices, chunk_bytes, needs):
        values, gram, metrics, *saved = torch.ops.amn_kernels_triton._seq_loss_forward(
            pred, target, mask, ids, extra_negatives, temperature, *choices, chunk_bytes, needs
        )
        ctx.choices, ctx.needs = choices, needs
        ctx.save_for_backward(pred, target, mask, ids, extra_negatives, temperature, *saved)
        ctx.mark_non_differentiable(gram, metrics)
        return values, gram, metrics

    @staticmethod
    def backward(ctx, grad_values, *_):
        gradients = iter(
            torch.ops.amn_kernels_triton._seq_loss_backward(
                None, None, grad_values, *ctx.saved_tensors, *ctx.choices, ctx.needs
            )
        )
        of_inputs = [next(gradients) if ctx.needs & (1 << i) else None for i in range(len(_NAMES))]
        return *of_inputs, None, None, None, None, None


def term_outputs(
    pred: Tensor,  # [N, D] or [B, T, D]
    target: Tensor,  # same shape
    options: LossOptions,
    *,
    temperature: Tensor | None = None,  # [], where it is learned
    mask: Tensor | None = None,  # [N] or [B, T] bool
    extra_negatives: Tensor | None = None,  # [K, D]
    ids: Tensor | None = None,  # [N] or [B, T]
) -> TermOutputs:
    """As `amn_kernels.reference.term_outputs`."""
    inputs = (pred, target, extra_negatives, temperature)
    needs = 0
    if torch.is_grad_enabled():
        needs = sum(1 << i for i, x in enumerate(inputs) if x is not None and x.requires_grad)
    choices = ops.choices_of(options)
    keys_learn = not _names_of(needs).isdisjoint(("target", "extra_negatives"))
    chunk_bytes = scratch_bytes(options, TritonPrimitives.chunk_bytes, keys_learn)
    if needs:
        values, gram, metrics = _SeqLoss.apply(*inputs, mask, ids, choices, chunk_bytes, needs)
    else:
        values, gram, metrics, *_ = torch.ops.amn_kernels_triton._seq_loss_forward(
            pred, target, mask, ids, extra_negatives, temperature, *choices, chunk_bytes, needs
        )
    return TermOutputs(values, gram if gram.numel() else None, metrics)


balance = torch.ops.amn_kernels_triton._balance
"""The twin of `amn_kernels.reference.balance.balance` in one launch, with its arguments."""
