"""What a training step on a GPU must not do, and a CUDA graph can't hold."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostReads(TorchDispatchMode):
    """Raises on what makes the host wait for a device: reading a number, and shapes that depend on data."""

    FORBIDDEN = frozenset({torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default})

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function not in self.FORBIDDEN, f"{function} waits for the device"
        return function(*arguments, **(options or {}))
