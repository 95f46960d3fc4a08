"""Tensors that follow from the options of a module, on the device of the call.

As buffers they would be lost: what is not in a state_dict is left unset where a module is made on the meta device and
filled from a checkpoint (transformers does so), and `.half()` rounds it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Constants:
    """One tensor for each of `numbers`, which come with their dtype."""

    def __init__(self, *numbers: tuple[Sequence[float], torch.dtype]):
        self._numbers = numbers
        self._tensors = self._on(torch.device("cpu"))

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The tensors. What another device asks for replaces them, so that a next call finds them."""
        tensors = self._tensors
        if tensors[0].device != device:
            tensors = self._on(device)
            if not torch.compiler.is_compiling():  # a tensor of a graph must not outlive it
                self._tensors = tensors
        return tensors

    def follow(self, moved: Callable[[Tensor], Tensor]) -> None:
        """Go where a module goes, given what `torch.nn.Module._apply` does to its tensors."""
        self.on(moved(torch.empty(0, device=self._tensors[0].device)).device)

    # They outlive the call: made in inference mode, they could not be used in training.
    @torch.inference_mode(False)
    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        # There is no float64 on mps.
        widest = torch.float32 if device.type == "mps" else torch.float64
        return tuple(
            torch.tensor(values, dtype=widest if dtype is torch.float64 else dtype, device=device)
            for values, dtype in self._numbers
        )
