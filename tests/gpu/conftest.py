"""What only a CUDA device can show. Without one every test is skipped and says why."""

import sys
from pathlib import Path

import pytest
import torch

from amn_kernels.backends import BACKENDS

ON_DEVICE = [name for name in BACKENDS if name not in ("cpu", "reference")]


def why_no_device() -> str | None:
    """Why there is nothing to test on, or None."""
    if "ttsem.sanitize" in sys.modules:
        return "ttsem has no device"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def pytest_collection_modifyitems(items):
    reason = why_no_device()
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=ON_DEVICE)
def backend(request) -> str:
    """Each backend for CUDA devices that this installation has."""
    if reason := BACKENDS[request.param].why_unavailable():
        pytest.skip(f"{request.param}: {reason}")
    return request.param
