"""The kernels as one more backend, "simt", for tests that run over backends: CPU tensors, orchestrated in Python."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from combinations import Tolerances, check

from amn_kernels import distributed
from amn_kernels.backends import BACKENDS, Backend, Call, Outcome, weighted
from amn_kernels.infonce import Exchange
from amn_kernels.stats import TermOutputs

from .primitives import SimtPrimitives
from .trace import Library


@contextlib.contextmanager
def simt_backend(library: Library) -> Iterator[None]:
    """While this is open there is a backend named "simt"."""
    primitives = SimtPrimitives(library)

    def run(call: Call) -> Outcome:
        # The op over ranks, of which there is one: it takes any primitives.
        given = {name: getattr(call, name) for name in ("pred", "target", "extra_negatives", "temperature")}
        needs = {name for name, x in given.items() if x is not None and x.requires_grad and torch.is_grad_enabled()}
        with mock.patch.object(distributed, "_primitives", return_value=primitives):
            values, gram, metrics = distributed._SeqLoss.apply(
                Exchange(), call.options, frozenset(needs), call.mask, call.ids, *given.values()
            )
        return weighted(call, TermOutputs(values, gram if gram.numel() else None, metrics))

    backend = Backend("simt", "CUDA kernels on the CPU", lambda: None, lambda call: None, run)
    with mock.patch.dict(BACKENDS, simt=backend):
        yield


# Softmax weights of bfloat16 keys are rounded to 8 bits, as on the device.
_BFLOAT16 = Tolerances(3e-6, 4e-3, 4e-3)


def check_simt(case: dict) -> None:
    """A combination of options on the kernels against the plain definition in float64; inside `simt_backend`."""
    check(case, "simt", tolerances=_BFLOAT16 if case["dtype"] == torch.bfloat16 else None)
