"""The check of the compiled kernels: its arithmetic, and that it complains."""

import dataclasses
import importlib
import pkgutil

import pytest
import torch
from kernels_check import triton_kernels
from kernels_check.report import KernelReport, occupancy

import amn_kernels.triton
from bench.launches import compiling

GOOD = KernelReport("row_stats", "triton", 90, "bf16", 32, 0, 0, occupancy=1.0, min_occupancy=0.5)


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "wanted"),
    [
        (80, 128, 32, 0, 1.0),  # 16 blocks of 4 warps
        (80, 256, 255, 0, 8 / 64),  # one block: 8 warps of 8,192 registers are all of them
        (90, 128, 65, 0, 28 / 64),  # 72 registers a thread, 2,304 a warp: 7 warps in each quarter
        (90, 256, 64, 100 << 10, 16 / 64),  # two blocks by shared memory
        (100, 32, 32, 0, 32 / 64),  # the number of blocks is the limit
        (120, 128, 40, 0, 1.0),  # 48 warps are all
        (120, 128, 40, 60 << 10, 4 / 48),
        (80, 1024, 128, 0, 0.0),  # does not fit
    ],
)
def test_occupancy(arch, threads, registers, shared, wanted):
    # By hand from the limits of the architecture.
    assert occupancy(arch, threads, registers, shared) == pytest.approx(wanted)


def test_a_good_kernel_has_no_complaints():
    assert GOOD.complaints() == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 228 << 10}, "shared memory"),
        ({"occupancy": 0.49}, "occupancy 49%"),
        ({"failures": ("no 128-bit load",)}, "no 128-bit load"),
    ],
)
def test_complaints_name_the_kernel_and_what_is_wrong(change, word):
    (complaint,) = dataclasses.replace(GOOD, **change).complaints()
    assert complaint.startswith("triton row_stats, bf16, sm_90: ")
    assert word in complaint


needs_triton = pytest.mark.skipif(
    triton_kernels.why_unavailable() is not None, reason=f"{triton_kernels.why_unavailable()}"
)


@needs_triton
def test_the_steps_launch_every_kernel(monkeypatch):
    from triton.runtime.jit import JITFunction

    launched, defined = set(), set()
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: launched.add(self.fn.__name__))
    for step in triton_kernels.STEPS:
        triton_kernels.run_step(step, torch.bfloat16)
    for module in pkgutil.iter_modules(amn_kernels.triton.__path__):
        for name, x in vars(importlib.import_module(f"amn_kernels.triton.{module.name}")).items():
            if isinstance(x, JITFunction) and name.endswith("_kernel"):
                defined.add(name)
    assert launched == defined


@needs_triton
def test_a_tile_too_large_is_found(monkeypatch):
    from amn_kernels.triton import small_groups

    # 256 dimensions of 64 rows on 128 threads are 128 registers for each of pred and target.
    monkeypatch.setitem(small_groups._HALF, 64, small_groups.Tile(256, 4, 2))
    kernels = []
    with compiling(90, lambda launch: kernels.append(launch.kernel)):
        triton_kernels.run_step(triton_kernels.Step((64, 768), triton_kernels.ALL), torch.bfloat16)
    complaints = [triton_kernels.read(kernel, 90, "bf16").complaints() for kernel in kernels]
    assert "small_groups_kernel" in complaints[0][0]
    assert "spills" in complaints[0][0]
    assert complaints[1] == []
