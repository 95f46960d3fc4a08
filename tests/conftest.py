"""Options and fixtures of the whole suite."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
import ttsem_cache

from amn_kernels.backends import BACKENDS

# The same examples every time: a red run can be repeated. No deadline, because CI machines are shared.
hypothesis.settings.register_profile("amn", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("amn")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the full grid of shapes, not only a pairwise selection")
    parser.addoption("--require", default="", help="backends without which nothing is run, as 'cuda triton'")


def pytest_configure(config):
    ttsem_cache.install()
    # Else a machine without a device, or a build without its kernels, would skip what it was to test, and be green.
    for name in config.getoption("--require").split():
        if name not in BACKENDS:
            raise pytest.UsageError(f"--require: there is no backend {name!r}, only {', '.join(BACKENDS)}")
        if reason := BACKENDS[name].why_unavailable():
            raise pytest.UsageError(f"backend {name!r} is required and not available: {reason}")
    config.addinivalue_line("markers", "full: a shape of the full grid, run with --full only")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    full = [item for item in items if item.get_closest_marker("full")]
    if full:
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(autouse=True)
def _no_choice_from_outside(monkeypatch):
    """A backend chosen in the environment of whoever runs the tests must not change what they test."""
    monkeypatch.delenv("AMN_KERNELS_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_threads():
    """Training sets torch's threads for the process; other tests shouldn't notice."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_python():
    """Run a script in a fresh interpreter that can import the helpers of tests/; returns the completed process."""

    def run(script, *arguments, **environment):
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def run_on_isa(request, run_python):
    """Run a script that prints the instruction set, on each that the machine has."""

    def run(script):
        process = run_python(script, AMN_CPU_ISA=request.param)
        if "this machine does not have it" in process.stderr:
            pytest.skip(f"this machine does not have {request.param}")
        assert process.returncode == 0, process.stderr
        assert process.stdout.strip() == request.param

    return run
