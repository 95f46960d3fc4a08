"""The bytes that the CUDA kernels load and store, counted as they run on the CPU (tests/simt).

Of a matrix every access of every thread counts: no cache is assumed, so a second pass over a row counts twice. What is
small beside it and shared by many threads, row scalars, vectors and ids, counts once a launch.
"""

from collections import Counter

import torch

from bench.cost import Work
from tests.simt.every_kernel import Sizes, run_every_kernel
from tests.simt.observe import CountingLibrary, Launch, Traffic
from tests.simt.primitives import SimtPrimitives, is_matrix

SIZES = Sizes(rows=256, dim=768, keys=768, columns=768, sums=4096)
GOAL = 1.05
"""Bytes over the minimum ..."""
ABOVE_GOAL = {
    # 20 row scalars of 8 bytes against two rows of 768 numbers of 16 bits.
    ("row_stats, all options", "bf16"): 1.06,
    # Three scalars a column, read and written, and ids: 56 bytes against 256 logits.
    ("softmax_cols", "fp32"): 1.06,
    ("softmax_cols", "bf16"): 1.06,
    # Every 64 rows leave 12 numbers a column: a call of few rows is spread over the card so. That is 9% of rows of
    # float32; beyond 16,384 rows there are no more parts, and the share falls.
    ("col_parts", "fp32"): 1.10,
    ("col_parts", "bf16"): 1.20,
    # v needs a sum over its whole row first: pred is read again, from cache, as the block has just read it.
    ("col_dots", "fp32"): 1.35,
    ("col_dots", "bf16"): 1.28,
}
"""... which these kernels do not reach, what they do, and why."""
_AGAIN = {
    "row_stats": "row_stats, all options",
    "softmax_rows": "softmax_rows, ids",
    "sum_rows": "sum_rows, several blocks",
    "row_combine": "row_combine, columns",
}
"""Names of what `run_every_kernel` launches for a second time."""


def counted(dtype: torch.dtype, sizes: Sizes = SIZES) -> list[Work]:
    """Every kernel; pred, target and the weights of the softmax have this dtype."""
    library = CountingLibrary()
    run_every_kernel(SimtPrimitives(library), sizes, dtype)
    seen: Counter[str] = Counter()
    work = []
    for launch, traffic in zip(library.launches, library.traffic, strict=True):
        name = launch.kernel.removesuffix("_kernel")
        seen[name] += 1
        work.append(_work_of(_AGAIN.get(name, name) if seen[name] == 2 else name, launch, traffic))
    return work


def _work_of(name: str, launch: Launch, traffic: list[Traffic]) -> Work:
    work = Work(name, programs=launch.grid[0] * launch.grid[1] * launch.grid[2])
    others = 0
    for of in traffic:
        matrix = is_matrix(of.argument)
        work.read += of.read.accessed if matrix else of.read.distinct
        work.written += of.written.accessed if matrix else of.written.distinct
        if matrix:
            work.minimum += of.read.distinct + of.written.distinct
        else:
            others += of.read.distinct + of.written.distinct
    # A kernel without matrices can't do without its vectors.
    work.minimum = work.minimum or others
    return work
