"""What setup.py decides from the environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amn_kernels import ops

ROOT = Path(__file__).parent.parent


def setup_py(**environment):
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs in a checkout only")


def test_unknown_choice_of_cuda_is_refused():
    result = setup_py(AMN_CUDA="yes")
    assert result.returncode != 0
    assert "AMN_CUDA must be 0, 1 or auto, got 'yes'" in result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_required_cuda_without_the_means_says_what_is_missing():
    result = setup_py(AMN_CUDA="1")
    assert result.returncode != 0
    assert "AMN_CUDA=1, but this build has no" in result.stderr
    assert "no CUDA build of torch" in result.stderr


def test_a_toolkit_of_another_major_version_is_left_alone(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import torch, torch.utils.cpp_extension as build\n"
        f"torch.version.cuda, build.CUDA_HOME = '12.8', {str(tmp_path)!r}"
    )
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.1, V99.1.0'\n")
    nvcc.chmod(0o755)
    assert setup_py(AMN_CUDA="auto", PYTHONPATH=str(tmp_path)).returncode == 0
    result = setup_py(AMN_CUDA="1", PYTHONPATH=str(tmp_path))
    assert "no nvcc of torch's CUDA 12 (it is of 99)" in result.stderr


@pytest.mark.parametrize("choice", ["0", "auto"])
def test_cpu_build_needs_no_cuda(choice):
    assert setup_py(AMN_CUDA=choice).returncode == 0


def test_unknown_choice_of_the_extension_is_refused():
    result = setup_py(AMN_EXT="maybe")
    assert result.returncode != 0
    assert "AMN_EXT must be 0 or 1, got 'maybe'" in result.stderr


def test_cuda_without_the_extension_is_refused():
    result = setup_py(AMN_EXT="0", AMN_CUDA="1")
    assert result.returncode != 0
    assert "AMN_CUDA=1 requires compiled CUDA kernels, AMN_EXT=0 forbids to compile" in result.stderr


def test_without_the_extension_nothing_of_torch_is_needed(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not there')")
    assert setup_py(AMN_EXT="0", PYTHONPATH=str(tmp_path)).returncode == 0
    assert "torch is not there" in setup_py(AMN_EXT="1", PYTHONPATH=str(tmp_path)).stderr


def test_an_extension_for_another_torch_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "ops.py"))
    ops._check_build()  # nothing said of the torch it is for
    (tmp_path / "_C.torch").write_text("2.7\nthis build has no nvcc")
    with pytest.raises(ImportError, match=r"compiled for torch 2\.7, this is torch 2\."):
        ops._check_build()
    assert ops._built() == ("2.7", "this build has no nvcc")


def test_what_the_build_lacked_for_cuda_is_told(monkeypatch):
    monkeypatch.setattr(ops, "_C", object())
    monkeypatch.setattr(ops, "_HAS_CUDA", False)
    monkeypatch.setattr(ops, "_WITHOUT_CUDA", "this build has no nvcc (set CUDA_HOME)")
    assert ops.why_no_cuda() == (
        "the extension was built without CUDA sources (this build has no nvcc (set CUDA_HOME))"
    )
