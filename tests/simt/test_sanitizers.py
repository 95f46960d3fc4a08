"""The CUDA kernels under the sanitizers: recorded calls run again in programs of their own, in other orders of threads
and blocks, every tensor in an allocation of its own; nothing is found, and the results are the same bit for bit."""

import pytest
import torch
from combinations import sample
from error_rule import TERMS, make_rows, seq_loss

from .backend import check_simt, simt_backend
from .build import Build, program, run
from .trace import Library

MOST_ROWS = 24
"""So that ThreadSanitizer, which keeps a clock per thread and thread, is done in a minute."""

CASES = [case for case in sample(100) if case["shape"][0] * case["shape"][1] <= MOST_ROWS]
COUNTS = {Build.PLAIN: 12, Build.ASAN: 12, Build.TSAN: 6}
SHAPES = {
    Build.PLAIN: ((1, 1), (31, 7), (33, 64), (9, 1000), (3, 4101)),
    Build.ASAN: ((1, 1), (31, 7), (33, 64), (9, 1000), (3, 4101)),
    # Several blocks, of small teams; teams of several warps.
    Build.TSAN: ((65, 8), (3, 600)),
}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A function that gives the file of the calls that `compute` makes of the kernels."""

    def record(compute):
        path = tmp_path_factory.mktemp("simt") / "calls"
        with path.open("wb") as file, simt_backend(Library(trace=file)):
            compute()
        return path

    return record


def replay(build, path):
    done = run(program("replay", build), str(path), "2")
    assert done.returncode == 0, done.stderr[:6000]
    assert int(done.stdout.split()[0]) > 0


BUILDS = [
    pytest.param(Build.PLAIN, id="plain"),
    pytest.param(Build.ASAN, id="asan", marks=pytest.mark.asan),
    pytest.param(Build.TSAN, id="tsan", marks=pytest.mark.tsan),
]


@pytest.mark.parametrize("build", BUILDS)
def test_combinations(build, record):
    def compute():
        for case in CASES[: COUNTS[build]]:
            check_simt(case)

    replay(build, record(compute))


@pytest.mark.parametrize("build", BUILDS)
def test_shapes(build, record):
    def compute():
        for shape in SHAPES[build]:
            seq_loss(*make_rows(*shape, dtype=torch.bfloat16), backend="simt", **TERMS["all"], moment=0.1, variance=0.1)

    replay(build, record(compute))
