"""`python -m tests.ptx_proof`: sentryward on the PTX of every CUDA kernel, and a table of its verdicts.

sentryward executes the PTX of one launch symbolically and proves, for every schedule, that threads meet at their
barriers and that no two of them touch the same memory without order; or it shows two accesses that may. What is
launched, with which parameters, is taken from the launchers themselves, as they run on the CPU (tests/simt). Data stay
unknown. Where a branch depends on them, sentryward does not look at both sides: one run takes no such branch, a second
one takes them all, and the verdict says so. What it can't take, or not in time, is not verified.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import re
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from amn_kernels.train.runs import write_atomically
from tests.kernels_check.cuda_kernels import FLAGS, SOURCES, nvcc
from tests.simt.every_kernel import Sizes, run_every_kernel
from tests.simt.observe import Launch, ObservingLibrary
from tests.simt.primitives import SimtPrimitives

ARCH = 90
TABLE = Path(__file__).parents[1] / "docs" / "ptx_proof.md"
SIZES = Sizes(rows=3, dim=264, keys=264, columns=33, sums=2049)
"""One block of four teams of two warps, so that there are barriers, one team without a row; two blocks of columns."""
KEPT = Path(__file__).parents[1] / "build" / "ptx-proof"
SECONDS = 300
MEGABYTES = 6000
PROCESSES = 2

REFUTED = ("potential_race", "not_wellsynced", "invalid_lifecycle")
PROVEN, PROVEN_ON_PATHS = "proven", "proven on the paths taken"


class Mutation(NamedTuple):
    """A `__syncthreads()` that is deleted, counted from 1 in its file, and a kernel in which that must be refuted."""

    file: str
    barrier: int
    kernel: str


MUTATIONS = (
    Mutation("softmax_cols.cu", 1, "softmax_cols_kernel"),
    Mutation("term_sums.cu", 1, "sum_rows_kernel"),
    Mutation("term_sums.cu", 2, "sum_rows_kernel"),
    Mutation("team.cuh", 1, "row_dots_kernel"),
    Mutation("team.cuh", 2, "row_stats_kernel"),
    Mutation("col_stats.cu", 1, "col_terms_kernel"),
    Mutation("row_combine.cu", 1, "temperature_grad_kernel"),
)


class Entry(NamedTuple):
    """A kernel in PTX: the file, its mangled name and its text."""

    path: Path
    name: str
    text: str


@dataclass
class Verdict:
    """Of one launch."""

    kernel: str
    launch: Launch
    verdict: str
    """PROVEN, PROVEN_ON_PATHS, "refuted" or "not verified"."""
    note: str

    @property
    def holds(self) -> bool:
        """Not what it is called if nothing was said."""
        return self.verdict in (PROVEN, PROVEN_ON_PATHS)


def why_unavailable() -> str | None:
    """Why nothing can be proven here, or None."""
    try:
        import sentryward  # noqa: F401
    except ImportError as error:
        return f"sentryward can't be imported ({error})"
    return None if nvcc() else "there is no nvcc (CUDA_HOME, PATH)"


def launches(sizes: Sizes = SIZES) -> list[Launch]:
    """Of every kernel in float32, those of few threads first; those that differ in nothing but the data once."""
    library = ObservingLibrary()
    run_every_kernel(SimtPrimitives(library), sizes, torch.float32)
    different = {(x.instance, x.grid, x.block, _shape_of(x)): x for x in library.launches}
    return sorted(different.values(), key=lambda x: math.prod(x.grid) * math.prod(x.block))


def _shape_of(launch: Launch) -> tuple[int, ...]:
    return tuple(len(argument.tensors) for argument in launch.arguments)


def compiled(sources: Path, folder: Path, names: tuple[str, ...] = ()) -> dict[str, Entry]:
    """The kernels of these sources, or of all, by what c++filt makes of their names."""
    files = [path for path in sorted(sources.glob("*.cu")) if not names or path.name in names]

    def compile_one(source: Path) -> list[Entry]:
        path = folder / f"{source.stem}.ptx"
        command = [nvcc(), *FLAGS, f"-arch=sm_{ARCH}", "-ptx", "-o", str(path), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed for {source.name}:\n{done.stderr[-4000:]}")
        parts = re.split(r"^(?:\.visible )?\.entry ", path.read_text(), flags=re.M)[1:]
        return [Entry(path, re.match(r"\w+", part)[0], part[: part.index("\n}\n")]) for part in parts]

    with ThreadPoolExecutor(PROCESSES) as pool:
        entries = [entry for some in pool.map(compile_one, files) for entry in some]
    return dict(zip(_instances([entry.name for entry in entries]), entries, strict=True))


def _instances(mangled: list[str]) -> list[str]:
    """The kernels with their template arguments, from names as nvcc and as g++ mangle them."""
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return [
        re.search(r"(\w+_kernel(?:<.*>(?=\())?)[(>]", line.replace("amn::cuda::", ""))[1]
        for line in done.stdout.splitlines()
    ]


def instance(launch: Launch) -> str:
    """As the keys of `compiled`."""
    return _instances([f"_ZTS{launch.instance}"])[0]


def kernel_input(launch: Launch, entry: Entry) -> dict:
    """sentryward's input.json: the parameters that the PTX loads, pointers as objects of their own."""
    declarations, arguments = [], []
    objects = {x.data_ptr(): f"m{i}" for i, x in enumerate(_tensors(launch))}
    for (parameter, offset), kind in _fields(entry.text).items():
        place = {"parameter": parameter, "offset": offset, "type": kind}
        raw = launch.parameters[parameter][offset : offset + int(kind[1:]) // 8]
        number = int.from_bytes(raw, "little")
        if kind in ("u64", "b64", "s64") and number in objects:
            declarations.append({**place, "type": "pointer", "space": "global", "object": objects[number]})
        elif kind[0] == "f":
            arguments.append({**place, "value": struct.unpack("<d" if kind == "f64" else "<f", raw)[0]})
        else:
            arguments.append({**place, "value": int.from_bytes(raw, "little", signed=kind[0] == "s")})
    return {
        "schema": "spverify.kernel-input/v1",
        "entry": entry.name,
        "launch": {"grid_dim": list(launch.grid), "block_dim": list(launch.block)},
        "declarations": declarations,
        "arguments": arguments,
    }


def _tensors(launch: Launch) -> list[torch.Tensor]:
    return [tensor for argument in launch.arguments for tensor in argument.tensors if tensor.numel() > 0]


def _fields(text: str) -> dict[tuple[int, int], str]:
    """Type of what is loaded, by parameter and place in it in bytes; a scalar's is the declared one."""
    declared = {int(number): kind for kind, number in re.findall(r"\.param \.(\w\d+) \w+_param_(\d+)", text)}
    fields = {}
    for count, kind, number, offset in re.findall(
        r"ld\.param\.(?:v(\d)\.)?([a-z]\d+)\s[^\[]*\[\w+_param_(\d+)(?:\+(\d+))?\]", text
    ):
        kind = declared.get(int(number), kind)
        for i in range(int(count or 1)):
            fields[int(number), int(offset or 0) + i * int(kind[1:]) // 8] = kind
    return fields


def prove(launch: Launch, entry: Entry, folder: Path, seconds: float = SECONDS) -> Verdict:
    """One run of sentryward, and a second one where branches depend on data."""
    given = kernel_input(launch, entry)
    given["assumptions"] = {"representative_branches": True, "bounded_computation_loops": True}
    given["branch_decisions"] = []
    name = instance(launch)
    result, told = _verify(entry, given, folder, seconds), set()
    while (loop := _unknown_loop(result)) is not None and loop not in told:
        told.add(loop)
        given["branch_decisions"].append({"line": loop, "taken": False})
        result = _verify(entry, given, folder, seconds)
    loops = f"{len(told)} loops of one turn" if told else ""
    if result["result"] != "race_free":
        return Verdict(name, launch, *_other(result))
    decisions = result["frontend"]["frontend_assumptions"]["data_branch_decisions"]
    branches = [x["line"] for x in decisions if x["rule"] == "fallthrough"]
    if not branches:
        return Verdict(name, launch, PROVEN_ON_PATHS if loops or decisions else PROVEN, loops)
    given["branch_decisions"] += [{"line": line, "taken": True} for line in branches]
    result = _verify(entry, given, folder, seconds)
    on_data = f"{len(branches)} branch{'es' if len(branches) > 1 else ''} on data"
    paths = ", ".join(filter(None, (loops, on_data)))
    if result["result"] == "race_free":
        return Verdict(name, launch, PROVEN_ON_PATHS, f"{paths}: none taken, and all")
    verdict, note = _other(result)
    if verdict == "refuted":
        return Verdict(name, launch, verdict, f"{note}, with {paths} taken")
    return Verdict(name, launch, PROVEN_ON_PATHS, f"{paths}: none taken; all: not verified, {note}")


def _unknown_loop(result: dict) -> int | None:
    """The line of a branch that ends a loop, or leads into it, by data, and that sentryward wants to be told of.

    Not taken it leads into the loop, and out of it after one turn: that is what a thread does with its one pack.
    """
    for x in result["diagnostics"]:
        if x["code"] == "loop_control_not_classified":
            return x["details"]["location"]["line"]
    return None


def _verify(entry: Entry, given: dict, folder: Path, seconds: float) -> dict:
    """What sentryward says; of the same code and input it is kept, but for a time-out."""
    import sentryward

    # nvcc names an anonymous namespace after the path and a hash of the file.
    of_code = re.sub(r"_GLOBAL__N__\w+?_cu_[0-9a-f]{8}", "", json.dumps([entry.text, given]))
    version = importlib.metadata.version("sentryward")
    kept = KEPT / f"{hashlib.sha256(f'{version} {of_code}'.encode()).hexdigest()}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    path = folder / "input.json"
    path.write_text(json.dumps(given))
    result = sentryward.verify(entry.path, input=path, timeout_seconds=seconds, memory_limit_mib=MEGABYTES)
    result = {name: result.get(name, {}) for name in ("result", "diagnostics", "frontend")}
    if result["result"] != "timeout":
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps(result))
    return result


def _other(result: dict) -> tuple[str, str]:
    """Verdict and reason of what is not race_free."""
    codes = sorted({x["code"].replace("_", " ") for x in result["diagnostics"]}) or [result["result"]]
    what = result["result"].replace("_", " ")
    note = what if codes == [what] else f"{what}: {', '.join(codes[:2])}"
    return ("refuted" if result["result"] in REFUTED else "not verified"), note


def mutated(mutation: Mutation, folder: Path) -> Path:
    """A copy of the sources with one barrier less."""
    sources = folder / "csrc" / "cuda"
    sources.mkdir(parents=True)
    for path in [*SOURCES.iterdir(), SOURCES.parent / "types.h"]:
        text = path.read_text()
        if path.name == mutation.file:
            places = [x.start() for x in re.finditer(r"__syncthreads\(\);", text)]
            at = places[mutation.barrier - 1]
            text = text[:at] + text[at + len("__syncthreads();") :]
        (sources / path.name if path.parent == SOURCES else folder / "csrc" / path.name).write_text(text)
    return sources


def detect(mutation: Mutation, seconds: float = SECONDS) -> Verdict:
    """What becomes of the kernel without the barrier."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wanted = next(x for x in launches() if x.kernel == mutation.kernel)
        users = {path.name for path in SOURCES.glob("*.cu") if re.search(rf"\b{mutation.kernel}\b", path.read_text())}
        entry = compiled(mutated(mutation, folder), folder, tuple(users))[instance(wanted)]
        return prove(wanted, entry, folder, seconds)


def main() -> int:
    """1 if a kernel is refuted, or a deleted barrier is not."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx_proof", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="budget of each of sentryward's runs")
    parser.add_argument("--out", type=Path, default=TABLE, help="where the table goes")
    arguments = parser.parse_args()
    if reason := why_unavailable():
        print(f"skipped, {reason}")
        return 0
    verdicts, detected = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        entries = compiled(SOURCES, folder)
        for launch in launches():
            verdicts.append(prove(launch, entries[instance(launch)], folder, arguments.seconds))
            print(_line(verdicts[-1]), flush=True)
    for mutation in MUTATIONS:
        detected.append((mutation, detect(mutation, arguments.seconds)))
        print(f"{mutation.file}, barrier {mutation.barrier} deleted: {_line(detected[-1][1])}", flush=True)
    write_atomically(arguments.out, table(verdicts, detected))
    refuted = [x for x in verdicts if x.verdict == "refuted"]
    missed = [mutation for mutation, x in detected if x.holds]
    return 1 if refuted or missed else 0


def _line(x: Verdict) -> str:
    return f"{x.kernel} {x.launch.grid} {x.launch.block}: {x.verdict} {f'({x.note})' if x.note else ''}"


INTRODUCTION = f"""\
# Barriers and races in the PTX of the CUDA kernels

Written by `make ptx-proof`: sentryward on what nvcc makes of every kernel for sm_{ARCH}, in float32. Each is launched
as the launchers do, for {SIZES.rows} rows of {SIZES.dim} numbers and {SIZES.keys} keys, or for {SIZES.sums:,} rows
where a sum takes more than a block.

The verdicts:

- *proven*: in every schedule of that launch threads meet at their barriers, and no two of them touch the same memory
  without order;
- *proven on the paths taken*: the same, but some branches or loops depend on data, and only the runs that the last
  column names were looked at;
- *refuted*: threads that do not meet, or two accesses without order, were found;
- *not verified*: sentryward gave no verdict. That says nothing of the kernel.

The last column:

- *2 branches on data: none taken, and all*: sentryward does not follow both sides of a branch that depends on data.
  There were two runs, one in which none of the 2 branches is taken and one in which all are. Mixtures were not looked
  at;
- *2 loops of one turn*: how often these 2 loops run depends on data; they were left after one turn;
- *invalid ptx syntax*, *unsupported*: limits of sentryward. ptxas assembles the same kernels (`make kernels-check`);
- *memory budget exceeded*: the run was ended at {MEGABYTES:,} MiB, a limit that `tests/ptx_proof.py` sets.
"""

_HEAD = ["| kernel | grid | block | verdict | |", "|---|---|---|---|---|"]


def counts(verdicts: list[str]) -> str:
    """How many launches have which verdict, in a sentence."""
    found = {verdict: verdicts.count(verdict) for verdict in (PROVEN, PROVEN_ON_PATHS, "refuted", "not verified")}
    return f"Of {len(verdicts)} launches: " + ", ".join(f"{n} {verdict}" for verdict, n in found.items() if n) + "."


def table(verdicts: list[Verdict], detected: list[tuple[Mutation, Verdict]]) -> str:
    """docs/ptx_proof.md."""
    lines = [INTRODUCTION, counts([x.verdict for x in verdicts]), "", *_HEAD]
    for x in sorted(verdicts, key=lambda x: x.kernel):
        grid, block = (" x ".join(str(n) for n in size) for size in (x.launch.grid, x.launch.block))
        lines.append(f"| `{x.kernel}` | {grid} | {block} | {x.verdict} | {x.note} |")
    lines += [
        "",
        "## With a barrier deleted",
        "",
        "The same of kernels that lack one `__syncthreads()`; each must be refuted.",
        "",
        "| file | barrier | kernel | verdict | |",
        "|---|---|---|---|---|",
    ]
    for mutation, x in detected:
        lines.append(f"| `{mutation.file}` | {mutation.barrier} | `{mutation.kernel}` | {x.verdict} | {x.note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
