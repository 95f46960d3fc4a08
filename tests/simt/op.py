"""The compiled op over the CUDA primitives, on the CPU: backend "cuda" for CPU tensors, C++ from autograd to kernels.

Everything is the product's: the algorithm, the adapter, the launchers, the kernels. Only the device is the shim, and
the library has a name of its own, "amn_kernels_simt", beside the real one.
"""

import contextlib
import ctypes
import dataclasses
import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from amn_kernels import backends

from . import build

_KEPT: list[torch.library.Library] = []  # registrations, which live as long as the library

SOURCES = ("ops.cpp", "seq_loss.cpp", "autograd.cpp")
"""Of csrc/, compiled under the other name."""


@functools.cache
def load() -> ctypes.CDLL:
    """Build the op, register it as torch.ops.amn_kernels_simt, and return its library."""
    folder = build.BUILD / "op"
    folder.mkdir(parents=True, exist_ok=True)
    includes = [*include_paths(), sysconfig.get_paths()["include"], str(build.ROOT / "csrc"), str(build.KERNELS)]
    flags = ["-std=c++20", "-O0", "-fPIC", "-DAMN_SIMT", f"-I{build.HERE}", *(f"-I{path}" for path in includes)]
    sources = [build.KERNELS / "adapter.cpp", build.HERE / "op.cpp"]
    for name in SOURCES:
        text = (build.ROOT / "csrc" / name).read_text().replace("amn_kernels", "amn_kernels_simt")
        renamed = folder / name
        if not renamed.exists() or renamed.read_text() != text:
            renamed.write_text(text)
        sources.append(renamed)
    newest = max(path.stat().st_mtime for path in [*(build.ROOT / "csrc").glob("**/*.h"), build.HERE / "simt.h"])
    build.library()
    objects = [build.BUILD / "plain" / f"{path.stem}.o" for path in (*build.kernels(), *build.SCHEDULER)]
    for source in sources:
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime <= max(newest, source.stat().st_mtime):
            build._gcc(target, [*flags, "-c", str(source)])
        objects.append(target)
    library = folder / "libamn_kernels_simt.so"
    if not library.exists() or library.stat().st_mtime <= max(path.stat().st_mtime for path in objects):
        (torch_libraries,) = {Path(path) for path in library_paths() if (Path(path) / "libtorch_cpu.so").exists()}
        linked = [f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
        build._gcc(library, ["-shared", *map(str, objects), *linked])
    torch.ops.load_library(str(library))
    _register_products()
    return ctypes.CDLL(str(library))


def _register_products() -> None:
    """The products of 16-bit operands with float32 results, which PyTorch has on CUDA only."""
    products = torch.library.Library("aten", "IMPL")

    def mm(a, b, out_dtype, *, out):
        return out.copy_(a.to(out_dtype) @ b.to(out_dtype))

    def baddbmm(c, a, b, out_dtype, *, beta=1, alpha=1, out):
        return out.copy_(beta * c + alpha * (a.to(out_dtype) @ b.to(out_dtype)))

    def addmm(c, a, b, out_dtype, *, beta=1, alpha=1, out):
        # torch 2.8 and 2.9 refuse it, later ones do not.
        if c.dtype != b.dtype:
            raise RuntimeError(f"self and mat2 must have the same dtype, but got {c.dtype} and {b.dtype}")
        return baddbmm(c, a, b, out_dtype, beta=beta, alpha=alpha, out=out)

    for name, product in {"mm": mm, "bmm": mm, "addmm": addmm, "baddbmm": baddbmm}.items():
        products.impl(f"{name}.dtype_out", product, "CPU")
    _KEPT.append(products)


@contextlib.contextmanager
def cuda_on_cpu() -> Iterator[ctypes.CDLL]:
    """While this is open, backend "cuda" serves CPU tensors."""
    library = load()
    cuda = dataclasses.replace(
        backends.BACKENDS["cuda"], why_unavailable=lambda: None, why_unsupported=lambda call: None
    )
    # The op's Python side finds the other library where it looks for the real one.
    renamed = mock.patch.object(torch.ops, "amn_kernels", torch.ops.amn_kernels_simt)
    with renamed, mock.patch.dict(backends.BACKENDS, cuda=cuda):
        yield library
