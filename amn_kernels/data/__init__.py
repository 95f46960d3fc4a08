"""Bundled and users' vectors as windows for next-vector prediction."""

from amn_kernels.data.packed import load_bundled, pack_vectors
from amn_kernels.data.windows import IndexedWindows, Split, StoredWindows, Windows, load_windows, split_windows

__all__ = [
    "IndexedWindows",
    "Split",
    "StoredWindows",
    "Windows",
    "load_bundled",
    "load_windows",
    "pack_vectors",
    "split_windows",
]
