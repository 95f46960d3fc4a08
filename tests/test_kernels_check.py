"""The check of the compiled kernels: its arithmetic, and that it complains."""

import dataclasses
import importlib
import pkgutil
import re

import pytest
import torch
from kernels_check import banks, cuda_kernels, triton_kernels
from kernels_check.banks import Banks
from kernels_check.pending import refills_while_read
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
        ({"occupancy": 0.49}, "occupancy 49.0%"),
        ({"failures": ("no 128-bit load",)}, "no 128-bit load"),
        ({"banks": Banks(2, 3, 4)}, "a bank conflict of 2 ways"),
        ({"banks": Banks(1, 0, 4)}, "none of 4 accesses"),
    ],
)
def test_complaints_name_the_kernel_and_what_is_wrong(change, word):
    (complaint,) = dataclasses.replace(GOOD, **change).complaints()
    assert complaint.startswith("triton row_stats, bf16, sm_90: ")
    assert word in complaint


needs_nvcc = pytest.mark.skipif(cuda_kernels.why_unavailable() is not None, reason=f"{cuda_kernels.why_unavailable()}")
needs_cuxray = pytest.mark.skipif(banks.why_unavailable() is not None, reason=f"{banks.why_unavailable()}")

STRIDED = """
namespace amn::cuda { namespace {
__global__ void __launch_bounds__(256) sum_rows_kernel(float* x) {
  __shared__ float tile[256 * STRIDE];
  tile[threadIdx.x * STRIDE] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = tile[(255 - threadIdx.x) * STRIDE];
}
}
void launch(float* x) { sum_rows_kernel<<<1, 256>>>(x); }
}
"""


@needs_nvcc
@needs_cuxray
@pytest.mark.parametrize(("stride", "ways"), [(1, 1), (32, 32)])
def test_bank_conflicts_are_found(tmp_path, stride, ways):
    source = tmp_path / "strided.cu"
    source.write_text(STRIDED.replace("STRIDE", str(stride)))
    of_arch = {report.arch: report for report in cuda_kernels.reports_of(source, tmp_path, reduced=True)}
    assert of_arch[90].banks == Banks(ways, 2, 2)
    assert [word in str(of_arch[90].complaints()) for word in ("32 ways", "occupancy")] == [ways == 32, False]


def test_every_cuda_kernel_has_a_block_and_a_floor():
    defined = set()
    for source in cuda_kernels.SOURCES.glob("*.cu"):
        defined |= set(re.findall(r"\b(\w+_kernel)\(", source.read_text()))
    assert defined == set(cuda_kernels.BLOCKS) == set(cuda_kernels.FLOORS)


@pytest.mark.parametrize("name", cuda_kernels.FLOORS)
def test_occupancy_below_the_floor_is_a_complaint(name):
    mangled = f"_ZN3amn4cuda12_GLOBAL__N_1{len(name)}{name}IfEEvPKT_"

    def complaints(registers, shared):
        numbers = {"registers": registers, "shared": shared, "stack": 0}
        return cuda_kernels._report(mangled, 90, numbers, {}, None).complaints()

    assert complaints(16, 0) == []
    # A single thread or warp is held up by shared memory sooner than by registers.
    assert "occupancy" in str(complaints(255, 64 << 10))


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
    monkeypatch.setitem(small_groups._HALF, 64, small_groups.Tile(256, 4, 1))
    kernels = []
    with compiling(90, lambda launch: kernels.append(launch.kernel)):
        triton_kernels.run_step(triton_kernels.Step((64, 768), triton_kernels.ALL), torch.bfloat16)
    complaints = [triton_kernels.read(kernel, 90, "bf16").complaints() for kernel in kernels]
    assert "small_groups_kernel" in complaints[0][0]
    assert "spills" in complaints[0][0]
    assert complaints[1] == []


@needs_triton
@pytest.mark.parametrize(("rows", "dims"), [(64, 64), (128, 32)])
def test_a_refill_under_a_pending_product_is_found(monkeypatch, rows, dims):
    from amn_kernels.triton import small_groups

    def complaints(stages):
        monkeypatch.setitem(small_groups._HALF, rows, small_groups.Tile(dims, 8, stages))
        kernels = []
        with compiling(90, lambda launch: kernels.append(launch.kernel)):
            triton_kernels.run_step(triton_kernels.Step((rows, 768), triton_kernels.ALL), torch.bfloat16)
        return triton_kernels.read(kernels[0], 90, "bf16").complaints()

    (complaint,) = complaints(2)
    assert "small_groups_kernel" in complaint
    assert "2 copies into shared memory that a wgmma may still be reading" in complaint
    assert complaints(1) == []


LOOP = """
    %a = ttg.local_alloc : () -> !ttg.memdesc<1x64x64xbf16, #shared>
    %slot = ttg.memdesc_index %a[%zero] : !ttg.memdesc<1x64x64xbf16, #shared> -> !ttg.memdesc<64x64xbf16, #shared>
    %sum = scf.for %i = %zero to %dim step %c64 iter_args(%acc = %none) -> (tensor<64x64xf32>) : i32 {
      COPY_FIRST
      %view = ttg.memdesc_trans %slot {order = array<i32: 1, 0>} : !ttg.memdesc<64x64xbf16> -> !ttg.memdesc<64x64xbf16>
      %dot = ttng.warp_group_dot %b, %view, %acc {isAsync = true} : !ttg.memdesc<64x64xbf16> -> tensor<64x64xf32>
      %done = ttng.warp_group_dot_wait %dot {pendings = 1 : i32} : tensor<64x64xf32>
      COPY_LAST
      scf.yield %done : tensor<64x64xf32>
    }
    %last = ttng.warp_group_dot_wait %sum {pendings = 0 : i32} : tensor<64x64xf32>
    COPY_AFTER
"""
COPY = "%token = ttg.async_copy_global_to_local %from, %slot mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>"


@pytest.mark.parametrize(
    ("place", "change", "found"),
    [
        ("COPY_LAST", ("", ""), 1),
        ("COPY_FIRST", ("", ""), 1),  # of the next iteration
        ("COPY_AFTER", ("", ""), 0),
        ("COPY_LAST", ("pendings = 1", "pendings = 0"), 0),
        ("COPY_LAST", (" {isAsync = true}", ""), 0),
        ("COPY_LAST", ("memdesc<1x64", "memdesc<2x64"), 0),  # nothing is known of these
        ("COPY_LAST", ("memdesc_trans %slot", "memdesc_trans %other"), 0),
    ],
)
def test_which_refills_are_found(place, change, found):
    code = LOOP.replace(place, COPY)
    assert change[0] in code
    assert refills_while_read(code.replace(*change) if change[0] else code) == found
