"""`python -m bench.gpu`: time and memory of a training step on a CUDA device, against what people run today.

Contenders take turns, so that a slow moment of the machine falls on all of them; medians of times by CUDA events. Every
size is written as soon as it is measured; what the file holds of other sizes, and of other cards, is kept. A step is
called from Python, as a training calls it: where the device is done sooner than the host submits, as at few rows, the
times are the host's. With ``--device cpu`` the same harness runs on the CPU with wall-clock times, to see that it runs:
these are no GPU figures.
"""

import argparse
import functools
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
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
KINDS = {"all": ALL_TERMS, "infonce": INFONCE}
BALANCED = ", balanced"
"""End of the names of losses with weights of their own, whose values and gradients are not those of the others."""

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
        found[name + BALANCED] = FusedSeqLoss(**options).to(device)
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
                try:
                    found[name] = make()
                except Exception as error:  # a package that is there and can't be imported on this machine
                    left_out[name] = _told(error)
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
        # By default its backward leaves out blocks of small weights: another gradient, in less time.
        return linear_cross_entropy(*_units(pred, target), filter_eps=None)

    return loss


def _liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    criterion = LigerFusedLinearCrossEntropyLoss()

    def loss(pred, target):
        queries, keys, labels = _units(pred, target)
        return criterion(keys, queries, labels)

    return loss


PEERS = {
    "Inf-CL (TF32, both gradients)": ("inf_cl", _inf_cl),
    "cut-cross-entropy (no filter)": ("cut_cross_entropy", _cut_cross_entropy),
    "Liger": ("liger_kernel", _liger),
}
"""InfoNCE as others can compute it without its similarities in memory: package, and what makes the loss.

Inf-CL multiplies float32 in TF32, and computes the gradient of the keys even where nobody asks for it.
"""
OF_16_BITS = {"cut-cross-entropy (no filter)": "its backward takes 16 bits only"}
"""Those that are left out of float32, and why."""


def measure(losses: dict[str, Loss], pred: torch.Tensor, target: torch.Tensor, rounds: int) -> dict[str, dict]:
    """Of a step by contender: median "seconds", "bytes" of extra peak memory and "difference", or the "error".

    The difference is of value and gradient, relative to the first contender that ran; none of them is asserted, as
    some contenders round more. Ends early where the device fails for good.
    """
    torch._dynamo.reset()  # room for one more shape
    runs, result, first = {}, {}, None
    for name, loss in losses.items():
        run = step(loss, pred, target)
        try:
            for _ in range(3):  # compilation, autotuning, allocator
                run()
            figures = {"bytes": _peak(run, pred)}
            if not name.endswith(BALANCED):
                value, gradient = _evaluate(loss, pred, target)
                first = first or (name, value, gradient)
                figures["difference"] = {
                    "from": first[0],
                    "value": _relative(value, first[1]),
                    "gradient": _relative(gradient, first[2]),
                }
            result[name], runs[name] = figures, run
        except Exception as error:  # out of memory, or an input that a peer does not take: told, not hidden
            result[name] = {"error": _told(error)}
            if not answers(pred.device):
                break
        finally:
            pred.grad = None
    seconds = {name: [] for name in runs}
    timer = _cuda_seconds if pred.is_cuda else _wall_seconds
    order = list(runs) if answers(pred.device) else []
    orders = random.Random(0)
    for _ in range(rounds):
        orders.shuffle(order)
        for name in list(order):
            try:
                seconds[name].append(timer(runs[name]))
            except Exception as error:
                result[name] = {"error": _told(error)}
                order.remove(name)
                if not answers(pred.device):
                    order = []
                    break
    for name in losses:
        if name in order:
            result[name]["seconds"] = statistics.median(seconds[name])
        elif "error" not in result.get(name, {}):
            result[name] = {"error": "not timed: the device had failed"}
    return result


def answers(device: torch.device | str) -> bool:
    """Whether the device still serves this process: after some errors every later call fails."""
    if torch.device(device).type == "cpu":
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def _told(error: Exception) -> str:
    """Type and first line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _evaluate(loss: Loss, pred: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient of pred, off the device."""
    value = loss(pred, target)
    (gradient,) = torch.autograd.grad(value, pred)
    return value.detach().double().cpu(), gradient.cpu()


def _relative(x: torch.Tensor, to: torch.Tensor) -> float:
    return ((x.double() - to.double()).norm() / to.double().norm()).item()


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


def measured(
    device: str,
    rows: Iterable[int],
    rounds: int,
    kinds: Iterable[str] = tuple(KINDS),
    dtypes: Iterable[str] = tuple(DTYPES),
    dim: int = DIM,
) -> Iterator[dict]:
    """An entry per terms, dtype and number of rows, each as soon as it is there; none after the device has failed."""
    for kind in kinds:
        found, absent = contenders(KINDS[kind], device)
        for dtype in dtypes:
            refused = {f"{name} in {dtype}": why for name, why in OF_16_BITS.items() if name in found}
            left_out = {**absent, **(refused if dtype == "fp32" else {})}
            losses = {name: loss for name, loss in found.items() if f"{name} in {dtype}" not in left_out}
            for count in rows:
                generator = torch.Generator().manual_seed(0)
                pred, target = (torch.randn(count, dim, generator=generator).to(device, DTYPES[dtype]) for _ in "pt")
                cell = {"machine": machine(device), "kind": kind, "dtype": dtype, "rows": count, "dim": dim}
                figures = measure(losses, pred.requires_grad_(), target, rounds)
                yield {**cell, "left_out": left_out, "contenders": figures}
                if not answers(device):
                    return


def keep(result: dict, entry: dict, path: Path) -> None:
    """Replace the entry of the same cell on the same machine, and write the file."""
    key = ("machine", "kind", "dtype", "rows", "dim")
    result["entries"] = [e for e in result["entries"] if any(e[k] != entry[k] for k in key)] + [entry]
    write_atomically(path, json.dumps(result, indent=2) + "\n")


def machine(device: str) -> dict:
    """What the figures were measured on."""
    facts = {"device": device, "torch": torch.__version__}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"name": properties.name, "cuda": torch.version.cuda, "memory": properties.total_memory}
    return facts


def _card(entry: dict) -> str:
    return entry["machine"].get("name", entry["machine"]["device"])


def plot(result: dict, path: Path) -> None:
    """Time over rows, one panel per terms and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(_card(entry), entry["kind"], entry["dtype"]) for entry in result["entries"]})
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        some = [e for e in result["entries"] if (_card(e), e["kind"], e["dtype"]) == panel]
        some.sort(key=lambda entry: entry["rows"])
        for name in dict.fromkeys(name for entry in some for name in entry["contenders"]):
            points = [(e["rows"], e["contenders"].get(name, {}).get("seconds")) for e in some]
            points = [(rows, seconds * 1e3) for rows, seconds in points if seconds is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=", ".join(panel), xlabel="rows", ylabel="ms per step", xscale="log", yscale="log")
        axis.legend(fontsize=7)
    dims = sorted({entry["dim"] for entry in result["entries"]})
    figure.suptitle(f"Forward + backward, called from Python, D = {', '.join(map(str, dims))}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(result: dict) -> None:
    """One line per contender and shape."""
    console = Console(width=max(130, Console().width))
    table = Table(title="Forward + backward; difference: of the gradient, relative to the first contender")
    for column in ("card", "terms", "input", "rows", "D", "contender"):
        table.add_column(column)
    for column in ("ms", "MiB", "difference"):
        table.add_column(column, justify="right")
    for entry in result["entries"]:
        for name, figures in entry["contenders"].items():
            size, difference = figures.get("bytes"), figures.get("difference")
            table.add_row(
                _card(entry), entry["kind"], entry["dtype"], f"{entry['rows']:,}", str(entry["dim"]), name,
                figures["error"] if "error" in figures else f"{figures['seconds'] * 1e3:.3f}",
                "" if size is None else f"{size / 2**20:,.1f}",
                "" if difference is None else f"{difference['gradient']:.1e}",
            )  # fmt: skip
    console.print(table)
    console.print("Where contenders take the same time at few rows, it is the host's, which submits the launches.")
    for name, reason in sorted({left_out for entry in result["entries"] for left_out in entry["left_out"].items()}):
        console.print(f"Left out: {name} ({reason})")


def main() -> None:
    """Measure, print, write JSON and PNG."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="small sizes and few rounds: only shows that it runs")
    parser.add_argument("--rows", type=int, nargs="+", help=f"default: {' '.join(map(str, ROWS))}")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--out", type=Path, help="folder of the figures; default: docs/bench, or runs if small")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench.gpu: there is no CUDA device; --device cpu shows that the harness runs")
    small = arguments.smoke or arguments.device == "cpu"
    rows, rounds = arguments.rows or ((32, 128) if small else ROWS), 3 if small else 50
    out = arguments.out or Path("runs" if small else "docs/bench")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gpu.json"
    result = json.loads(path.read_text()) if path.exists() else {"entries": []}
    for entry in measured(arguments.device, rows, rounds, arguments.kinds, arguments.dtypes):
        keep(result, entry, path)
        print(f"{entry['kind']}, {entry['dtype']}, {entry['rows']:,} rows: measured", flush=True)
    plot(result, out / "gpu.png")
    print_table(result)
    print(f"Written to {out}/gpu.json and gpu.png")
    if not answers(arguments.device):
        raise SystemExit("bench.gpu: the device failed; what was measured before is written")


if __name__ == "__main__":
    main()
