"""Checks of the tensors given to the loss: an error names the argument and what was got, before any work is done."""

import torch
from torch import Tensor

from amn_kernels.options import LossOptions

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INT_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_inputs(
    pred: Tensor,  # [N, D] or [B, T, D]
    target: Tensor,  # same shape
    options: LossOptions,
    mask: Tensor | None = None,  # [N] or [B, T] bool
    extra_negatives: Tensor | None = None,  # [K, D]
    ids: Tensor | None = None,  # [N] or [B, T] integers
) -> None:
    """Raise TypeError or ValueError unless the arguments are what `functional.seq_loss` documents.

    Reads shapes, dtypes and devices only, never a value, so it costs no synchronisation, except with
    ``options.check_finite``.
    """
    check_float("pred", pred)
    check_float("target", target)
    if pred.dim() not in (2, 3):
        raise ValueError(f"pred must be [N, D] or [B, T, D], got shape {list(pred.shape)}")
    if target.shape != pred.shape:
        raise ValueError(f"target must have the shape of pred, {list(pred.shape)}, got {list(target.shape)}")
    if pred.numel() == 0:
        raise ValueError(f"pred must have at least one row and one dimension, got shape {list(pred.shape)}")
    check_device("target", target, pred.device)
    if pred.dim() == 2 and options.negatives != "all":
        raise ValueError(f"negatives={options.negatives!r} needs pred of shape [B, T, D], got {list(pred.shape)}")
    if mask is not None:
        check_rows("mask", mask, pred, (torch.bool,))
    if ids is not None:
        check_rows("ids", ids, pred, _INT_DTYPES)
    if extra_negatives is not None:
        check_float("extra_negatives", extra_negatives)
        if extra_negatives.dim() != 2 or extra_negatives.shape[-1] != pred.shape[-1]:
            raise ValueError(
                f"extra_negatives must be [K, {pred.shape[-1]}] like pred's last dimension, "
                f"got shape {list(extra_negatives.shape)}"
            )
        if extra_negatives.shape[0] == 0:
            raise ValueError(f"extra_negatives must have at least one row, got shape {list(extra_negatives.shape)}")
        check_device("extra_negatives", extra_negatives, pred.device)
    if "infonce" not in options.terms:
        for name, value in (("ids", ids), ("extra_negatives", extra_negatives)):
            if value is not None:
                raise ValueError(f"{name} is used by the infonce term only, and infonce is off (weight 0)")
    if options.positives == "ids" and ids is None:
        raise ValueError("positives='ids' needs ids, got None")
    if options.check_finite:
        _check_finite(pred, target, mask, extra_negatives)


def check_float(name: str, value: Tensor) -> None:
    """TypeError unless `value` is a dense tensor of a dtype that the loss reads."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {value.dtype}")
    _check_dense(name, value)


def check_device(name: str, value: Tensor, device: torch.device, of: str = "pred") -> None:
    """ValueError unless `value` is on that device, which is the one of what is called `of`."""
    if value.device != device:
        raise ValueError(f"{name} must be on the device of {of}, {device}, got {value.device}")


def check_rows(name: str, value: Tensor, rows: Tensor, dtypes: tuple[torch.dtype, ...], of: str = "pred") -> None:
    """TypeError or ValueError unless `value` has one number of such a dtype for each of the `rows`, called `of`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(
            f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {value.dtype}"
        )
    _check_dense(name, value)
    if value.shape != rows.shape[:-1]:
        raise ValueError(f"{name} must have the shape of {of}'s rows, {list(rows.shape[:-1])}, got {list(value.shape)}")
    check_device(name, value, rows.device, of)


def check_state(state: torch.device, pred: torch.device) -> None:
    """ValueError unless the state of a loss is on the device of pred."""
    if state != pred:
        raise ValueError(f"the loss is on {state}, pred on {pred}: move it with .to({str(pred)!r})")


def _check_dense(name: str, value: Tensor) -> None:
    # Sparse, nested or otherwise packed tensors can't be addressed row by row.
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")


def _check_finite(pred: Tensor, target: Tensor, mask: Tensor | None, extra_negatives: Tensor | None) -> None:
    for name, value in (("pred", pred), ("target", target), ("extra_negatives", extra_negatives)):
        if value is None:
            continue
        bad = ~torch.isfinite(value).all(dim=-1)
        if mask is not None and name != "extra_negatives":
            bad &= mask
        if bad.any():
            row = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name} has NaN or Inf in row {row if len(row) > 1 else row[0]} ({int(bad.sum())} such rows)"
            )
