"""What a step costs, counted from the code and not measured: bytes, operations, launches; and a predicted time.

`python -m bench.cost`. The step runs on meta tensors. Every Triton launch is compiled, and its intermediate code says
which of its arguments it reads and writes, and how many scalars of each row; every other PyTorch operator counts its
operands and its result once. A second pass over a row that a program has just read is taken to find it in cache. The
CUDA kernels are counted as they run on the CPU: `bench/cuda_bytes.py`.
"""

import argparse
import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amn_kernels.options import LossOptions
from amn_kernels.reference import eager
from amn_kernels.train.runs import write_atomically
from bench.contenders import ALL_TERMS
from bench.launches import Launch, compiling

DIM = 768
ROWS = (32, 1024, 8192, 65536)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

ROW_SCALARS = ("rows", "mirrored", "key_rows")
"""Arguments [scalars, N] of which a kernel reads and writes some: as many as it has loads and stores of them."""
MATRICES = ("pred", "target", "attention", "logits", "weights", "guide", "grad")
"""Arguments [N, D] and [N, K]: what a kernel along rows can't do without."""


@dataclass
class Work:
    """What a kernel or an operator does."""

    name: str
    read: int = 0  # bytes
    written: int = 0  # bytes
    flops: int = 0  # of matrix products; a multiply-add is two
    minimum: int = 0
    """Bytes without the scalars per row: the matrices [N, D] and [N, K] that go in and come out, once each. 0 for what
    is no kernel along rows."""
    count: int = 1
    programs: int | None = None
    """Of a launch, each on one multiprocessor; None: as many as there are."""

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


class Device(NamedTuple):
    """Published peaks of a card, SXM form: bytes per second and operations per second of dense products."""

    processors: int
    bandwidth: float
    fp32: float
    bf16: float
    source: str


DEVICES = {
    "A100": Device(108, 2.039e12, 19.5e12, 312e12, "NVIDIA A100 80GB datasheet"),
    "H100": Device(132, 3.35e12, 67e12, 989e12, "NVIDIA H100 datasheet"),
    "H200": Device(132, 4.8e12, 67e12, 989e12, "NVIDIA H200 datasheet"),
}
LAUNCH_SECONDS = 2.5e-6
"""Assumed for each launch besides its bytes and operations; a captured graph takes less."""

STREAMING = {"Inf-CL": 10, "cut-cross-entropy": 6}
"""Operations over N²D of designs that never hold similarities, one direction, forward and backward, where the keys need
no gradient. Inf-CL computes theirs all the same: the similarities forward and again for each of the two gradients,
3 x 2, and the gradients themselves, 2 x 2 (Cheng et al. 2024, arXiv:2410.17243). cut-cross-entropy leaves it out: the
similarities forward and again, and one gradient (Wijmans et al. 2024, arXiv:2411.09009)."""


def predict(work: list[Work], device: Device, dtype: str) -> float:
    """Seconds: each kernel takes the longer of its bytes and its operations at the published peaks, and a launch.

    A kernel of fewer programs than there are multiprocessors gets their share of both.
    """
    seconds = 0.0
    for w in work:
        share = 1.0 if w.programs is None else min(1.0, w.programs / device.processors)
        seconds += max(w.moved / device.bandwidth, w.flops / getattr(device, dtype)) / share + w.count * LAUNCH_SECONDS
    return seconds


def fused(rows: int, dtype: torch.dtype, options: LossOptions | None = None, dim: int = DIM) -> list[Work]:
    """A training step of the Triton backend, by launch."""
    from amn_kernels import algorithm, ops
    from amn_kernels.triton import small_groups
    from amn_kernels.triton.primitives import TritonPrimitives

    options = options or LossOptions(**ALL_TERMS, weighting="fixed")
    pred, target = (torch.empty(rows, dim, dtype=dtype, device="meta") for _ in range(2))
    weights = torch.empty(len(options.terms), device="meta")
    with counting() as work:
        if rows <= small_groups.MAX_ROWS:
            choices = ops.choices_of(options)[:5]
            loss, _, _, _, _, scalars, attention = small_groups.forward(
                pred, target, None, None, weights, *(None,) * 6, *choices, True, "fixed", 0, 0.0, 1, False
            )
            small_groups.backward(loss, weights, None, pred, target, scalars, attention, *choices)
        else:
            needs, primitives = frozenset(["pred"]), TritonPrimitives()
            values, _, _, saved = algorithm.forward(
                primitives, algorithm.Exchange(), options, pred, target, needs=needs
            )
            torch.dot(values, weights)
            algorithm.backward(primitives, options, saved, values * weights, pred, target, needs=needs)
    return work


def plain(rows: int, dtype: torch.dtype, dim: int = DIM) -> list[Work]:
    """The same step as people write it in PyTorch, operator by operator."""
    pred, target = (torch.empty(rows, dim, dtype=dtype, device="meta") for _ in range(2))
    with counting() as work:
        eager.seq_loss(pred.requires_grad_(), target, **ALL_TERMS).backward()
    return work


@contextlib.contextmanager
def counting() -> Iterator[list[Work]]:
    """Context in which the work of every operator and launch is recorded, in order."""
    work: list[Work] = []
    with compiling(90, lambda launch: work.append(of_launch(launch))), _Operators(work):
        yield work


class _Operators(TorchDispatchMode):
    """Records PyTorch's own operators: each operand and the result once, but for views and allocations."""

    def __init__(self, work: list[Work]):
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name, kwargs = operator.overloadpacket.__name__, kwargs or {}
        # torch 2.13 can't trace baddbmm with both out= and out_dtype; on meta tensors there is nothing to compute.
        result = kwargs["out"] if name == "baddbmm" and "out" in kwargs else operator(*args, **kwargs)
        if operator.is_view or "empty" in name or name in ("detach", "alias", "_local_scalar_dense"):
            return result
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        out = [x for x in results if any(x is y for y in operands)]  # written in place or given as out=
        adds = name in ("baddbmm", "addmm") or name.endswith("_")
        read = sum(x.nbytes for x in operands if adds or not any(x is y for y in out))
        flops = 0
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            matrices = operands[name in ("addmm", "baddbmm") :]
            flops = 2 * results[0].numel() * matrices[0].shape[-1]
        self.work.append(Work(name, read, sum(x.nbytes for x in results), flops))
        return result


def of_launch(launch: Launch) -> Work:
    """The work of a Triton launch, from its intermediate code and its arguments."""
    work = Work(launch.kernel.metadata.name.removesuffix("_kernel"), programs=launch.programs)
    loads, stores = accesses(launch.kernel.asm["ttir"])
    for name, x in launch.arguments.items():
        if not isinstance(x, Tensor):
            continue
        scalars = name in ROW_SCALARS
        once = x.shape[-1] * x.element_size() if scalars else x.nbytes
        times = [len(loads[name]), len(stores[name])]
        read, written = (once * (n if scalars else min(n, 1)) for n in times)
        work.read += read
        work.written += written
        if name in MATRICES and x.dim() > 1:
            work.minimum += read + written
    work.flops = _product_flops(launch)
    return work


def accesses(ttir: str) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Distinct addresses that are loaded and stored, by the kernel's argument that they are offsets to."""
    base, found = {}, {"load": defaultdict(set), "store": defaultdict(set)}
    for name in re.findall(r"%(\w+): !tt\.ptr", ttir):
        base[name] = name
    for line in ttir.splitlines():
        if step := re.match(r"\s*%(\w+) = tt\.(?:addptr|splat|broadcast|expand_dims|bitcast) %(\w+)", line):
            if step[2] in base:
                base[step[1]] = base[step[2]]
        elif access := re.match(r"\s*(?:%\w+ = )?tt\.(load|store) %(\w+)", line):
            found[access[1]][base[access[2]]].add(access[2])
    return found["load"], found["store"]


def _product_flops(launch: Launch) -> int:
    """Of the products inside a kernel: similarities and attention of each group of M rows, 4 M² D."""
    if "tt.dot" not in launch.kernel.asm["ttir"]:
        return 0
    groups, size, dim = launch.arguments["pred"].shape
    return launch.kernel.asm["ttir"].count("tt.dot ") * 2 * groups * size * size * dim


def summed(work: list[Work]) -> list[Work]:
    """One entry per name, in order of appearance."""
    out: dict[str, Work] = {}
    for w in work:
        if w.name not in out:
            out[w.name] = replace(w)
            continue
        for field in ("read", "written", "flops", "minimum", "count"):
            setattr(out[w.name], field, getattr(out[w.name], field) + getattr(w, field))
    return list(out.values())


def peers(rows: int, dtype: torch.dtype, dim: int = DIM) -> dict[str, Work]:
    """A step of each of `STREAMING` in one launch, by name."""
    matrix = rows * dim * torch.empty((), dtype=dtype).element_size()
    # Two inputs read, one gradient written, at least; the products decide.
    return {name: Work(name, 2 * matrix, matrix, flops * rows * rows * dim) for name, flops in STREAMING.items()}


def table() -> list[dict]:
    """Everything, for each number of rows and dtype."""
    entries = []
    for dtype_name, dtype in DTYPES.items():
        for rows in ROWS:
            steps = {"fused": fused(rows, dtype), "eager": plain(rows, dtype)}
            steps |= {name: [work] for name, work in peers(rows, dtype).items()}
            for name, work in steps.items():
                entries.append(
                    {
                        "step": name,
                        "rows": rows,
                        "dtype": dtype_name,
                        "launches": sum(w.count for w in work),
                        "bytes": sum(w.moved for w in work),
                        "flops": sum(w.flops for w in work),
                        "predicted_seconds": {card: predict(work, it, dtype_name) for card, it in DEVICES.items()},
                        "kernels": [asdict(w) for w in summed(work)] if name in ("fused", "eager") else [],
                    }
                )
    return entries


def cuda_table() -> list[dict]:
    """Every CUDA kernel, for each dtype."""
    from bench.cuda_bytes import counted

    return [{"dtype": name, **asdict(work)} for name, dtype in DTYPES.items() for work in counted(dtype)]


def main() -> None:
    """Print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("runs/cost.json"), help="where the figures go")
    arguments = parser.parse_args()
    entries = table()
    cuda = cuda_table()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.json, json.dumps({"steps": entries, "cuda": cuda}, indent=2) + "\n")
    print_tables(entries)
    print_cuda_table(cuda)
    print(f"Written to {arguments.json}")


def print_tables(entries: list[dict]) -> None:
    """Steps against each other, then the kernels of the fused one."""
    console = Console(width=max(130, Console().width))
    steps = Table(title=f"A training step, MSE + cosine + InfoNCE, D = {DIM}: counted, and PREDICTED (not measured)")
    for column in ("rows", "input", "step"):
        steps.add_column(column)
    for column in ("launches", "MB", "GFLOP", *(f"{card}\npredicted" for card in DEVICES)):
        steps.add_column(column, justify="right")
    for entry in sorted(entries, key=lambda entry: (entry["rows"], entry["dtype"])):
        steps.add_row(
            f"{entry['rows']:,}", entry["dtype"], entry["step"], f"{entry['launches']:,}",
            f"{entry['bytes'] / 1e6:,.1f}", f"{entry['flops'] / 1e9:,.2f}",
            *(f"{s * 1e6:,.0f} us" for s in entry["predicted_seconds"].values()),
        )  # fmt: skip
    console.print(steps)
    kernels = Table(title="The fused step by kernel; minimum: its matrices once in and once out")
    for column in ("rows", "input", "kernel"):
        kernels.add_column(column)
    for column in ("times", "MB read", "MB written", "GFLOP", "bytes /\nminimum"):
        kernels.add_column(column, justify="right")
    for entry in (e for e in entries if e["step"] == "fused"):
        for kernel in entry["kernels"]:
            moved = kernel["read"] + kernel["written"]
            kernels.add_row(
                f"{entry['rows']:,}", entry["dtype"], kernel["name"], str(kernel["count"]),
                f"{kernel['read'] / 1e6:,.2f}", f"{kernel['written'] / 1e6:,.2f}", f"{kernel['flops'] / 1e9:,.2f}",
                f"{moved / kernel['minimum']:.3f}" if kernel["minimum"] else "",
            )  # fmt: skip
    console.print(kernels)
    console.print(
        f"Predicted: each kernel takes the longer of its bytes and its operations at the published peaks, plus "
        f"{LAUNCH_SECONDS * 1e6:g} us a launch; one of few programs has the share of its multiprocessors. "
        "The peers are their products in one launch; Inf-CL's are 10 N²D as it computes the gradient of the keys too, "
        "which nobody asks for here. No card was at hand; real products reach a part of the peak."
    )


def print_cuda_table(entries: list[dict]) -> None:
    """The CUDA kernels, one launch a line."""
    from bench.cuda_bytes import SIZES

    table = Table(
        title=f"CUDA kernels, {SIZES.rows} rows of {SIZES.dim}, logits [{SIZES.rows}, {SIZES.keys}]: bytes of all "
        "accesses to matrices, all else once; minimum: the matrices once"
    )
    for column in ("kernel", "input"):
        table.add_column(column)
    for column in ("blocks", "kB read", "kB written", "bytes /\nminimum"):
        table.add_column(column, justify="right")
    for entry in entries:
        table.add_row(
            entry["name"], entry["dtype"], f"{entry['programs']:,}", f"{entry['read'] / 1e3:,.1f}",
            f"{entry['written'] / 1e3:,.1f}", f"{(entry['read'] + entry['written']) / entry['minimum']:.3f}",
        )  # fmt: skip
    Console(width=max(130, Console().width)).print(table)


if __name__ == "__main__":
    main()
