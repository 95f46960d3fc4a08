"""Calls of launchers: from Python into the library, and into a file that replay.cpp runs again under the sanitizers.

The file is a sequence of calls, numbers being unsigned 64-bit and bytes a number and so many bytes:

    name of the launcher as bytes
    pieces of memory: their number; each the last four bits of its address, what it held before the call and after it
    arguments: their number; each its bytes, and the pointers in it: their number; each its place in the argument, the
      index of the piece and the place in the piece
"""

import ctypes
import struct
from typing import BinaryIO, NamedTuple

from torch import Tensor

from .build import Build, library


class Argument(NamedTuple):
    """A value as launchers.h has it, and the tensors that it points to."""

    value: ctypes.Structure | ctypes._SimpleCData
    tensors: tuple[Tensor, ...] = ()


class Library:
    """The launchers, run by the shim; recorded in `trace` where that is a file."""

    def __init__(self, seed: int = 1, trace: BinaryIO | None = None, build: Build = Build.PLAIN):
        self._library = ctypes.CDLL(str(library(build)))
        self._library.simt_call.restype = ctypes.c_char_p
        self._library.simt_seed(ctypes.c_uint64(seed))
        self._trace = trace

    def call(self, name: str, *arguments: Argument) -> None:
        """Run a launcher; RuntimeError with what the shim says."""
        pieces = _pieces([tensor for argument in arguments for tensor in argument.tensors])
        before = [ctypes.string_at(begin, end - begin) for begin, end in pieces] if self._trace else []
        values = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument.value) for argument in arguments))
        sizes = (ctypes.c_size_t * len(arguments))(*(ctypes.sizeof(argument.value) for argument in arguments))
        failure = self._library.simt_call(name.encode(), values, sizes, ctypes.c_size_t(len(arguments)))
        if failure is not None:
            raise RuntimeError(f"{name}: {failure.decode()}")
        if self._trace is not None:
            self._record(name, arguments, pieces, before)

    def col_stats_scratch(self, rows: int, dim: int) -> int:
        """Numbers of scratch memory that col_stats needs."""
        return self._size("simt_col_stats_scratch", rows, dim)

    def term_sums_scratch(self, rows: int) -> int:
        """Numbers of scratch memory that term_sums needs."""
        return self._size("simt_term_sums_scratch", rows)

    def _size(self, name: str, *sizes: int) -> int:
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64
        return function(*map(ctypes.c_int64, sizes))

    def _record(self, name, arguments, pieces, before) -> None:
        out = [_bytes(name.encode()), _number(len(pieces))]
        for (begin, end), old in zip(pieces, before, strict=True):
            out += [_number(begin % 16), _bytes(old), _bytes(ctypes.string_at(begin, end - begin))]
        out.append(_number(len(arguments)))
        for argument in arguments:
            value = argument.value
            pointers = list(_pointers(value, 0))
            out += [_bytes(ctypes.string_at(ctypes.addressof(value), ctypes.sizeof(value))), _number(len(pointers))]
            for place, address in pointers:
                (index,) = (i for i, (begin, end) in enumerate(pieces) if begin <= address < end)
                out += [_number(place), _number(index), _number(address - pieces[index][0])]
        self._trace.write(b"".join(out))


def _pieces(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """First and last address of the memory of the tensors; those that overlap are one piece."""
    spans = []
    for tensor in tensors:
        if tensor.numel() > 0:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize))
    pieces: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if pieces and begin < pieces[-1][1]:
            pieces[-1] = (pieces[-1][0], max(end, pieces[-1][1]))
        else:
            pieces.append((begin, end))
    return pieces


def _pointers(value, place):
    """Places and values of the pointers in a structure that are not null."""
    if isinstance(value, ctypes.c_void_p) and value.value:
        yield place, value.value
    for name, kind in getattr(value, "_fields_", ()):
        field = getattr(type(value), name)
        if kind is ctypes.c_void_p:
            if getattr(value, name):
                yield place + field.offset, getattr(value, name)
        elif issubclass(kind, ctypes.Structure):
            yield from _pointers(getattr(value, name), place + field.offset)


def _number(x: int) -> bytes:
    return struct.pack("<Q", x)


def _bytes(x: bytes) -> bytes:
    return _number(len(x)) + x
