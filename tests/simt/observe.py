"""What the launchers launch: kernel by kernel with its parameters, and the bytes that each loads and stores."""

import ctypes
import re
from ctypes import POINTER, c_char_p, c_int64, c_size_t, c_uint, c_void_p
from typing import NamedTuple

from torch import Tensor

from .build import Build
from .trace import Argument, Library


class Launch(NamedTuple):
    """One launch of a kernel."""

    instance: str
    """Mangled: the kernel with its template arguments, inside of simt::Instance."""
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: list[bytes]
    arguments: tuple[Argument, ...]
    """Of the launcher that launched it."""

    @property
    def kernel(self) -> str:
        """The name alone, as row_stats_kernel."""
        return re.search(r"_GLOBAL__N_1\d+([a-z]\w*?_kernel)", self.instance)[1]


class ObservingLibrary(Library):
    """Keeps every launch."""

    def __init__(self, build: Build = Build.PLAIN):
        super().__init__(build=build)
        self.launches: list[Launch] = []
        self._arguments: tuple[Argument, ...] = ()

    def call(self, name: str, *arguments: Argument) -> None:
        self._arguments = arguments
        # Only for the call: others use the same library, and this function ends with us.
        see = _OBSERVER(lambda launch: self._observe(launch.contents))
        self._library.simt_observe(see)
        try:
            super().call(name, *arguments)
        finally:
            self._library.simt_observe(None)

    def _observe(self, launch: "_Observed") -> None:
        parameters = [ctypes.string_at(launch.parameters[i], launch.sizes[i]) for i in range(launch.count)]
        grid, block = ((x.x, x.y, x.z) for x in (launch.grid, launch.block))
        self.launches.append(Launch(launch.instance.decode(), grid, block, parameters, self._arguments))


class Bytes(NamedTuple):
    """Of one tensor in one launch."""

    accessed: int
    """By all threads together, each access anew."""
    of_blocks: int
    """Distinct ones of every block, summed over blocks: what is moved if a block finds again what it has touched."""
    distinct: int


class Traffic(NamedTuple):
    """Of one tensor, or memory that tensors share, in one launch."""

    tensor: Tensor
    argument: Argument
    read: Bytes
    written: Bytes


class CountingLibrary(ObservingLibrary):
    """Counts the bytes of the tensors that a launcher is given, for each of its launches."""

    def __init__(self):
        super().__init__(Build.COUNT)
        self.traffic: list[list[Traffic]] = []
        """Beside `launches`."""
        self._watched: list[tuple[Tensor, Argument]] = []

    def call(self, name: str, *arguments: Argument) -> None:
        self._watched = [(tensor, argument) for argument in arguments for tensor in argument.tensors if tensor.numel()]
        ends = []
        for tensor, _ in self._watched:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            ends += [tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize]
        self._library.simt_watch((c_size_t * len(ends))(*ends), c_size_t(len(self._watched)))
        before = len(self.launches)
        super().call(name, *arguments)
        if len(self.launches) > before:
            self._take()
        self._library.simt_watch(None, c_size_t(0))  # the memory may be somebody else's from now on

    def _observe(self, launch: "_Observed") -> None:
        if len(self.traffic) < len(self.launches):
            self._take()
        super()._observe(launch)

    def _take(self) -> None:
        """The counts of the last launch, from when on they are those of the next one."""
        out = (c_int64 * (6 * len(self._watched)))()
        self._library.simt_take_counts(out)
        counts = [(Bytes(*out[6 * i : 6 * i + 3]), Bytes(*out[6 * i + 3 : 6 * i + 6])) for i in range(len(out) // 6)]
        self.traffic.append(
            [Traffic(*watched, *count) for watched, count in zip(self._watched, counts, strict=True)],
        )


class _Dim(ctypes.Structure):
    _fields_ = tuple((name, c_uint) for name in "xyz")


class _Observed(ctypes.Structure):
    _fields_ = (
        ("instance", c_char_p),
        ("grid", _Dim),
        ("block", _Dim),
        ("count", c_size_t),
        ("parameters", POINTER(c_void_p)),
        ("sizes", POINTER(c_size_t)),
    )


_OBSERVER = ctypes.CFUNCTYPE(None, POINTER(_Observed))
