"""Build of the compiled extension. Metadata is in pyproject.toml; this file decides only what is compiled.

Environment:
    AMN_EXT=0|1         0: nothing is compiled, and the wheel is for any platform: Triton and plain PyTorch serve it.
                        Never chosen by itself: where compiling fails the build fails, and says so. Not with AMN_CUDA=1.
    AMN_CUDA=0|1|auto   CUDA sources: never, required, or when nvcc and a CUDA build of torch of one major version are
                        there (default).
                        Decided by the toolchain, never by a GPU being there: a build machine often has none.
    TORCH_CUDA_ARCH_LIST, MAX_JOBS   as in every torch extension.
"""

import os
import platform
import re
import subprocess
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PYTHON_ABI = "0x030B0000"  # CPython 3.11, the oldest supported: one abi3 binary serves every later one


def wants_extension() -> bool:
    """Whether to compile at all, from AMN_EXT."""
    choice = os.environ.get("AMN_EXT", "1")
    if choice not in ("0", "1"):
        raise ValueError(f"AMN_EXT must be 0 or 1, got {choice!r}")
    if choice == "0" and os.environ.get("AMN_CUDA") == "1":
        raise ValueError("AMN_CUDA=1 requires compiled CUDA kernels, AMN_EXT=0 forbids to compile: unset one of them")
    return choice == "1"


def cuda_major(nvcc: Path) -> str | None:
    """Major version of the CUDA toolkit that `nvcc` is of, or None if it does not run."""
    try:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    release = re.search(r"release (\d+)\.", told)
    return release.group(1) if release else None


def why_no_cuda() -> str | None:
    """Why csrc/cuda is not compiled, None if it is, from AMN_CUDA; raises when it is required and can't be done."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, include_paths

    choice = os.environ.get("AMN_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise ValueError(f"AMN_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return "AMN_CUDA=0"
    nvcc = None if CUDA_HOME is None else cuda_major(Path(CUDA_HOME) / "bin" / "nvcc")
    of_torch = None if torch.version.cuda is None else torch.version.cuda.split(".")[0]
    missing = [
        what
        for what, there in {
            "nvcc (set CUDA_HOME)": nvcc is not None,
            "cuda_runtime.h beside nvcc (set CUDA_HOME)": nvcc is None
            or any((Path(path) / "cuda_runtime.h").exists() for path in include_paths("cuda")),
            "CUDA build of torch": of_torch is not None,
            f"nvcc of torch's CUDA {of_torch} (it is of {nvcc})": None in (nvcc, of_torch) or nvcc == of_torch,
            "CUDA sources in csrc/cuda": any(ROOT.glob("csrc/cuda/*.cu")),
        }.items()
        if not there
    ]
    reason = f"this build has no {', no '.join(missing)}" if missing else None
    if choice == "1" and reason:
        raise RuntimeError(f"AMN_CUDA=1, but {reason}")
    return reason


def compiled() -> dict:
    """Arguments of `setup` for the one extension module, amn_kernels._C."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                raise RuntimeError(
                    "amn_kernels._C did not compile, see above. With AMN_EXT=0 in the environment the package is "
                    "installed without compiled code: slower on the CPU, the same results"
                ) from error

        def build_extension(self, ext):
            super().build_extension(ext)
            # Read before the extension is loaded beside another torch (amn_kernels/ops.py).
            minor = ".".join(torch.__version__.split(".")[:2])
            told = minor if without_cuda is None else f"{minor}\n{without_cuda}"
            Path(self.get_ext_fullpath(ext.name)).with_name("_C.torch").write_text(told)

        def copy_extensions_to_source(self):
            # Of an editable installation, where the extension is used from the source tree.
            super().copy_extensions_to_source()
            for ext in self.extensions:
                built = Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))
                in_source = Path(self.get_ext_fullpath(ext.name))
                self.copy_file(built.with_name("_C.torch"), in_source.with_name("_C.torch"))

    without_cuda = why_no_cuda()
    cuda = without_cuda is None
    folders = ["csrc", "csrc/cpu"] + (["csrc/cuda"] if cuda else [])
    files = [path for folder in folders for path in sorted((ROOT / folder).iterdir())]
    sources = [path.relative_to(ROOT) for path in files if path.suffix in (".cpp", ".cu")]
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", f"-DPy_LIMITED_API={PYTHON_ABI}"]
    if platform.system() == "Linux":
        # Compiled with OpenMP (at::parallel_for is serial without it) but not linked to it: the symbols then resolve
        # to the OpenMP runtime that torch has loaded, so there is one thread pool and not two fighting for the cores.
        flags.append("-fopenmp")
    extension = (CUDAExtension if cuda else CppExtension)(
        "amn_kernels._C",
        [str(source) for source in sources],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("AMN_CUDA", None)] if cuda else [],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20"]} if cuda else {"cxx": flags},
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(
    packages=[*find_packages(include=["amn_kernels", "amn_kernels.*"]), "amn_kernels.reference"],
    package_dir={"amn_kernels.reference": "python_ref"},
    **(compiled() if wants_extension() else {}),
)
