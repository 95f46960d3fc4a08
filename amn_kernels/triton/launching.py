"""Block sizes and warps of the kernels, and how they are launched.

One fixed choice per kind of kernel, by shape and never by trial: a first call compiles once and is as fast as the next.
The kernels are bound by memory, and the choices follow from that on every architecture from sm_80 on: enough bytes in
flight per thread, few enough registers for full occupancy. No GPU was at hand; what the compiler makes of them
(registers, spills, width of loads) is checked for each architecture, their speed is not measured.
"""

from typing import NamedTuple

import triton
from torch import Tensor


class Tile(NamedTuple):
    """Rows and columns that one program has in registers at a time, and its warps."""

    rows: int
    cols: int
    warps: int


def tile(cols: int, *, most_cols: int, elements: int, warps: int) -> Tile:
    """Whole rows where they fit, several of them where they are short."""
    width = min(most_cols, triton.next_power_of_2(cols))
    return Tile(max(1, elements // width), width, warps)


def row_tile(dim: int) -> Tile:
    """Of kernels along the D elements of a row.

    1,024 elements on 128 threads are 8 a thread and tensor, one 128-bit load in half precision and two in float32; with
    three tensors and four sums that is about 60 registers.
    """
    return tile(dim, most_cols=1024, elements=1024, warps=4)


def logits_tile(keys: int) -> Tile:
    """Of kernels along the K similarities of a row: one wide load a thread; more leave registers for few warps."""
    return tile(keys, most_cols=1024, elements=1024, warps=8)


COLUMN_TILE = Tile(rows=16, cols=64, warps=4)
"""Of kernels down the columns of similarities: 64 float32 columns are two 128-byte lines, 8 elements a thread."""

MOMENT_TILE = Tile(rows=16, cols=32, warps=4)
"""Of col_stats: 4 columns of 16 bits a thread, half a wide load. It keeps twelve float64 sums a column, which for 8
columns would be 192 registers."""

FLAT_TILE = Tile(rows=1, cols=128, warps=4)
"""Of kernels over numbers per row or per column: one a thread, as these are float64, and few beside the rows."""


def launch(
    kernel, programs: int, *arguments, warps: int, registers: int | None = None, contracts: bool = True, **constants
) -> None:
    """Launch over a one-dimensional grid.

    registers: most of a thread; None: the assembler chooses.
    contracts: whether a product and a sum become one multiply-add, which rounds once less.
    """
    if registers is not None:
        constants["maxnreg"] = registers
    kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=contracts, **constants)


def strides(x: Tensor) -> tuple[int, int]:
    """From group to group and from row to row of [G, M, D] or [M, D]."""
    return (x.stride(0) if x.dim() == 3 else 0), x.stride(-2)
