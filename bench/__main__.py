"""`python -m bench`: MSE + cosine + InfoNCE against eager PyTorch and torch.compile; writes JSON and the README."""

import argparse
import json
import os
from pathlib import Path

from amn_kernels.train.runs import write_atomically
from bench import accuracy, memory, report, terms, timing

STREAMED_ROWS, MEMORY_ROWS, MOST_ROWS = 65536, 16384, 32768


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long each size takes")
    parser.add_argument("--json", type=Path, default=report.TERMS, help="where the figures go")
    parser.add_argument("--processor-time", action="store_true", help="one thread: for a machine that others use")
    parser.add_argument("--smoke", action="store_true", help="few small sizes into runs/: only shows that it runs")
    arguments = parser.parse_args()
    rows, streamed, held, most = terms.ROWS, STREAMED_ROWS, MEMORY_ROWS, MOST_ROWS
    if arguments.processor_time:
        timing.use_processor_time()
    if arguments.smoke:
        rows, streamed, held, most = (32, 256), 4096, 2048, 4096
        arguments.seconds, arguments.json = 0.5, Path("runs/bench/terms.json")

    result = {
        "machine": report.machine(),
        "load": os.getloadavg()[0],
        "times": [terms.all_terms(n, arguments.seconds) for n in rows]
        + [terms.streamed_terms(streamed, arguments.seconds)],
        "memory": [
            {"contender": name, "rows": n, "bytes": memory.measure(name, n)}
            for name, n in (("fused", held), ("eager", held), ("compile", held), ("fused", most), ("both", most))
        ],
        "accuracy": accuracy.relative_errors(),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.json, json.dumps(result, indent=1) + "\n")
    print(report.terms_section(result))
    if not arguments.smoke:
        report.render()


if __name__ == "__main__":
    main()
