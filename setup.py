"""Build of the compiled extension. Metadata is in pyproject.toml; this file decides only what is compiled.

Environment:
    AMN_CUDA=0|1|auto   CUDA sources: never, required, or when nvcc and a CUDA build of torch are there (default).
                        Decided by the toolchain, never by a GPU being there: a build machine often has none.
    TORCH_CUDA_ARCH_LIST, MAX_JOBS   as in every torch extension.
"""

import os
import platform
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
PYTHON_ABI = "0x030B0000"  # CPython 3.11, the oldest supported: one abi3 binary serves every later one


def wants_cuda() -> bool:
    """Whether to compile csrc/cuda, from AMN_CUDA; raises when it is required and can't be done."""
    choice = os.environ.get("AMN_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise ValueError(f"AMN_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return False
    missing = [
        what
        for what, there in {
            "nvcc (set CUDA_HOME)": CUDA_HOME is not None,
            "a CUDA build of torch": torch.version.cuda is not None,
            "CUDA sources in csrc/cuda": any(ROOT.glob("csrc/cuda/*.cu")),
        }.items()
        if not there
    ]
    if choice == "1" and missing:
        raise RuntimeError(f"AMN_CUDA=1, but this build has no {', no '.join(missing)}")
    return not missing


def extension():
    """The one extension module, amn_kernels._C."""
    cuda = wants_cuda()
    folders = ["csrc", "csrc/cpu"] + (["csrc/cuda"] if cuda else [])
    files = [path for folder in folders for path in sorted((ROOT / folder).iterdir())]
    sources = [path.relative_to(ROOT) for path in files if path.suffix in (".cpp", ".cu")]
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", f"-DPy_LIMITED_API={PYTHON_ABI}"]
    if platform.system() == "Linux":
        # Compiled with OpenMP (at::parallel_for is serial without it) but not linked to it: the symbols then resolve
        # to the OpenMP runtime that torch has loaded, so there is one thread pool and not two fighting for the cores.
        flags.append("-fopenmp")
    return (CUDAExtension if cuda else CppExtension)(
        "amn_kernels._C",
        [str(source) for source in sources],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20"]} if cuda else {"cxx": flags},
        py_limited_api=True,
    )


setup(
    packages=[*find_packages(include=["amn_kernels", "amn_kernels.*"]), "amn_kernels.reference"],
    package_dir={"amn_kernels.reference": "python_ref"},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
