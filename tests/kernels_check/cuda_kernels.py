"""The CUDA kernels, compiled by nvcc for each architecture, and read: what ptxas says, and the machine code."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .report import ARCHITECTURES, KernelReport, occupancy
from .triton_kernels import _tool

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = ("-O3", "-std=c++20")  # those of setup.py
PROCESSES = 2

THREADS = {
    "col_parts_kernel": 128,
    "col_merge_kernel": 128,
    "col_terms_kernel": 128,
    "col_count_kernel": 1,
    "mirror_rows_kernel": 128,
    "mirror_columns_kernel": 128,
    "sum_blocks_kernel": 32,
    "balance_kernel": 1,
}
"""Of a block, where they are not 256 (kThreads of csrc/cuda/team.cuh)."""

DENSE = {
    "row_stats_kernel": None,
    "row_dots_kernel": None,
    "row_combine_kernel": "0",
    "softmax_rows_kernel": "0",
}
"""Kernels of plain options, and their template's second argument (without columns, without ids or margin): of aligned
float32 or 16-bit rows they must reach half of the warps. The others hold more per thread."""

_DTYPES = {"0": "fp32", "1": "fp64", "2": "fp16", "3": "bf16", "4": "any"}


def why_unavailable() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if _nvcc() else "there is no nvcc (CUDA_HOME, PATH)"


def reports(reduced: bool, sources: Collection[str] = ()) -> list[KernelReport]:
    """One report per kernel, instance of its template and architecture; `reduced` leaves out the machine code.

    Of all kernels, or of those in some `sources`.
    """
    has_tools = not reduced and os.path.exists(_tool("cuobjdump"))
    with ThreadPoolExecutor(PROCESSES) as pool, tempfile.TemporaryDirectory() as folder:
        paths = sorted(path for path in SOURCES.glob("*.cu") if not sources or path.name in sources)
        found = pool.map(lambda path: _reports_of(path, Path(folder), has_tools), paths)
        return sorted((report for some in found for report in some), key=lambda x: (x.name, x.notes, x.dtype, x.arch))


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(os.path.join(home, "bin", "nvcc")) if home else shutil.which("nvcc")


def _reports_of(source: Path, folder: Path, has_tools: bool) -> list[KernelReport]:
    binary = folder / f"{source.stem}.fatbin"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [_nvcc(), *FLAGS, "-Xptxas", "-v", "-fatbin", *targets, "-o", str(binary), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed for {source.name}:\n{done.stderr[-4000:]}")
    code = _machine_code(binary) if has_tools else {}
    return [_report(*kernel, code) for kernel in kernels_of(done.stderr)]


def kernels_of(printed: str) -> list[tuple[str, int, dict[str, int]]]:
    """Mangled name, architecture and resources of every kernel in what `ptxas -v` prints."""
    found = []
    for entry in re.split(r"Compiling entry function ", printed)[1:]:
        name, arch = re.match(r"'(\S+)' for 'sm_(\d+)'", entry).groups()
        texts = (
            ("stack", r"(\d+) bytes stack frame"),
            ("registers", r"Used (\d+)"),
            ("shared", r"(\d+) bytes smem"),
        )
        numbers = {key: int(match[1]) if (match := re.search(text, entry)) else 0 for key, text in texts}
        found.append((name, int(arch), numbers))
    return found


def _report(mangled: str, arch: int, numbers: dict[str, int], code: dict[tuple[str, int], str]) -> KernelReport:
    name = _name_of(mangled)
    layout = re.search(r"LayoutI([fd])LNS0_5DtypeE(\d)ELb([01])EEE(?:Lb([01])E)?", mangled)
    real = re.search(r"_kernelI([fd])E", mangled)
    dtype, whole = (_DTYPES[layout[2]], layout[3] == "1") if layout else ("any", False)
    if dtype == "any" and (kind := layout or real):
        dtype = "any to fp64" if kind[1] == "d" else "any to fp32"
    instance = code.get((mangled, arch))
    failures = []
    if instance is not None:
        if whole and not re.search(r"LDG\.E[\w.]*\.128", instance):
            failures.append("no 128-bit load")
        if local := re.findall(r"\b(?:LDL|STL)\b", instance):
            failures.append(f"{len(local)} accesses of local memory")
    threads = THREADS.get(name, 256)
    dense = whole and dtype in ("fp32", "fp16", "bf16") and name in DENSE and layout[4] == DENSE[name]
    return KernelReport(
        name=name,
        backend="cuda",
        arch=arch,
        dtype=dtype,
        registers=numbers["registers"],
        shared_bytes=numbers["shared"],
        spill_bytes=numbers["stack"],
        occupancy=occupancy(arch, threads, numbers["registers"], numbers["shared"]),
        notes="128-bit" if whole else "",
        failures=tuple(failures),
        min_occupancy=0.5 if dense else 0.0,
    )


def _name_of(mangled: str) -> str:
    """The last of the names, each with its length before it, that follow _ZN."""
    place, name = 3, ""
    while length := re.match(r"\d+", mangled[place:]):
        place += len(length[0])
        name = mangled[place : place + int(length[0])]
        place += int(length[0])
    return name


def _machine_code(binary: Path) -> dict[tuple[str, int], str]:
    """Disassembly by mangled name and architecture."""
    command = [_tool("cuobjdump"), "-sass", str(binary)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"\bcode for sm_", printed)[1:]:
        arch = int(re.match(r"\d+", part)[0])
        for function in re.split(r"Function : ", part)[1:]:
            found[function.split(maxsplit=1)[0], arch] = function
    return found
