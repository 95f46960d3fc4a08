"""`python -m tests.kernels_check [--reduced]`: compiles the GPU kernels, prints a table, fails on spills and more."""

import argparse
import importlib
import sys

from . import banks
from .report import print_table

BACKENDS = ("triton_kernels", "cuda_kernels")
"""Modules with ``reports(reduced) -> list[KernelReport]`` and ``why_unavailable() -> str | None``."""


def main() -> int:
    """1 if a kernel does not fulfil what it must, or a backend gave none."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels_check", description=__doc__)
    parser.add_argument("--reduced", action="store_true", help="fewer dtypes per architecture, as in CI")
    arguments = parser.parse_args()

    if reason := banks.why_unavailable():
        print(f"bank conflicts: not looked for, {reason}")
    complaints = []
    for name in BACKENDS:
        backend = importlib.import_module(f".{name}", __package__)
        if reason := backend.why_unavailable():
            print(f"{name}: skipped, {reason}")
            continue
        reports = backend.reports(arguments.reduced)
        print_table(reports)
        if not reports:
            complaints.append(f"{name}: no kernel was compiled")
        for report in reports:
            complaints += report.complaints()
    for complaint in complaints:
        print(f"FAILED {complaint}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
