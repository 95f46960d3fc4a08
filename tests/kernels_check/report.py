"""One line of the table per compiled kernel, what it must fulfil, and how many of its blocks a processor holds."""

from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from .banks import Banks

ARCHITECTURES = (80, 90, 100, 120)
"""Compute capabilities that kernels are compiled for: A100, H100 and H200, B200, RTX 50."""

REGISTERS_PER_SM = 64 * 1024
REGISTER_GRANULE = 256  # registers are given to warps in multiples of this
SHARED_GRANULE = 128  # bytes
SHARED_RESERVED = 1024  # bytes of every block that the system takes


class _Limits(NamedTuple):
    """Per streaming multiprocessor: CUDA C++ Programming Guide 13.0, table "Technical Specifications per CC"."""

    warps: int
    blocks: int
    shared: int  # bytes
    shared_per_block: int  # bytes, what a block may ask for


_LIMITS = {
    80: _Limits(64, 32, 164 << 10, 163 << 10),
    90: _Limits(64, 32, 228 << 10, 227 << 10),
    100: _Limits(64, 32, 228 << 10, 227 << 10),
    120: _Limits(48, 24, 100 << 10, 99 << 10),
}


@dataclass(frozen=True)
class KernelReport:
    """One kernel, compiled for one architecture and dtype."""

    name: str
    backend: str  # "triton" or "cuda"
    arch: int  # compute capability, as 90
    dtype: str  # of the input
    registers: int  # per thread
    shared_bytes: int  # per block
    spill_bytes: int  # per thread, stack and local memory
    occupancy: float
    """Resident warps over those a multiprocessor can hold, 0 for a kernel that does not fit."""
    notes: str = ""
    failures: tuple[str, ...] = ()
    """What is wrong with it beyond the numbers above, as found in its code."""
    min_occupancy: float = 0.0
    """What the occupancy must reach: 0.5 for kernels that wait for memory, 0 for those that multiply matrices."""
    banks: Banks | None = None
    """None where there is no shared memory, or nobody looked."""

    def complaints(self) -> list[str]:
        """Why this kernel is not acceptable; empty if it is."""
        found = list(self.failures)
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes per thread")
        if self.shared_bytes > _LIMITS[self.arch].shared_per_block:
            found.append(
                f"needs {self.shared_bytes:,} bytes of shared memory of {_LIMITS[self.arch].shared_per_block:,}"
            )
        if self.occupancy < self.min_occupancy:
            found.append(f"occupancy {self.occupancy:.1%}, wanted {self.min_occupancy:.1%}")
        if self.banks and self.banks.ways > 1:
            found.append(f"a bank conflict of {self.banks.ways} ways in shared memory")
        if self.banks and self.banks.accesses and not self.banks.analysed:
            found.append(
                f"none of {self.banks.accesses} accesses to shared memory could be analysed for bank conflicts"
            )
        return [f"{self.backend} {self.name}, {self.dtype}, sm_{self.arch}: {complaint}" for complaint in found]


def occupancy(arch: int, threads: int, registers: int, shared_bytes: int) -> float:
    """Theoretical occupancy of blocks of so many threads, with registers per thread and shared memory per block."""
    limits = _LIMITS[arch]
    warps = -(-threads // 32)
    registers_per_warp = _round_up(max(1, registers) * 32, REGISTER_GRANULE)
    # Each of the four parts of a multiprocessor has its own register file.
    warps_by_registers = REGISTERS_PER_SM // 4 // registers_per_warp * 4
    shared = _round_up(shared_bytes + SHARED_RESERVED, SHARED_GRANULE)
    blocks = min(limits.blocks, limits.warps // warps, warps_by_registers // warps, limits.shared // shared)
    return blocks * warps / limits.warps


def print_table(reports: list[KernelReport]) -> None:
    """All kernels, the worst of what matters first read in its own column."""
    table = Table(
        title="Kernels as compiled, per architecture; registers and spills per thread, shared memory per block"
    )
    for column in ("kernel", "backend", "input", "sm"):
        table.add_column(column)
    for column in ("registers", "shared\nbytes", "spilled\nbytes", "occupancy\nof least", "worst bank ways,\nanalysed"):
        table.add_column(column, justify="right")
    table.add_column("notes")
    for report in reports:
        table.add_row(
            report.name, report.backend, report.dtype, str(report.arch), str(report.registers),
            f"{report.shared_bytes:,}", str(report.spill_bytes), f"{report.occupancy:.0%} {report.min_occupancy:.0%}",
            f"{report.banks.ways}, {report.banks.analysed} of {report.banks.accesses}" if report.banks else "",
            report.notes,
        )  # fmt: skip
    console = Console(width=max(150, Console().width))
    console.print(table)


def _round_up(x: int, granule: int) -> int:
    return -(-x // granule) * granule
