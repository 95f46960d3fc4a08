"""Generated cases: what the loss computes, what it refuses, and files with corrupted bytes.

A few hundred are in the test suite, 10,000 by `make fuzz`. Hypothesis draws and shrinks them; what it prints of a
failure can be given to the check of its kind.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fuzz import arguments, cases, files, loss

KINDS: dict[str, tuple[SearchStrategy[tuple], Callable]] = {
    "loss": (st.tuples(cases.cases()), loss.check),
    "options": (arguments.options, arguments.check_option),
    "tensors": (arguments.tensors, arguments.check_tensor),
    "queue": (arguments.queues, arguments.check_queue),
    "npz": (files.damaged_npz, files.check_damaged_npz),
    "npz claims": (files.claims, files.check_claim),
    "checkpoint": (files.damaged_checkpoint, files.check_damaged_checkpoint),
    "run": (files.damaged_run, files.check_damaged_run),
}
"""The arguments that are drawn, and the check they are for."""


def run(kind: str, count: int, seed: int = 0) -> None:
    """Draws and checks so many cases; raises what fails, shrunk."""
    drawn, check = KINDS[kind]

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=False,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @hypothesis.given(drawn)
    def fuzz(case):
        check(*case)

    with tempfile.TemporaryDirectory() as folder:
        files.FOLDER = Path(folder)
        fuzz()
