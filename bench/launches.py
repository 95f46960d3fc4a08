"""The Triton launches of a step without a GPU: each kernel is compiled for an architecture, and nothing runs.

The wrappers run themselves, on CPU or meta tensors, so what is seen is what a GPU would get: kernels, specialisation,
constants, warps and order.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """One launch: the compiled kernel, and the arguments by name."""

    kernel: Any  # triton.compiler.CompiledKernel
    arguments: dict[str, Any]
    programs: int


@contextlib.contextmanager
def compiling(arch: int, see: Callable[[Launch], None]) -> Iterator[None]:
    """Launches compile for compute capability ``arch`` (90 for sm_90), are shown to ``see``, and do nothing."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, before = JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        named = dict(zip(self.arg_names, args, strict=False))
        named |= {name: x for name, x in kwargs.items() if name in self.arg_names}
        see(Launch(kernel, named, math.prod(grid)))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Compiler(arch))
    try:
        yield
    finally:
        JITFunction.run = run
        driver.set_active(before)


class _Compiler:
    """What Triton asks of a driver up to the launch."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled per device

    def get_current_stream(self, device) -> int:
        return 0
