"""Small facts that a module keeps in its state_dict beside tensors, as a tensor themselves.

safetensors, and with it transformers, accelerate and the hub, saves nothing else.
"""

import json

import torch
from torch import Tensor


def pack(facts: dict) -> Tensor:  # [bytes] uint8
    """The facts as the bytes of their JSON, on the CPU whatever the default device is."""
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8, device="cpu")


def unpack(state: Tensor) -> dict:
    """Undo `pack`."""
    return json.loads(bytes(state.tolist()))
