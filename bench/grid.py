"""`python -m bench.grid`: InfoNCE against other libraries over sizes and dtypes; writes JSON, plot, page and README.

Time of forward + backward by turns in one process; extra peak memory in a process per contender; the growth of both
with the number of rows, as the exponent of a power law fitted to the larger half of the sizes.
"""

import json
import os
from pathlib import Path

import torch

from amn_kernels.train.runs import write_atomically
from bench import command, memory, report
from bench.contenders import step
from bench.contests import CONTESTS, OURS, check_equal, make_inputs
from bench.timing import interleaved, summary

ROWS = [2**k for k in range(5, 14)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_ROWS = 32768  # the fused loss alone, once
LONGEST = 1.0
"""Seconds: a contender whose step is longer than this, and than ten times that of fused, is not run with more rows."""


def main() -> None:
    """Measure the cells asked for; what the file holds of other cells is kept."""
    parser = command.make_parser("bench.grid", __doc__, report.PEERS, seconds=20.0)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--dims", type=int, nargs="*", default=[384, 768, 1536])
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--contests", nargs="*", default=list(CONTESTS), choices=list(CONTESTS))
    parser.add_argument("--memory-rows", type=int, nargs="*", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--most-rows", type=int, default=MOST_ROWS, help="of the fused loss alone; 0: none")
    arguments = command.parse(parser)
    if arguments.smoke:
        arguments.rows, arguments.dims, arguments.memory_rows, arguments.most_rows = [32, 128], [768], [512], 0
        arguments.dtypes, arguments.seconds = ["float32"], 0.5
        arguments.json.unlink(missing_ok=True)

    result = start(arguments.json)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)

    def keep(kind: str, entry: dict, *key: str) -> None:
        """Replace the entry of the same key, and write at once: a long measurement may be interrupted."""
        same = [e for e in result[kind] if all(e[k] == entry[k] for k in key)]
        result[kind] = [e for e in result[kind] if e not in same] + [entry]
        write_atomically(arguments.json, json.dumps(result, indent=1) + "\n")

    for name in arguments.contests:
        for dtype in arguments.dtypes:
            for dim in arguments.dims:
                for rows in sorted(arguments.rows):
                    slow = too_slow(result["times"], name, rows, dim, dtype)
                    if entry := measure(name, rows, dim, dtype, arguments.seconds, slow):
                        keep("times", entry, "contest", "rows", "dim", "dtype")
                        print(report.peers.line(entry), flush=True)
    for rows in arguments.memory_rows:
        for name in arguments.contests:
            for contender in CONTESTS[name].contenders(rows):
                extra, _ = memory.measure_contender(name, contender, rows)
                entry = {"contest": name, "contender": contender, "rows": rows, "dim": memory.DIM, "bytes": extra}
                keep("memory", entry, "contest", "contender", "rows")
                print(f"{name:<15} {contender:<36} {rows:>6,} rows {extra / 2**20:8,.1f} MiB", flush=True)
    if arguments.most_rows:
        entry = alone(arguments.most_rows)
        keep("alone", entry, "rows")
        print(f"fused alone, {entry['rows']:,} rows: {entry['seconds']:.1f} s, {entry['bytes'] / 2**20:,.0f} MiB")
    if arguments.json == report.PEERS:
        report.render()


def start(path: Path) -> dict:
    """What the file holds, to add to. Raises ValueError if that was measured on another machine."""
    machine = report.machine()
    if not path.exists():
        return {"times": [], "memory": [], "alone": [], "machine": machine}
    result = json.loads(path.read_text())
    differ = [
        f"{k} {result['machine'].get(k)}, here {now}" for k, now in machine.items() if result["machine"].get(k) != now
    ]
    if differ:
        raise ValueError(f"{path} is of another machine ({'; '.join(differ)}): write elsewhere with --json")
    return result


def too_slow(cells: list[dict], contest: str, rows: int, dim: int, dtype: str) -> set[str]:
    """Contenders that fewer rows have shown to take too long."""
    key = {"contest": contest, "dim": dim, "dtype": dtype}
    smaller = (c["contenders"] for c in cells if c["rows"] < rows and all(c[k] == v for k, v in key.items()))
    return {
        name
        for contenders in smaller
        for name, r in contenders.items()
        if r["seconds"] > max(LONGEST, 10 * contenders[OURS]["seconds"])
    }


def measure(contest: str, rows: int, dim: int, dtype: str, seconds: float, slow: set[str]) -> dict | None:
    """One cell, without the slow contenders: equality first, then times by turns. None if nobody else is left."""
    torch._dynamo.reset()  # room for one more shape
    form = CONTESTS[contest]
    pred, target = make_inputs(rows, dim, DTYPES[dtype], form.target_learns)
    losses = {name: loss for name, loss in form.contenders(rows).items() if name not in slow}
    if len(losses) == 1:
        return None
    differences = check_equal(losses, pred, target)
    times = interleaved({name: step(loss, pred, target) for name, loss in losses.items()}, seconds)
    results = summary(times, OURS)
    for name, difference in differences.items():
        results[name]["gradient_difference"] = difference
    left_out = {name: why(rows) for name, why in form.left_out.items() if why(rows)}
    reason = f"in {dtype} not run beyond a step of over {LONGEST:g} s that is over ten times that of fused"
    left_out.update(dict.fromkeys(sorted(slow), reason))
    return {
        "contest": contest, "rows": rows, "dim": dim, "dtype": dtype, "load": os.getloadavg()[0],
        "order": "drawn", "contenders": results, "left_out": left_out,
    }  # fmt: skip


def alone(rows: int) -> dict:
    """Extra memory and time of the fused loss, where no other could follow."""
    extra, seconds = memory.measure_contender("pred_to_target", OURS, rows)
    return {"rows": rows, "dim": memory.DIM, "seconds": seconds, "bytes": extra}


if __name__ == "__main__":
    main()
