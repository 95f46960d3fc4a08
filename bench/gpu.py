"""`python -m bench.gpu`: time and memory of a training step on a CUDA device, against what people run today.

Contenders take turns, so that a slow moment of the machine falls on all of them; medians of times by CUDA events. With
``--device cpu`` the same harness runs on the CPU with wall-clock times, to see that it runs: these are no GPU figures.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from amn_kernels import FusedSeqLoss
from amn_kernels.backends import BACKENDS
from amn_kernels.reference import eager
from amn_kernels.train.runs import write_atomically
from bench.contenders import ALL_TERMS, compiled, step

ROWS = (32, 128, 1024, 8192, 65536)
DIM = 768
TEMPERATURE = 0.07
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INFONCE = {"infonce": 1.0}

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def contenders(terms: dict[str, float], device: str) -> tuple[dict[str, Loss], dict[str, str]]:
    """Loss functions by name, and why the others are left out, by name."""
    found: dict[str, Loss] = {}
    left_out: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        if name == "reference" or (name == "cpu") != (device == "cpu"):
            continue
        if reason := backend.why_unavailable():
            left_out[name] = reason
            continue
        options = {"mse": 0.0, **terms, "backend": name}
        found[name] = FusedSeqLoss(**options, weighting="fixed").to(device)
        found[f"{name}, balanced"] = FusedSeqLoss(**options).to(device)
    plain = functools.partial(eager.seq_loss, temperature=TEMPERATURE, **terms)
    found["eager"] = plain
    found["torch.compile"] = compiled(plain)
    if terms == INFONCE:
        for name, (module, make) in PEERS.items():
            if device == "cpu":
                left_out[name] = "its kernels need a CUDA device"
            elif importlib.util.find_spec(module) is None:
                left_out[name] = f"{module} is not installed"
            else:
                found[name] = make()
    return found, left_out


def _units(pred: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries with the temperature in them, keys, and the number of each query's key."""
    labels = torch.arange(len(pred), device=pred.device)
    return F.normalize(pred, dim=-1) / TEMPERATURE, F.normalize(target, dim=-1), labels


def _inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    def loss(pred, target):
        queries, keys, labels = _units(pred, target)
        return cal_flash_loss(queries, keys, labels).mean()

    return loss


def _cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(pred, target):
        return linear_cross_entropy(*_units(pred, target))

    return loss


def _liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    criterion = LigerFusedLinearCrossEntropyLoss()

    def loss(pred, target):
        queries, keys, labels = _units(pred, target)
        return criterion(keys, queries, labels)

    return loss


PEERS = {
    "Inf-CL": ("inf_cl", _inf_cl),
    "cut-cross-entropy": ("cut_cross_entropy", _cut_cross_entropy),
    "Liger": ("liger_kernel", _liger),
}
"""InfoNCE as others can compute it without its similarities in memory: package, and what makes the loss."""


def measure(losses: dict[str, Loss], pred: torch.Tensor, target: torch.Tensor, rounds: int) -> dict[str, dict]:
    """Median seconds and extra peak bytes of a step by contender, or the error that it ended in."""
    runs, result = {}, {}
    for name, loss in losses.items():
        run = step(loss, pred, target)
        try:
            for _ in range(3):  # compilation, autotuning, allocator
                run()
            result[name] = {"bytes": _peak(run, pred)}
            runs[name] = run
        except Exception as error:  # out of memory, or an input that a peer does not take: told, not hidden
            result[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        finally:
            pred.grad = None
    seconds = {name: [] for name in runs}
    timer = _cuda_seconds if pred.is_cuda else _wall_seconds
    order = list(runs.items())
    for _ in range(rounds):
        order.append(order.pop(0))
        for name, run in order:
            seconds[name].append(timer(run))
    for name, times in seconds.items():
        result[name]["seconds"] = statistics.median(times)
    return result


def _cuda_seconds(run: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3  # milliseconds


def _wall_seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _peak(run: Callable[[], None], pred: torch.Tensor) -> int | None:
    """Bytes that a step allocates beyond what was there, by the allocator; None where it keeps no account."""
    if not pred.is_cuda:
        return None
    pred.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def benchmark(device: str, rows: tuple[int, ...], rounds: int, dim: int = DIM) -> dict:
    """All figures: what the machine is, and an entry per terms, dtype and number of rows."""
    entries, left_out = [], {}
    for kind, terms in (("all", ALL_TERMS), ("infonce", INFONCE)):
        losses, missing = contenders(terms, device)
        left_out.update(missing)
        for dtype_name, dtype in DTYPES.items():
            for count in rows:
                generator = torch.Generator().manual_seed(0)
                pred, target = (torch.randn(count, dim, generator=generator).to(device, dtype) for _ in range(2))
                figures = measure(losses, pred.requires_grad_(), target, rounds)
                entries.append({"kind": kind, "dtype": dtype_name, "rows": count, "contenders": figures})
    return {"machine": machine(device), "left_out": left_out, "entries": entries}


def machine(device: str) -> dict:
    """What the figures were measured on."""
    facts = {"device": device, "torch": torch.__version__}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"name": properties.name, "cuda": torch.version.cuda, "memory": properties.total_memory}
    return facts


def plot(result: dict, path: Path) -> None:
    """Time over rows, one panel per terms and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(entry["kind"], entry["dtype"]) for entry in result["entries"]})
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (kind, dtype) in zip(axes[0], panels, strict=True):
        some = [entry for entry in result["entries"] if (entry["kind"], entry["dtype"]) == (kind, dtype)]
        for name in some[0]["contenders"]:
            points = [(e["rows"], e["contenders"][name].get("seconds")) for e in some]
            points = [(rows, seconds * 1e3) for rows, seconds in points if seconds is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=f"{kind}, {dtype}", xlabel="rows", ylabel="ms per step", xscale="log", yscale="log")
        axis.legend(fontsize=7)
    figure.suptitle(f"Forward + backward, D = {DIM}, {result['machine'].get('name', result['machine']['device'])}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(result: dict) -> None:
    """One line per contender and shape."""
    console = Console(width=max(100, Console().width))
    table = Table(title=f"Forward + backward on {result['machine'].get('name', result['machine']['device'])}")
    for column in ("terms", "input", "rows", "contender"):
        table.add_column(column)
    for column in ("ms", "MiB"):
        table.add_column(column, justify="right")
    for entry in result["entries"]:
        for name, figures in entry["contenders"].items():
            size = figures.get("bytes")
            table.add_row(
                entry["kind"], entry["dtype"], f"{entry['rows']:,}", name,
                figures["error"] if "error" in figures else f"{figures['seconds'] * 1e3:.3f}",
                "" if size is None else f"{size / 2**20:,.1f}",
            )  # fmt: skip
    console.print(table)
    for name, reason in result["left_out"].items():
        console.print(f"Left out: {name} ({reason})")


def main() -> None:
    """Measure, print, write JSON and PNG."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="small sizes and few rounds: only shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for bench-gpu.json and bench-gpu.png")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench.gpu: there is no CUDA device; --device cpu shows that the harness runs")
    small = arguments.smoke or arguments.device == "cpu"
    result = benchmark(arguments.device, (32, 128) if small else ROWS, rounds=3 if small else 50)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out / "bench-gpu.json", json.dumps(result, indent=2) + "\n")
    plot(result, arguments.out / "bench-gpu.png")
    print_table(result)
    print(f"Written to {arguments.out}/bench-gpu.json and bench-gpu.png")


if __name__ == "__main__":
    main()
