"""Nothing on the way through the Triton primitives waits for the device: the algorithm runs on tensors without data.

Kernels are not launched, their names are counted. On a device without memory a read, a data-dependent shape and a copy
from or to the host are errors, or are made to be.
"""

import sys

import pytest
import torch
from combinations import CHOICES, inputs_of, label, options_of, sample
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amn_kernels import algorithm
from amn_kernels.infonce import Exchange
from amn_kernels.options import TERMS, LossOptions
from amn_kernels.rows import CHUNK_ROWS

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("ttsem.harness" in sys.modules, reason="under ttsem all tensors have data")


class OnDeviceOnly(TorchDispatchMode):
    """Raises where an op touches the host, or where the host would have to know what the device computed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"):
            raise AssertionError(f"{name} waits for the device")
        if name in ("index", "index_put", "index_put_"):
            raise AssertionError(f"{name} may wait for the device, or copies its indices to it")
        if func is torch.ops.aten.baddbmm.dtype_out:  # without an implementation for tensors without data
            return kwargs["out"]
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, torch.Tensor) and not x.is_meta:
                raise AssertionError(f"{name} with a tensor of the host")
        return result


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched, in order."""
    from amn_kernels.triton import primitives

    names = []
    monkeypatch.setattr(primitives, "launch", lambda kernel, *_, **__: names.append(kernel.fn.__name__))
    return names


def step(options, inputs, needs):
    from amn_kernels.triton.primitives import TritonPrimitives

    prim = TritonPrimitives()
    with OnDeviceOnly():
        values, _, _, saved = algorithm.forward(prim, Exchange(), options, **inputs, needs=needs)
        inputs = {name: x for name, x in inputs.items() if name not in ("mask", "ids")}
        return algorithm.backward(prim, options, saved, values, **inputs, needs=needs)


@pytest.mark.parametrize(
    "case",
    sample(60, {**CHOICES, "dtype": (torch.float32, torch.bfloat16, torch.float16)}, candidates=100),
    ids=label,
)
def test_every_option(case, launched):
    options = {name: float(x > 0) if name in TERMS else x for name, x in options_of(case).items()}
    options = LossOptions(**options, chunk_bytes=case["chunk_bytes"])
    pred, target, tensors = inputs_of(case, "cpu")
    inputs = {"pred": pred, "target": target, **tensors, "temperature": torch.ones(())}
    inputs = {name: torch.empty_like(x, device="meta") for name, x in inputs.items()}
    names = {"extra": "extra_negatives"}
    needs = frozenset(names.get(name, name) for name in case["gradients"].split()) & inputs.keys()
    gradients = step(options, inputs, needs)
    assert {name: x.shape for name, x in gradients.items()} == {name: inputs[name].shape for name in needs}
    assert launched[0] == "row_stats_kernel"


def rows(n, dim=64):
    return torch.empty(n, dim, dtype=torch.bfloat16, device="meta")


def test_launches_of_a_training_step(launched):
    """Documented in amn_kernels/triton/__init__.py."""
    options = LossOptions(mse=1.0, cosine=1.0, infonce=1.0)
    inputs = {"pred": rows(8192), "target": rows(8192)}
    step(options, inputs, frozenset(["pred"]))
    chunks = 8192 // CHUNK_ROWS
    assert launched == [
        "row_stats_kernel",
        *["softmax_rows_kernel"] * chunks,
        "row_dots_kernel",
        "sum_rows_kernel",
        "finish_sums_kernel",
        "row_combine_kernel",
    ]


def test_launches_of_both_directions(launched):
    options = LossOptions(mse=1.0, infonce=1.0, direction="both", chunk_bytes=1 << 20)
    inputs = {"pred": rows(8192), "target": rows(8192)}
    step(options, inputs, frozenset(["pred"]))
    chunks, keys = 8192 // CHUNK_ROWS, (1 << 20) // 4 // CHUNK_ROWS
    assert launched == [
        "row_stats_kernel",
        *["softmax_stats_kernel", "softmax_cols_kernel"] * (chunks * 8192 // keys),
        "col_factors_kernel",
        *["softmax_weights_kernel"] * (chunks * 8192 // keys),
        "row_dots_kernel",
        "sum_rows_kernel",
        "finish_sums_kernel",
        "row_combine_kernel",
    ]


def test_groups_go_together(launched):
    """64 groups of 256 rows are no more launches than one."""
    options = LossOptions(mse=1.0, infonce=1.0, negatives="step")
    inputs = {name: torch.empty(256, 64, 32, device="meta") for name in ("pred", "target")}
    step(options, inputs, frozenset(["pred"]))
    assert launched.count("softmax_rows_kernel") == 1


@pytest.mark.parametrize(
    "what",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0, 2.0]).to(x.device),
        lambda x: x.cpu(),
        lambda x: bool((x > 0).any()),
        lambda x: x[[0, 1]],
    ],
    ids=["item", "boolean index", "from the host", "to the host", "bool", "list index"],
)
def test_it_notices(what):
    x = torch.empty(3, 4, device="meta")
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), OnDeviceOnly():
        what(x)
