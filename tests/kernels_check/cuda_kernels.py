"""The CUDA kernels, compiled by nvcc for each architecture, and read: what ptxas says, and the machine code."""

import math
import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import banks
from .report import ARCHITECTURES, KernelReport, occupancy
from .triton_kernels import _tool

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = ("-O3", "-std=c++20")  # those of setup.py
PROCESSES = 2

BLOCKS = {
    "row_stats_kernel": (128, 2),
    "row_dots_kernel": (128, 2),
    "row_combine_kernel": (128, 2),
    "softmax_rows_kernel": (128, 2),
    "softmax_stats_kernel": (128, 2),
    "softmax_weights_kernel": (128, 2),
    "softmax_cols_kernel": (32, 8),
    "col_dots_kernel": (128, 2),
    "col_factors_kernel": (256,),
    "col_parts_kernel": (128,),
    "col_merge_kernel": (128,),
    "col_terms_kernel": (128,),
    "col_count_kernel": (1,),
    "mirror_rows_kernel": (128,),
    "mirror_columns_kernel": (128,),
    "temperature_grad_kernel": (256,),
    "sum_rows_kernel": (256,),
    "sum_blocks_kernel": (32,),
    "balance_kernel": (1,),
}
"""Their shape; that of teams is the one for rows of 768 numbers (csrc/cuda/team.cuh)."""

FLOORS = {
    # Teams of up to 512 threads with at most 128 registers each: the packs of a row that a thread holds, and sums in
    # float64. `DENSE` asks for more where rows are of one dtype in whole packs.
    "row_stats_kernel": 0.25,
    "row_dots_kernel": 0.25,
    "row_combine_kernel": 0.25,
    "softmax_rows_kernel": 0.25,
    "softmax_stats_kernel": 0.25,
    "softmax_weights_kernel": 0.25,
    "col_dots_kernel": 0.25,
    # Waits for logits, 8 rows of a thread under way together.
    "softmax_cols_kernel": 0.37,
    # Goes down the rows one by one: occupancy is all that is under way. float64 holds 11 doubles.
    "col_parts_kernel": 0.56,
    # One thread a column, so few blocks; 11 doubles of running moments, and what they are merged with.
    "col_merge_kernel": 0.31,
    # A single block, over all columns.
    "col_terms_kernel": 0.31,
    "temperature_grad_kernel": 0.75,
    # 23 float64 sums a thread, for which ptxas takes twice the registers from sm_100 on. A single block up to 2,048
    # rows, then one for every 512.
    "sum_rows_kernel": {80: 0.25, 90: 0.25, 100: 0.125, 120: 0.16},
    # A single block of a warp or less: the limit is the number of blocks.
    "sum_blocks_kernel": 0.5,
    "balance_kernel": 0.5,
    "col_count_kernel": 0.5,
    # One thread a row or column, a few numbers each.
    "col_factors_kernel": 1.0,
    "mirror_rows_kernel": 1.0,
    "mirror_columns_kernel": 1.0,
}
"""Least occupancy of a kernel in its worst instance, of every architecture or by architecture; why it is no more."""

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
    return None if nvcc() else "there is no nvcc (CUDA_HOME, PATH)"


BANKS_REDUCED = (90,)
"""Architectures whose machine code is looked at for bank conflicts in a reduced check."""


def reports(reduced: bool, sources: Collection[str] = ()) -> list[KernelReport]:
    """One report per kernel, instance of its template and architecture; `reduced` reads less of the machine code.

    Of all kernels, or of those in some `sources`.
    """
    with ThreadPoolExecutor(PROCESSES) as pool, tempfile.TemporaryDirectory() as folder:
        paths = sorted(path for path in SOURCES.glob("*.cu") if not sources or path.name in sources)
        found = pool.map(lambda path: reports_of(path, Path(folder), reduced), paths)
        return sorted((report for some in found for report in some), key=lambda x: (x.name, x.notes, x.dtype, x.arch))


def nvcc() -> str | None:
    """The compiler, of CUDA_HOME where that is set."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(os.path.join(home, "bin", "nvcc")) if home else shutil.which("nvcc")


def reports_of(source: Path, folder: Path, reduced: bool) -> list[KernelReport]:
    """Those of the kernels of one file, compiled in this folder."""
    binary = folder / f"{source.stem}.fatbin"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [nvcc(), *FLAGS, "-Xptxas", "-v", "-fatbin", *targets, "-o", str(binary), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed for {source.name}:\n{done.stderr[-4000:]}")
    kernels = kernels_of(done.stderr)
    has_tools = os.path.exists(_tool("cuobjdump"))
    code = _machine_code(binary) if has_tools and not reduced else {}
    shared = {}
    if has_tools and banks.why_unavailable() is None:
        for arch in BANKS_REDUCED if reduced else ARCHITECTURES:
            shared |= _banks(binary, arch, [name for name, of, numbers in kernels if of == arch and numbers["shared"]])
    return [_report(name, arch, numbers, code, shared.get((name, arch))) for name, arch, numbers in kernels]


def _banks(binary: Path, arch: int, mangled: list[str]) -> dict[tuple[str, int], banks.Banks]:
    """Bank conflicts of these kernels, by mangled name and architecture."""
    if not mangled:
        return {}
    folder = binary.parent / f"{binary.stem}.sm_{arch}"
    folder.mkdir()
    subprocess.run(
        [_tool("cuobjdump"), "-xelf", f"sm_{arch}", str(binary)], cwd=folder, capture_output=True, check=True
    )
    (cubin,) = folder.glob("*.cubin")
    code, by_shape = _machine_code(cubin), defaultdict(set)
    for name in mangled:
        by_shape[BLOCKS[_name_of(name)]].add(_name_of(name))
    found = {}
    for shape, names in by_shape.items():
        block = ",".join(map(str, shape))
        of = banks.bank_conflicts(cubin, block, "|".join(sorted(names)), os.path.dirname(_tool("cuobjdump")))
        for name, (ways, analysed) in of.items():
            found[name, arch] = banks.Banks(ways, analysed, banks.shared_accesses(code[name, arch]))
    return found


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


def _report(
    mangled: str, arch: int, numbers: dict[str, int], code: dict[tuple[str, int], str], shared: banks.Banks | None
) -> KernelReport:
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
    dense = whole and dtype in ("fp32", "fp16", "bf16") and name in DENSE and layout[4] == DENSE[name]
    return KernelReport(
        name=name,
        backend="cuda",
        arch=arch,
        dtype=dtype,
        registers=numbers["registers"],
        shared_bytes=numbers["shared"],
        spill_bytes=numbers["stack"],
        occupancy=occupancy(arch, math.prod(BLOCKS[name]), numbers["registers"], numbers["shared"]),
        notes="128-bit" if whole else "",
        failures=tuple(failures),
        min_occupancy=0.5 if dense else floor_of(name, arch),
        banks=shared,
    )


def floor_of(name: str, arch: int) -> float:
    """Of `FLOORS`."""
    floor = FLOORS[name]
    return floor[arch] if isinstance(floor, dict) else floor


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
