"""Reading and checking users' NPZ files: every error names the file, the key and, where there is one, the row."""

import math
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

# A shorter vector counts as zero, as in the loss: its cosine isn't defined.
MIN_NORM = 1e-8
CHECK_BYTES = 64 << 20
# Of a zip's local file header (APPNOTE 4.3.7): fixed part, and where in it the lengths of name and extra field stand.
LOCAL_HEADER_BYTES = 30
LOCAL_HEADER_LENGTHS = 26
# Random float32 vectors shrink by a tenth, those of whole numbers perhaps tenfold; article numbers a hundredfold and
# more, but those are few.
MOST_EXPANSION = 100
EXPANDS_FREELY = 256 << 20

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def npz_keys(path: Path | str) -> set[str]:
    """Names of the arrays in an NPZ file. FileNotFoundError if there is none, ValueError if it isn't a whole zip."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    except Exception as error:
        raise ValueError(f"{path}: not an NPZ file, or cut short ({_reason(error)})") from error


def open_npz(path: Path | str, keys: Iterable[str]) -> dict[str, np.ndarray]:
    """The named arrays of an NPZ file; members stored without compression are memory-mapped, others read.

    Each member's checksum is verified first, which reads the file once. A member that is read into memory has at most
    `MOST_EXPANSION` times the bytes that it has in the file, or `EXPANDS_FREELY`. Nothing in a file is executed:
    pickled objects are refused. Raises ValueError for a damaged file or a missing key, FileNotFoundError if there is no
    file.
    """
    present = npz_keys(path)
    arrays = {}
    for key in keys:
        if key not in present:
            raise ValueError(f"{path}: key {key!r} is missing, the file has {sorted(present)}")
        try:
            arrays[key] = _read_member(Path(path), f"{key}.npy")
        # Whatever zipfile, zlib and numpy's parser of headers raise for bytes that are not what they expect: more
        # than a dozen types.
        except Exception as error:
            raise ValueError(f"{path}: key {key!r} can't be read ({_reason(error)})") from error
    return arrays


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _read_member(path: Path, member: str) -> np.ndarray:
    """One array of a zip: mapped where its bytes lie in the file as they are, else read into memory."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"compression method {info.compress_type} isn't supported, only stored and deflated")
        if info.file_size > max(EXPANDS_FREELY, MOST_EXPANSION * info.compress_size):
            raise ValueError(
                f"{info.compress_size:,} bytes would expand to {info.file_size:,}: no compression of vectors does that"
            )
        if info.compress_type == zipfile.ZIP_DEFLATED:
            with archive.open(info) as stream:
                _read_header(stream, info.file_size)
            with archive.open(info) as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)
        # The checksum is compared when the end is reached; mapping alone would never look at it.
        with archive.open(info) as stream:
            while stream.read(1 << 20):
                pass
    with open(path, "rb") as file:
        file.seek(info.header_offset + LOCAL_HEADER_LENGTHS)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
        file.seek(info.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes)
        start = file.tell()
        shape, fortran_order, dtype = _read_header(file, info.file_size)
        if 0 in shape:
            file.seek(start)
            return np.lib.format.read_array(file, allow_pickle=False)
        order = "F" if fortran_order else "C"
        return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order=order)


def _read_header(stream: BinaryIO, size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype that an NPY member of so many bytes declares; ValueError unless it has those bytes."""
    start = stream.tell()
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"NPY format version {version} isn't supported")
    shape, fortran_order, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are not loaded")
    found = size - (stream.tell() - start)
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != found:
        raise ValueError(f"its header promises {dtype} {list(shape)}, it has {found:,} bytes")
    return shape, fortran_order, dtype


def check_array(path: Path | str, key: str, array: np.ndarray, rank: int) -> np.ndarray:
    """Returns `array` if it is floating, of that rank, not empty, and every vector finite and not zero in float32.

    array: [N, D] for rank 2, [N, T, D] for rank 3. Reads it in pieces of 64 MiB. Raises ValueError naming the first
    bad row.
    """
    form = {2: "[N, D]", 3: "[N, T, D]"}[rank]
    if array.ndim != rank or 0 in array.shape:
        raise ValueError(f"{path}: key {key!r} must be a non-empty {form} array, got shape {list(array.shape)}")
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path}: key {key!r} must be floating point, got {array.dtype}")
    rows = max(1, CHECK_BYTES // max(1, array[0].size * 4))
    for start in range(0, len(array), rows):
        # Rows of contexts count as bad if any of their T vectors is.
        with np.errstate(over="ignore", invalid="ignore"):
            chunk = np.asarray(array[start : start + rows], dtype=np.float32)
            norms = np.linalg.norm(chunk, axis=-1).reshape(len(chunk), -1)
        bad = ~np.isfinite(norms).all(axis=1)
        if bad.any():
            raise ValueError(f"{path}: key {key!r}, row {start + int(bad.argmax())}: NaN or infinite in float32")
        zero = (norms < MIN_NORM).any(axis=1)
        if zero.any():
            raise ValueError(f"{path}: key {key!r}, row {start + int(zero.argmax())}: zero vector, it has no cosine")
    return array


def check_articles(path: Path | str, article: np.ndarray, rows: int) -> np.ndarray:
    """Returns `article` as int64 [N] if it is one integer for each of the `rows` rows, else raises ValueError."""
    if article.shape != (rows,):
        raise ValueError(f"{path}: key 'article' must be [{rows}], one for each row, got shape {list(article.shape)}")
    if not np.issubdtype(article.dtype, np.integer):
        raise ValueError(f"{path}: key 'article' must be integers, got {article.dtype}")
    return np.asarray(article, dtype=np.int64)
