"""`python -m tests.mutations.recorded FILE [BUILD]`: records calls of the CUDA kernels, or runs them again in a build.

They were right when they were recorded: tests/simt/test_kernels.py compares the same kernels with the definition.
"""

import sys

import torch
from combinations import sample
from error_rule import TERMS, make_rows, seq_loss

from ..simt.backend import check_simt, simt_backend
from ..simt.build import Build, program, run
from ..simt.primitives import SimtPrimitives
from ..simt.trace import Library


def record(path: str) -> None:
    """Few and small, so that ThreadSanitizer is done with them in a minute."""
    cases = [x for x in sample(100) if x["shape"][0] * x["shape"][1] <= 24 and x["direction"] == "both"]
    cases = [x for x in cases if "target" in x["gradients"] and x["terms"] == "all"]
    with open(path, "wb") as file:
        library = Library(trace=file)
        with simt_backend(library):
            check_simt(cases[0])
            for shape in ((65, 8), (3, 600)):
                pred, target = make_rows(*shape, dtype=torch.bfloat16)
                seq_loss(pred, target, backend="simt", **TERMS["all"], moment=0.1, variance=0.1)
            # As many rows as a thread of softmax_cols has in one go.
            seq_loss(*make_rows(24, 8), backend="simt", **TERMS["all"], direction="both")
            # Two blocks of keys, which merge; masked rows.
            extra, mask = make_rows(5, 8, seed=1)[0], torch.arange(24) % 5 != 0
            seq_loss(*make_rows(24, 8), backend="simt", **TERMS["all"], extra_negatives=extra, mask=mask)
        _spike(SimtPrimitives(library))


def _spike(primitives: SimtPrimitives) -> None:
    """The step of balanced weights that cuts an outlier."""
    state = {
        "mean": torch.tensor([0.5, 0.5]), "updates": torch.tensor([20, 20]), "calls": torch.tensor(20),
        "skipped": torch.zeros(2, dtype=torch.int64), "lambdas": torch.ones(2, dtype=torch.float64),
        "most": torch.full((2,), 1e6),
    }  # fmt: skip
    values, gram = torch.ones(2), torch.diag(torch.tensor([1.0, 1e4]))
    primitives.balance(values, gram, state, (0, 0.9, 1, False, True), torch.empty(2), torch.empty(()))


def replay(path: str, build: Build) -> int:
    """Exit status of the calls run again, in another order of threads."""
    done = run(program("replay", build), path, "2", timeout=900)
    print(done.stderr, f"the program ended with {done.returncode}")
    return 1 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(replay(sys.argv[1], Build[sys.argv[2]]) if len(sys.argv) > 2 else record(sys.argv[1]))
