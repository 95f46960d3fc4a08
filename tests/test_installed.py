"""What an installed package must have; `make test-install` runs this outside the checkout."""

from importlib import metadata, resources

import torch

import amn_kernels
from amn_kernels import FusedSeqLoss, backends, reference


def test_compiled_op_is_there_and_agrees_with_the_reference():
    pred, target = torch.randn(40, 12, dtype=torch.float64), torch.randn(40, 12, dtype=torch.float64)
    fused = FusedSeqLoss(mse=1.0, cosine=0.5, infonce=0.2, backend="cpu")(pred, target)
    plain = FusedSeqLoss(mse=1.0, cosine=0.5, infonce=0.2, backend="reference")(pred, target)
    torch.testing.assert_close(fused, plain)


def test_reference_is_part_of_the_package():
    assert reference.__name__ == "amn_kernels.reference"
    assert backends.BACKENDS["reference"].why_unavailable() is None


def test_bundled_vectors_and_type_marker_are_in_the_wheel():
    files = resources.files(amn_kernels)
    assert (files / "py.typed").is_file()
    assert len([f for f in (files / "data").iterdir() if f.name.endswith(".npz")]) == 2


def test_version_is_the_one_of_the_metadata():
    assert amn_kernels.__version__ == metadata.version("amn-kernels")
