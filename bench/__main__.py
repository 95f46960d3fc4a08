"""`python -m bench`: MSE + cosine + InfoNCE against eager PyTorch and torch.compile; writes JSON, page and README."""

import json
import os

import torch

from amn_kernels.train.runs import write_atomically
from bench import accuracy, command, memory, report, terms


def main() -> None:
    """Run everything."""
    parser = command.make_parser("bench", __doc__, report.TERMS, seconds=20.0)
    parser.add_argument("--rows", type=int, nargs="*", default=terms.ROWS)
    parser.add_argument("--scaling-rows", type=int, nargs="*", default=(1024, 4096), help="one thread against all")
    parser.add_argument("--streamed-rows", type=int, default=65536, help="for MSE + cosine alone")
    parser.add_argument("--memory-rows", type=int, default=16384)
    parser.add_argument("--most-rows", type=int, default=32768, help="memory of the fused loss alone; 0: not at all")
    arguments = command.parse(parser)
    if arguments.smoke:
        arguments.rows, arguments.streamed_rows, arguments.memory_rows, arguments.most_rows = (32, 256), 4096, 2048, 0
        arguments.scaling_rows = (256,)
        arguments.seconds = 0.5

    times = [terms.all_terms(rows, arguments.seconds) for rows in arguments.rows]
    if torch.get_num_threads() > 1:
        times += [terms.scaling(rows, arguments.seconds) for rows in arguments.scaling_rows]
    times.append(terms.streamed_terms(arguments.streamed_rows, arguments.seconds))
    held = [(name, arguments.memory_rows) for name in ("fused", "eager", "compile")]
    held += [(name, arguments.most_rows) for name in ("fused", "both") if arguments.most_rows]
    result = {
        "machine": report.machine(),
        "load": os.getloadavg()[0],
        "times": times,
        "memory": [{"contender": name, "rows": n, "bytes": memory.measure(name, n)} for name, n in held],
        "accuracy": accuracy.relative_errors(),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.json, json.dumps(result, indent=1) + "\n")
    print(report.terms.section(result))
    if arguments.json == report.TERMS:
        report.render()


if __name__ == "__main__":
    main()
