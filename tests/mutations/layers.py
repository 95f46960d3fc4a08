"""The layers: each runs on a copy of the tree and says in a word what it noticed."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .mutation import Mutation

CALLS = Path("build") / "calls"
"""The recorded calls of the CUDA kernels, in the copy."""

_WORDS = {
    # The SIMT shim and the sanitizers.
    "data race": "race",
    "heap-buffer-overflow": "out of bounds",
    "misaligned": "misaligned",
    "divergent": "divergence",
    "does not name": "mask",
    "left something else": "value",
    "DEADLYSIGNAL": "crash",
    "the program ended with -": "crash",
    # ttsem.
    "of the tensor passed as": "out of bounds",
    "Program instances run in any order": "race",
    "two lanes of one store wrote": "race",
    # The compiled kernels.
    "spills": "spill",
    "no 128-bit load": "narrow loads",
    "without tensor cores": "no tensor cores",
    "occupancy": "occupancy",
    # pytest.
    "AssertionError": "value",
    "assert ": "value",
}
"""By what a layer prints; the first that occurs counts."""


def _run(tree: Path, *module: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree / "tests"),
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "2",  # so that rows are split over threads
        "MAX_JOBS": "2",
    }
    command = [sys.executable, *module]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=1800)


def _verdict(done: subprocess.CompletedProcess[str]) -> str:
    """A word for exit status 1, nothing for 0; anything else is no verdict."""
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{done.args} did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    if done.returncode == 0:
        return ""
    return next((word for sign, word in _WORDS.items() if sign in done.stdout), "error")


def record(tree: Path) -> None:
    """Record the calls that the shim runs again."""
    (tree / CALLS).parent.mkdir(exist_ok=True)
    _verdict(_run(tree, "-m", "tests.mutations.recorded", str(CALLS)))


def _simt(build: str) -> Callable[[Path, Sequence[Mutation]], str]:
    return lambda tree, mutations: _verdict(_run(tree, "-m", "tests.mutations.recorded", str(CALLS), build))


def _kernels_check(tree: Path, mutations: Sequence[Mutation]) -> str:
    names = sorted({name for mutation in mutations for name in mutation.compiled})
    return _verdict(_run(tree, "-m", "tests.mutations.compiled", *names))


def _pytest(tree: Path, tests: set[str], *runner: str) -> str:
    paths = [f"tests/{test}" for test in sorted(tests)]
    done = _run(tree, "-m", *runner, "-x", "-q", "--tb=line", "-p", "no:cacheprovider", *paths)
    if " skipped" in done.stdout.splitlines()[-1]:
        raise RuntimeError(f"a test was skipped:\n{done.stdout[-3000:]}")
    return _verdict(done)


def _cpu_tests(tree: Path, mutations: Sequence[Mutation]) -> str:
    if any(mutation.file.endswith((".cpp", ".h", ".inl")) for mutation in mutations):
        done = _run(tree, "setup.py", "-q", "build_ext", "--inplace", "--force")
        if done.returncode:
            raise RuntimeError(f"the extension did not compile:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return _pytest(tree, {test for mutation in mutations for test in mutation.tests}, "pytest")


def _ttsem(tree: Path, mutations: Sequence[Mutation]) -> str:
    tests = {test for mutation in mutations for test in mutation.ttsem}
    return _pytest(tree, tests, "ttsem.sanitize", "pytest")


LAYERS: dict[str, Callable[[Path, Sequence[Mutation]], str]] = {
    "simt": _simt("PLAIN"),
    "simt-asan": _simt("ASAN"),
    "simt-tsan": _simt("TSAN"),
    "ttsem": _ttsem,
    "cpu tests": _cpu_tests,
    "kernels-check": _kernels_check,
}
"""What each says of a copy and of errors that are in it; of those that are not yet, to see that it says nothing."""
