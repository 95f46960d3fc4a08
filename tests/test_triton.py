"""The Triton backend on a CUDA device, or without one under ttsem: `make test-triton`.

ttsem runs each launch's compiled IR on the CPU, and fails the test that launched it on an access out of bounds or a
race between programs. Tensors then say that they are on a CUDA device.
"""

import pytest
import torch
from combinations import CHOICES, SINGLE, Tolerances, check, label, sample
from error_rule import TERMS, assert_error_rule, make_rows, relative_error

from amn_kernels import FusedSeqLoss, algorithm, functional
from amn_kernels.options import LossOptions
from amn_kernels.reference import term_outputs
from amn_kernels.triton import why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=f"{why_unavailable()}; see make test-triton")

BACKEND = {"backend": "triton"}
CASES = sample(300, {**CHOICES, "dtype": (torch.float32, torch.bfloat16, torch.float16)}, candidates=300)
IN_CI = 50
"""The first cases, which have every pair of choices already; the others with --full."""

# Softmax weights of bfloat16 keys are rounded to 8 bits, which a gradient of 8 bits doesn't show but its norm does.
BFLOAT16 = Tolerances(3e-6, 4e-3, 4e-3)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if i < IN_CI else pytest.mark.full, id=label(case)) for i, case in enumerate(CASES)],
)
def test_combination(case):
    check(case, "triton", "cuda", BFLOAT16 if case["dtype"] == torch.bfloat16 else None)
