"""The Triton backend: the primitives as Triton kernels, one file per concept, under `amn_kernels.algorithm`.

    backend.py      the op: autograd, and why it can't serve a call
    small_groups.py groups whose similarities fit one program, group_kernels.py its kernels
    primitives.py   tensors to launches: the protocol of `amn_kernels.primitives`
    launching.py    block sizes and warps, and how a kernel is launched
    scalars.py      numbers per row and the small formulas that kernels share
    *.py            the kernels themselves

Groups of at most 128 rows, 64 with ids or both directions, are small_groups.py: two launches a training step, three for
several groups. A step by chunks launches 5 kernels and one per chunk of rows and block of keys (softmax_rows), beside
the two matrix products of each: row_stats, row_dots, two for term_sums, row_combine. Positives by id and gradients for
keys take two per chunk and block (softmax_stats, softmax_weights), both directions three (softmax_cols as well) and
col_factors, terms of columns 4 more. Groups go together as far as they fit.

The modules that need Triton are imported when the backend is first used, so the package works without it.
"""

import functools
import importlib
from collections.abc import Callable

import torch


def _constant_in_graphs(question: Callable) -> Callable:
    """What `torch.compiler.assume_constant_result` does, without loading the compiler as that does."""
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


@functools.cache
def _searched() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton can't be imported ({error})"
    return None


@_constant_in_graphs  # a graph can't import
def _import_error() -> str | None:
    return _searched()


# ROCm builds of torch say CUDA too, but Triton takes other options of a launch there.
_IS_HIP = torch.version.hip is not None


def why_unavailable() -> str | None:
    """Why the kernels can't run in this installation, or None if they can."""
    if _IS_HIP:
        return "this torch is a HIP build, and the kernels are for CUDA devices"
    return _import_error() or (None if torch.cuda.is_available() else "there is no CUDA device")


@functools.cache
def _asked(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return None  # tracing on fake tensors needs no device
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"{device} has compute capability {major}.{minor}, and Triton's kernels need 8.0"


@_constant_in_graphs
def why_unsupported(device: torch.device) -> str | None:
    """Why the kernels can't run on this CUDA device, or None if they can."""
    return _asked(device)
