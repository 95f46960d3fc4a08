"""`python -m bench [--smoke] [--json FILE]`: measures, prints tables, writes JSON."""

import argparse
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from amn_kernels import ops
from amn_kernels.train.runs import write_atomically
from bench import accuracy, memory


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small sizes and few rounds: only shows that it runs")
    parser.add_argument("--json", type=Path, default=Path("runs/bench.json"), help="where the figures go")
    arguments = parser.parse_args()

    times = _times(arguments.smoke)
    rows, most = (2048, 4096) if arguments.smoke else (16384, 32768)
    result = {
        "machine": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "kernels": ops.cpu_isa(),
        },
        "times": times,
        "memory": [
            {"contender": name, "rows": count, "bytes": memory.measure(name, count)}
            for name, count in (
                *((name, rows) for name in ("fused", "eager", "compile")),
                ("fused", most),
                ("both", most),
            )
        ],
        "accuracy": accuracy.relative_errors(),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.json, json.dumps(result, indent=2) + "\n")
    _print(result)
    print(f"Written to {arguments.json}")


def _times(smoke: bool) -> list[dict]:
    """Medians in seconds, one entry per benchmark: fused and each rival."""
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "times.json")
        status = pytest.main(
            ["bench/test_seq_loss.py", "bench/test_peers.py", "-q", "-p", "no:cacheprovider",
             f"--benchmark-json={report}", "--benchmark-columns=median,iqr,rounds", *(["--smoke"] if smoke else [])]
        )  # fmt: skip
        if status != 0:
            raise SystemExit(int(status))
        benchmarks = json.loads(Path(report).read_text())["benchmarks"]
    entries = []
    for entry in benchmarks:
        info = entry["extra_info"]
        entries.append({**info, "median": {"fused": entry["stats"]["median"], **info["median"]}})
    return entries


def _print(result: dict) -> None:
    console = Console(width=max(100, Console().width))
    machine = result["machine"]
    console.print(f"torch {machine['torch']}, {machine['threads']} threads, {machine['kernels']} kernels")

    table = Table(title="MSE + cosine + InfoNCE, forward + backward, float32, D = 768; medians of interleaved runs")
    for column in ("rows", "fused\nms", "eager\nms", "compile\nms", "faster /\nfused", "balanced /\nfused"):
        table.add_column(column, justify="right")
    for column in ("two products\nms", "products /\nfused", "products\nGFLOP/s"):
        table.add_column(column, justify="right")
    for entry in (e for e in result["times"] if e["kind"] == "all_terms"):
        median = entry["median"]
        table.add_row(
            f"{entry['rows']:,}",
            *(f"{median[name] * 1e3:.3g}" for name in ("fused", "eager", "compile")),
            f"{min(median['eager'], median['compile']) / median['fused']:.2f}x",
            f"{median['balanced'] / median['fused']:.2f}x",
            f"{median['products'] * 1e3:.3g}",
            f"{median['products'] / median['fused']:.0%}",
            f"{entry['flops'] / median['products'] / 1e9:.0f}",
        )
    console.print(table)

    for entry in (e for e in result["times"] if e["kind"] == "streamed_terms"):
        median = entry["median"]
        console.print(
            f"MSE + cosine, {entry['rows']:,} rows: fused {_milliseconds(median['fused'])}, "
            f"eager {_milliseconds(median['eager'])}, compile {_milliseconds(median['compile'])}; "
            f"moving five such tensors {_milliseconds(median['move'])}: "
            f"fused takes {median['fused'] / median['move']:.2f}x that"
        )

    table = Table(title="InfoNCE alone against other libraries, forward + backward, float32, D = 768")
    for column in ("direction", "rows", "fused\nms", "rival", "rival\nms", "rival /\nfused"):
        table.add_column(column, justify="right")
    for entry in (e for e in result["times"] if e["kind"] == "peers"):
        fused = entry["median"].pop("fused")
        for name, seconds in entry["median"].items():
            table.add_row(
                entry["direction"], f"{entry['rows']:,}", f"{fused * 1e3:.3g}", name, f"{seconds * 1e3:.3g}",
                f"{seconds / fused:.1f}x",
            )  # fmt: skip
    console.print(table)

    console.print("Extra peak memory of a step with MSE + cosine + InfoNCE (both: in both directions):")
    for entry in result["memory"]:
        console.print(f"  {entry['contender']:<8} {entry['rows']:>6,} rows  {entry['bytes'] / 2**20:8,.0f} MiB")

    table = Table(title="Relative error of the float32 gradient against float64")
    for column in ("term", "|pred - target| / |target|", "fused", "eager", "eager / fused"):
        table.add_column(column, justify="right")
    for entry in result["accuracy"]:
        table.add_row(
            entry["term"], f"{entry['distance']:g}", f"{entry['fused']:.1e}", f"{entry['eager']:.1e}",
            f"{entry['eager'] / entry['fused']:.1f}x",
        )  # fmt: skip
    console.print(table)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


if __name__ == "__main__":
    main()
