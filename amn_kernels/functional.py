"""`seq_loss`: the loss without state."""

import torch
from torch import Tensor, nn

from amn_kernels import backends
from amn_kernels.checks import check_inputs
from amn_kernels.options import LossOptions
from amn_kernels.reference.seq_loss import compute_dtype
from amn_kernels.stats import LossStats
from amn_kernels.weighting import make_weighting


def seq_loss(
    pred: Tensor,  # [N, D] or [B, T, D]
    target: Tensor,  # same shape
    *,
    mask: Tensor | None = None,  # [N] or [B, T] bool
    extra_negatives: Tensor | None = None,  # [K, D]
    ids: Tensor | None = None,  # [N] or [B, T] integers
    **options,
) -> tuple[Tensor, LossStats]:
    """The weighted sum of the terms that are on, and its diagnostics.

    On a CUDA device every call copies λ from the host, so it waits and can't be captured; `FusedSeqLoss` copies once.
    Where no gradient for pred is asked for, as under ``torch.no_grad()``, ``weighting="gradient"`` has nothing to
    measure and no state: the loss is the plain sum of λ · value.

    Args:
        pred: Predictions, [N, D] or [B, T, D]; float32, float64, float16 or bfloat16. May be strided.
        target: Targets of the same shape; the dtype may differ, each is read as it is.
        mask: True = the row counts. Other rows are neither queries nor keys and may hold NaN.
        extra_negatives: Keys that are nobody's positive (hard negatives, a queue); used by infonce.
        ids: Rows with one id are not each other's negatives, or positives with ``positives="ids"``; used by infonce.
        **options: The fields of `LossOptions`: term weights, temperature and so on. ``learnable_temperature`` and
            running weights are state: use `FusedSeqLoss` for them. Here ``weighting`` balances the current call alone;
            under ``torch.compile`` use ``"fixed"`` or the module.

    Returns:
        The loss, a 0-dim float32 tensor (float64 for float64 input), and the `LossStats` of the call. A zero vector
        (norm below 1e-8) has cosine 0 and gets no gradient from cosine and infonce. All rows masked: loss 0.

    Raises:
        TypeError: An argument is not a tensor of a supported dtype, or an option does not exist.
        ValueError: Shapes or devices differ, an option is out of its range, or a backend asked for by name can't
            serve the call. The message names the argument and what was got.
    """
    checked = LossOptions(**options)
    if checked.learnable_temperature:
        raise ValueError("learnable_temperature=True needs a place to keep the parameter: use FusedSeqLoss")
    backend = backends.requested(checked.backend)
    check_inputs(pred, target, checked, mask, extra_negatives, ids)
    weighting = make_weighting(checked)
    if weighting is not None:
        weighting.to(pred.device)
    loss, stats = evaluate(
        pred, target, checked, backend, weighting=weighting, mask=mask, extra_negatives=extra_negatives, ids=ids
    )
    return loss, stats


def evaluate(
    pred: Tensor,
    target: Tensor,
    options: LossOptions,
    backend: str | None,
    *,
    weights: Tensor | None = None,  # [m] the fixed weights in the dtype of the values, if they are at hand as a tensor
    weighting: nn.Module | None = None,
    told: set[str] | None = None,
    temperature: Tensor | None = None,  # []
    mask: Tensor | None = None,
    extra_negatives: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """`seq_loss` on checked options and input, with the state that `FusedSeqLoss` keeps: weighting and temperature."""
    if weights is None:
        weights = torch.tensor(options.lambdas, dtype=compute_dtype(pred, target), device=pred.device)
    call = backends.Call(pred, target, options, weights, weighting, temperature, mask, extra_negatives, ids)
    loss, (values, gram, metrics), weights = backends.choose(call, backend).run(call)
    stats = LossStats(options, values.detach(), weights, gram, metrics, set() if told is None else told)
    if gram is None and target.requires_grad and loss.requires_grad and not torch.compiler.is_compiling():
        stats.warn_of_no_balance(stacklevel=4 if told is None else 6)  # of a module torch has two frames in between
    return loss, stats
