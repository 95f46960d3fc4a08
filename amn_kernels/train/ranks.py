"""The processes of one training, as torchrun starts them."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


@dataclass
class Ranks:
    """The processes of one training, as torchrun starts them; one alone otherwise."""

    rank: int = 0
    size: int = 1

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Their group, for the loss."""
        return dist.group.WORLD if self.size > 1 else None

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This process's part of a batch."""
        return np.array_split(rows, self.size)[self.rank]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is up in any process."""
        if self.size == 1:
            return flag
        highest = torch.tensor(float(flag), device=device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return bool(highest)

    def gather(self, x: Any) -> list:
        """What every process has, in order; anything that can be pickled."""
        if self.size == 1:
            return [x]
        parts: list = [None] * self.size
        dist.all_gather_object(parts, x)
        return parts


def own_device(device: torch.device) -> torch.device:
    """The device of this process: of several that torchrun started each has a GPU of its own for "cuda".

    ValueError for a GPU by number, which all of them would share.
    """
    if device.type != "cuda" or not _to_be_connected():
        return device
    if device.index is not None:
        raise ValueError(f"device must be cuda for several processes, each has a GPU of its own, got {device}")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextlib.contextmanager
def connected_ranks(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started, connected while the block runs; `device` as `own_device` gives it."""
    if not _to_be_connected():
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
        # Time for the group's threads to drop the tensors of earlier collectives: DistributedDataParallel keeps them
        # alive, and one that drops a tensor while the interpreter shuts down ends the process with an abort.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _to_be_connected() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
