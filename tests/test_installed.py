"""What an installed package must have; `make wheels` runs this outside the checkout.

With AMN_EXT=0 in the environment, as it is for a build without compiled code: what holds there.
"""

import os
import re
import subprocess
import sys
from importlib import metadata, resources

import pytest
import torch

import amn_kernels
from amn_kernels import FusedSeqLoss, backends, cli, ops, reference

COMPILED = os.environ.get("AMN_EXT", "1") == "1"
TERMS = {"mse": 1.0, "cosine": 0.5, "infonce": 0.2}


@pytest.mark.skipif(not COMPILED, reason="installed without compiled code")
def test_compiled_op_is_there_and_agrees_with_the_reference():
    pred, target = torch.randn(40, 12, dtype=torch.float64), torch.randn(40, 12, dtype=torch.float64)
    fused = FusedSeqLoss(**TERMS, backend="cpu")(pred, target)
    plain = FusedSeqLoss(**TERMS, backend="reference")(pred, target)
    torch.testing.assert_close(fused, plain)


@pytest.mark.skipif(not COMPILED, reason="installed without compiled code")
def test_compiled_code_says_which_torch_it_is_for():
    """Installed or in a checkout: beside another one it is not loaded."""
    told = resources.files(amn_kernels) / "_C.torch"
    version, *why_no_cuda = told.read_text().splitlines()
    assert version == ".".join(torch.__version__.split(".")[:2])
    assert (why_no_cuda == []) == ops.has_cuda()


@pytest.mark.skipif(COMPILED, reason="installed with compiled code")
def test_without_compiled_code_it_explains_itself_and_serves():
    reason = ops.why_unavailable()
    assert "AMN_EXT=0" in reason or "compiled for torch" in reason
    assert reason in backends.info()
    with pytest.raises(ValueError, match="backend='cpu' is not available"):
        FusedSeqLoss(backend="cpu")
    pred, target = torch.randn(40, 12, requires_grad=True), torch.randn(40, 12)
    criterion = FusedSeqLoss(**TERMS)
    for _ in range(2):
        criterion(pred, target).backward()
    assert pred.grad.norm() > 0
    assert criterion.weighting.updates.tolist() == [2, 2, 2]


def test_reference_is_part_of_the_package():
    assert reference.__name__ == "amn_kernels.reference"
    assert backends.BACKENDS["reference"].why_unavailable() is None


def test_bundled_vectors_and_type_marker_are_in_the_wheel():
    files = resources.files(amn_kernels)
    assert (files / "py.typed").is_file()
    assert len([f for f in (files / "data").iterdir() if f.name.endswith(".npz")]) == 2


def test_version_is_the_one_of_the_metadata():
    assert amn_kernels.__version__ == metadata.version("amn-kernels")


def test_the_command_line_asks_for_what_its_extra_installs():
    extra = [x for x in metadata.requires("amn-kernels") if re.search(r"extra == ['\"]train['\"]", x)]
    assert sorted(re.match(r"[\w.-]+", x).group() for x in extra) == sorted(cli.TRAIN_EXTRA)


def test_import_loads_little_beyond_torch():
    """Modules are counted, not milliseconds: nothing of the extras, and nothing of torch that it leaves until asked."""
    script = "import sys, torch; before = set(sys.modules); import amn_kernels; print(*set(sys.modules) - before)"
    more = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    own = [name for name in more if name.startswith("amn_kernels")]
    heavy = {name.partition(".")[0] for name in more} & {
        "accelerate", "datasets", "jinja2", "lightning", "matplotlib", "pandas", "rich", "safetensors", "scipy",
        "sentence_transformers", "sympy", "tokenizers", "transformers", "triton", "tyro",
    }  # fmt: skip
    assert not heavy
    assert "amn_kernels.distributed" not in own
    assert not [name for name in own if name.startswith("amn_kernels.train")]
    assert len(own) <= 30
    assert len(more) - len(own) <= 10, sorted(set(more) - set(own))
