"""`NegativeQueue`: targets of earlier batches as further negatives."""

import torch
from torch import Tensor, nn

from amn_kernels.checks import FLOAT_DTYPES, check_device, check_float, check_rows
from amn_kernels.options import shown


class NegativeQueue(nn.Module):
    """A ring buffer of the last targets, whose rows serve as ``extra_negatives`` of the next batches.

    Sources: the queue of MoCo (He et al. 2020, arXiv:1911.05722) and the memory of XBM (Wang et al. 2020,
    arXiv:1912.06798). The rows are detached copies in the order they came, and are saved in the state_dict as one
    tensor; a queue of another size takes in the newest that fit. The place of the next row is a number on the host, so
    that nothing waits for the device. A CUDA graph would repeat one place, and a compiled step be compiled anew for
    each: push outside of them, and hand in what `negatives` returns.

    Over ranks, each has a queue of its own rows. They are no buffers, because DistributedDataParallel would overwrite
    those of the other ranks with those of the first; so save the state of every rank, or start with empty queues.

    >>> queue = NegativeQueue(4096, dim=768)
    >>> loss = criterion(pred, target, extra_negatives=queue.negatives())
    >>> queue.push(target)

    Args:
        size: Rows to keep.
        dim: D, their dimension.
        dtype: Of the rows.
    """

    rows: Tensor

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype = torch.float32):
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {shown(value)}")
        if not (isinstance(dtype, torch.dtype) and dtype in FLOAT_DTYPES):
            raise TypeError(f"dtype must be float32, float64, float16 or bfloat16, got {shown(dtype)}")
        self.rows = torch.zeros(size, dim, dtype=dtype)
        self._filled = 0
        self._next = 0

    def __len__(self) -> int:
        """Rows that are there."""
        return self._filled

    def negatives(self) -> Tensor | None:  # [K, D]
        """The rows that are there, the oldest first, as ``extra_negatives`` of the loss; None while there are none."""
        if not self._filled:
            return None
        oldest = self._next % self._filled  # 0 until the buffer is full
        return torch.cat([self.rows[oldest : self._filled], self.rows[:oldest]])

    @torch.no_grad()
    def push(self, targets: Tensor, mask: Tensor | None = None) -> None:
        """Take in new rows, which replace the oldest.

        Args:
            targets: [N, D] or [B, T, D]; of more rows than the queue holds, the last are kept.
            mask: [N] or [B, T] bool, the rows to take. Selecting them waits for the device.

        Raises:
            TypeError: targets is not a floating tensor, or mask not a bool one.
            ValueError: A shape or a device does not fit; the message names it.
        """
        size, dim = self.rows.shape
        check_float("targets", targets)
        if self.rows.is_meta and not self._filled:  # made without memory, and nobody gives some to what is no buffer
            with torch.inference_mode(False):  # to be written to in training as well
                self.rows = torch.zeros_like(self.rows, device=targets.device)
        check_device("targets", targets, self.rows.device, of="the queue")
        if targets.dim() not in (2, 3) or targets.shape[-1] != dim:
            raise ValueError(f"targets must be [N, {dim}] or [B, T, {dim}], got shape {list(targets.shape)}")
        if mask is not None:
            check_rows("mask", mask, targets, (torch.bool,), of="targets")
        new = targets.flatten(0, -2) if mask is None else targets[mask]
        new = new[-size:]
        first = min(len(new), size - self._next)  # up to the end of the buffer; the rest starts over
        self.rows[self._next : self._next + first] = new[:first]
        self.rows[: len(new) - first] = new[first:]
        self._next = (self._next + len(new)) % size
        self._filled = min(size, self._filled + len(new))

    def get_extra_state(self) -> Tensor:  # [K, D]
        """The rows that are there, the oldest first."""
        held = self.negatives()
        return self.rows[:0] if held is None else held

    def set_extra_state(self, state: Tensor) -> None:
        """Holds those rows, or the newest of them; ValueError if they are of another dimension."""
        if state.shape[1:] != self.rows.shape[1:]:
            raise ValueError(f"queue state must be [K, {self.rows.shape[1]}], got shape {list(state.shape)}")
        self._filled = self._next = 0
        self.push(state.to(self.rows.dtype) if self.rows.is_meta else state.to(self.rows))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.rows = fn(self.rows)
        return self

    def extra_repr(self) -> str:
        """Size and contents."""
        return f"size={len(self.rows)}, dim={self.rows.shape[1]}, filled={self._filled}"
