"""`python -m tests.mutations [--layers simt,...]`: errors put into the CUDA kernels one by one, and who notices.

Works on a copy of the tree. Each layer runs the same recorded calls of the kernels, which were right when they were
recorded (tests/simt/test_kernels.py): plain, where a result that differs in any bit is noticed, and under the
sanitizers. Writes docs/mutations.md; exit status 1 if an error was noticed by none of the layers that ran.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import NamedTuple

from amn_kernels.train.runs import write_atomically

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "mutations.md"


class Mutation(NamedTuple):
    """An error: `old` becomes `new` in a file of csrc/cuda, where it occurs once or is meant everywhere."""

    name: str
    file: str
    old: str
    new: str


MUTATIONS = (
    Mutation("a factor lost", "row_stats.cu", "distance[0] / 2", "distance[0]"),
    Mutation("all threads of a team write the row", "row_stats.cu", "is_row && threadIdx.x == 0;", "is_row;"),
    Mutation(
        "no barrier before warps are summed", "term_sums.cu",
        "  }\n  __syncthreads();\n  if (threadIdx.x < kSums) {", "  }\n  if (threadIdx.x < kSums) {",
    ),
    Mutation(
        "barrier inside a branch", "term_sums.cu",
        "  }\n  __syncthreads();\n  if (threadIdx.x < kSums) {",
        "  }\n  if (threadIdx.x < kSums) {\n    __syncthreads();",
    ),
    Mutation("shuffle with half a mask", "term_sums.cu", "__shfl_xor_sync(0xffffffffu", "__shfl_xor_sync(0xffffu"),
    Mutation(
        "shared array too short", "term_sums.cu",
        "AMN_SHARED(double, of_block, kSums)", "AMN_SHARED(double, of_block, 3)",
    ),
    Mutation(
        "no barrier between threads of a column", "softmax_cols.cu",
        "sums.positives;\n  __syncthreads();", "sums.positives;",
    ),
    Mutation("one row too many", "softmax_cols.cu", "i < logits.rows ? column", "i <= logits.rows ? column"),
    Mutation("one column too many", "mirror.cu", "if (k >= columns.cols) return;", "if (k > columns.cols) return;"),
    Mutation("one row too many is mirrored", "mirror.cu", "if (i >= count) return;", "if (i > count) return;"),
    Mutation("the first part is not merged", "col_stats.cu", "int64_t part = 0; part <", "int64_t part = 1; part <"),
    Mutation("the positive is added", "row_dots.cu", "share - tk.x[e] * take", "share + tk.x[e] * take"),
    Mutation("d is taken without the target", "row_combine.cu", "x.b * (pk.x[e] - tk.x[e])", "x.b * pk.x[e]"),
)  # fmt: skip

LAYERS = {"simt": "PLAIN", "simt-asan": "ASAN", "simt-tsan": "TSAN"}
"""Builds of tests/simt/build.py."""

_REPLAY = """
import sys
sys.path.insert(0, "tests")
from simt.build import Build, program, run
try:
    replay = program("replay", Build[sys.argv[1]])
except RuntimeError as error:
    print(error)
    sys.exit(2)
done = run(replay, sys.argv[2], "2", timeout=900)
print(done.stderr)
sys.exit(1 if done.returncode else 0)
"""

_RECORD = """
import sys
sys.path.insert(0, "tests")
import torch
from combinations import sample
from error_rule import TERMS, make_rows, seq_loss
from simt.backend import check_simt, simt_backend
from simt.trace import Library
cases = [x for x in sample(100) if x["shape"][0] * x["shape"][1] <= 24 and x["direction"] == "both"]
cases = [x for x in cases if "target" in x["gradients"] and x["terms"] == "all"]
with open(sys.argv[1], "wb") as file, simt_backend(Library(trace=file)):
    check_simt(cases[0])
    for shape in ((65, 8), (3, 600)):
        pred, target = make_rows(*shape, dtype=torch.bfloat16)
        seq_loss(pred, target, backend="simt", **TERMS["all"], moment=0.1, variance=0.1)
    # As many rows as a thread of softmax_cols has in one go.
    seq_loss(*make_rows(24, 8), backend="simt", **TERMS["all"], direction="both")
"""


def main() -> int:
    """1 if an error was noticed by none of the layers."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--layers", default=",".join(LAYERS), help="those to run, of %(default)s")
    layers = parser.parse_args().layers.split(",")
    with tempfile.TemporaryDirectory() as folder:
        calls, rows = str(Path(folder) / "calls"), []
        subprocess.run([sys.executable, "-c", _RECORD, calls], cwd=ROOT, check=True)
        for layer in layers:
            if verdict := noticed(ROOT, layer, calls):
                raise RuntimeError(f"{layer} is not green without any error: {verdict}")
        for mutation in MUTATIONS:
            tree = Path(folder) / "tree"
            for name in ("csrc", "tests", "build/simt"):  # what was compiled is taken along, with its times
                copytree(ROOT / name, tree / name, ignore=ignore_patterns("__pycache__"), dirs_exist_ok=True)
            path = tree / "csrc" / "cuda" / mutation.file
            source = path.read_text()
            if mutation.old not in source:
                raise ValueError(f"{mutation.name}: {mutation.file} has no {mutation.old!r}")
            path.write_text(source.replace(mutation.old, mutation.new))
            rows.append((mutation, {layer: noticed(tree, layer, calls) for layer in layers}))
            print(mutation.file, mutation.name, rows[-1][1], sep="; ", flush=True)
            write_atomically(TABLE, table(rows))
    return 0 if all(any(found.values()) for _, found in rows) else 1


def noticed(tree: Path, layer: str, calls: str) -> str:
    """What the layer says of the tree, in a word or two; empty for nothing."""
    done = subprocess.run(
        [sys.executable, "-c", _REPLAY, LAYERS[layer], calls], cwd=tree, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return ""
    if done.returncode != 1:
        raise RuntimeError(f"{layer} did not run: {done.stdout}{done.stderr}")
    signs = {
        "data race": "race",
        "heap-buffer-overflow": "out of bounds",
        "misaligned": "misaligned",
        "divergent": "divergence",
        "does not name": "mask",
        "left something else": "value",
    }
    return next((word for sign, word in signs.items() if sign in done.stdout), "error")


def table(rows: list[tuple[Mutation, dict[str, str]]]) -> str:
    """The document."""
    lines = [
        "# Errors put into the kernels, and who notices",
        "",
        "Made by `make mutations`. Each error is put into a copy of the tree, alone; each layer then runs the same",
        "recorded calls of the CUDA kernels on the CPU: `simt` compares every bit of the results, `simt-asan` looks at",
        "addresses too, `simt-tsan` at races. A dash: the layer noticed nothing; an empty cell: it was not run.",
        "",
        "| file | error | " + " | ".join(LAYERS) + " |",
        "|---|---|" + "---|" * len(LAYERS),
    ]
    for mutation, found in rows:
        cells = " | ".join((found[layer] or "–") if layer in found else "" for layer in LAYERS)
        lines.append(f"| `{mutation.file}` | {mutation.name} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
