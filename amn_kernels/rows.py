"""The rows of a batch by group of mutual negatives, and the chunks in which the algorithm goes through them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from amn_kernels.options import LossOptions
from amn_kernels.reference.seq_loss import to_groups

CHUNK_ROWS = 1024


@dataclass
class Rows:
    """Rows [N, D] or [B, T, D] by group, with unit stride along D, masked ones zeroed."""

    x: Tensor
    options: LossOptions
    dtype: torch.dtype | None = None
    """What rows are read in; None for their own."""
    mask: Tensor | None = None
    grouped: Tensor = field(init=False)  # [G, M, D]

    def __post_init__(self):
        x = to_groups(self.x.detach(), self.options.negatives, self.x.dim() - 1)
        if self.mask is not None:  # masked rows may hold NaN, and 0 * NaN poisons a matrix product
            mask = to_groups(self.mask, self.options.negatives, self.x.dim() - 1)
            x = x.to(self.dtype or x.dtype).masked_fill(~mask.unsqueeze(-1), 0)
        self.grouped = x

    @property
    def direct(self) -> bool:
        """Whether chunks are views."""
        return self.dtype in (None, self.grouped.dtype) and self.grouped.stride(-1) == 1

    def of(self, chunk: "Chunk") -> Tensor:  # [G, M, D]
        """The rows of a chunk."""
        rows = self.grouped[chunk.groups, chunk.begin : chunk.end]
        rows = rows if self.dtype is None else rows.to(self.dtype)
        return rows if rows.stride(-1) == 1 else rows.contiguous()


class Chunk(NamedTuple):
    """Rows [begin, end) of some groups; several groups are always whole. `numbers` are theirs among all rows."""

    groups: slice
    begin: int
    end: int
    numbers: slice

    def view(self, x: Tensor) -> Tensor:  # [N, ...] -> [G, M, ...], numbered group after group
        """The chunk's part of what is numbered group after group."""
        return x[self.numbers].view(-1, self.end - self.begin, *x.shape[1:])


def chunks_of(groups: int, size: int, rows: int) -> Iterator[Chunk]:
    """Chunks of at most so many rows, at least one; several groups at a time where they fit."""
    together = min(groups, max(1, rows // size))
    step = size if together > 1 else min(rows, size)
    for first in range(0, groups, together):
        last = min(groups, first + together)
        for begin in range(0, size, step):
            end = min(size, begin + step)
            yield Chunk(slice(first, last), begin, end, slice(first * size + begin, (last - 1) * size + end))
