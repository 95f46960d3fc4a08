"""`python -m fuzz [--cases 10000] [--seed 0] [--only KIND ...]`, from tests/: fuzz longer than the test suite does."""

import argparse
import time
import warnings

from fuzz import KINDS, loss, run

SHARE = 0.1  # of the cases of the loss, for each of the other kinds


def main() -> None:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="of the loss; of every other kind a tenth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of PyTorch about the odd tensors that it is given
    print(f"backends compared with the reference: {', '.join(loss.contenders()) or 'none'}", flush=True)
    for kind in arguments.only:
        cases = arguments.cases if kind == "loss" else max(1, int(arguments.cases * SHARE))
        began = time.perf_counter()
        run(kind, cases, arguments.seed)
        print(f"{kind:<11} {cases:7,} cases, no disagreement, {time.perf_counter() - began:6.1f} s", flush=True)
    for what, count in loss.notes.most_common():
        print(f"{count:19,} loss cases: {what}")


if __name__ == "__main__":
    main()
