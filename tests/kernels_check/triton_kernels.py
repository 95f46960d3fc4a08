"""The Triton kernels, as the steps of a training launch them: compiled for each architecture, and read."""

import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from bench.launches import compiling

from .pending import refills_while_read
from .report import ARCHITECTURES, KernelReport, occupancy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REDUCED = ((80, "bf16"), (90, "bf16"), (100, "fp16"), (120, "fp32"))
"""Every architecture and every dtype, not every pair."""

FEW_WARPS = (
    "small_groups_kernel", "col_stats_kernel", "softmax_cols_kernel", "softmax_stats_kernel", "softmax_weights_kernel",
)  # fmt: skip
"""Kernels that live on registers: a tile of similarities, float64 sums a column, the softmax of the general form
with ids, guide and columns of every key. The others, all that a plain step launches, need occupancy."""
ROWS = ("pred", "logits")
"""Names of arguments whose rows must be loaded 128 bits at a time ..."""
NARROW = ("col_stats_kernel", "col_dots_kernel")
"""... but for these kernels, whose sums leave registers for half of that."""

PROCESSES = 2


class Step(NamedTuple):
    """A step of training that launches kernels; shapes are aligned, as those of models are."""

    shape: tuple[int, ...]
    options: dict
    inputs: tuple[str, ...] = ()
    """Of mask, ids, extra_negatives, temperature, target (that needs a gradient)."""


DIM = 768
ALL = {"mse": 1.0, "cosine": 1.0, "infonce": 1.0}
STEPS = (
    *(Step((rows, DIM), ALL) for rows in (16, 32, 64, 128)),
    Step((4, 64, DIM), {**ALL, "direction": "both", "negatives": "sequence"}, ("mask", "ids")),
    Step((256, DIM), {**ALL, "moment": 1.0, "variance": 1.0}, ("mask",)),
    Step(
        (256, DIM),
        {**ALL, "moment": 1.0, "direction": "both", "positives": "ids"},
        ("ids", "extra_negatives", "target"),
    ),
)
"""Together they launch every kernel; `test_kernels_check` counts them."""


def why_unavailable() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        import triton
    except ImportError as error:
        return f"Triton can't be imported ({error})"
    return None if os.path.exists(_tool("cuobjdump")) else f"Triton {triton.__version__} has no cuobjdump"


def reports(reduced: bool) -> list[KernelReport]:
    """One report per kernel, configuration, architecture and dtype; those that recur in several steps only once."""
    pairs = REDUCED if reduced else [(arch, dtype) for arch in ARCHITECTURES for dtype in DTYPES]
    with ProcessPoolExecutor(PROCESSES) as pool:
        found = [report for some in pool.map(_reports_of, *zip(*pairs, strict=True)) for report in some]
    return sorted(found, key=lambda report: (report.name, report.dtype, report.arch))


def _reports_of(arch: int, dtype: str) -> list[KernelReport]:
    torch.set_num_threads(1)
    kernels = {}
    with compiling(arch, lambda launch: kernels.setdefault(id(launch.kernel), launch.kernel)):
        for step in STEPS:
            run_step(step, DTYPES[dtype])
    return [read(kernel, arch, dtype) for kernel in kernels.values()]


def run_step(step: Step, dtype: torch.dtype) -> None:
    """Forward and backward of the balanced loss."""
    from amn_kernels.backends import BACKENDS, Call
    from amn_kernels.options import LossOptions
    from amn_kernels.triton import primitives
    from amn_kernels.triton.small_groups import STATE
    from amn_kernels.weighting import make_weighting

    pred, target = (torch.ones(step.shape, dtype=dtype).requires_grad_() for _ in range(2))
    target.requires_grad_("target" in step.inputs)
    given = {
        "mask": torch.ones(step.shape[:-1], dtype=torch.bool),
        "ids": torch.arange(pred.numel() // DIM).view(step.shape[:-1]),
        "extra_negatives": torch.ones(64, DIM, dtype=dtype),
    }
    given = {name: x for name, x in given.items() if name in step.inputs}
    options = LossOptions(**step.options)
    weighting = make_weighting(options)
    loss, outputs, _ = BACKENDS["triton"].run(Call(pred, target, options, None, weighting, **given))
    loss.backward()
    # For tensors on the CPU the weighting takes the compiled twin.
    state = weighting.arguments(pred.device)[: len(STATE)]
    primitives.balance(outputs.values.detach(), outputs.gram, *state, weighting.anchor, 0.99, 1, False, True)


def read(kernel, arch: int, dtype: str) -> KernelReport:
    """The report of a compiled kernel."""
    usage = _resource_usage(kernel.asm["cubin"])
    ptx, ttir, name = kernel.asm["ptx"], kernel.asm["ttir"], kernel.metadata.name
    failures, notes = [], [f"{kernel.metadata.num_warps} warps"]
    if "tt.dot" in ttir:
        used = re.findall(r"\b(wgmma|tcgen05\.mma|mma\.sync)", ptx)
        notes.append(used[0] if used else "FMA")
        if dtype != "fp32" and not used:
            failures.append("a product of low precision without tensor cores")
    if refills := refills_while_read(kernel.asm["ttgir"]):
        failures.append(f"{refills} copies into shared memory that a wgmma may still be reading")
    arguments = set(re.findall(r"%(\w+): !tt\.ptr", ttir))
    if arguments & set(ROWS) and name not in NARROW:
        wide = re.search(r"ld\.global[\w.:]*\.(v4\.b32|v2\.b64|v8\.b32|v4\.b64)|cp\.async\.cg\.[^;]*0x10", ptx)
        if not wide:
            failures.append("no 128-bit load")
        if narrow := len(re.findall(r"ld\.global[\w.:]*\.b16 ", ptx)):
            failures.append(f"{narrow} loads of single 16-bit elements")
    return KernelReport(
        name=name,
        backend="triton",
        arch=arch,
        dtype=dtype,
        registers=usage["REG"],
        shared_bytes=kernel.metadata.shared,
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        occupancy=occupancy(arch, kernel.metadata.num_warps * 32, usage["REG"], kernel.metadata.shared),
        notes=", ".join(notes),
        failures=tuple(failures),
        min_occupancy=0.0 if name in FEW_WARPS else 0.5,
    )


def _tool(name: str) -> str:
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory per thread, by cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed))
    return {name: int(found[name]) for name in ("REG", "STACK", "LOCAL")}
