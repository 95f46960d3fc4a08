"""Reading and checking users' NPZ files: every error names the file, the key and, where there is one, the row."""

import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

# A shorter vector counts as zero, as in the loss: its cosine isn't defined.
MIN_NORM = 1e-8
CHECK_BYTES = 64 << 20
# Of a zip's local file header (APPNOTE 4.3.7): fixed part, and where in it the lengths of name and extra field stand.
LOCAL_HEADER_BYTES = 30
LOCAL_HEADER_LENGTHS = 26


def npz_keys(path: Path | str) -> set[str]:
    """Names of the arrays in an NPZ file. FileNotFoundError if there is none, ValueError if it isn't a whole zip."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{path}: not an NPZ file, or cut short ({error})") from error


def open_npz(path: Path | str, keys: Iterable[str]) -> dict[str, np.ndarray]:
    """The named arrays of an NPZ file; members stored without compression are memory-mapped, others read.

    Each member's checksum is verified first, which reads the file once. Raises ValueError for a damaged file or a
    missing key, FileNotFoundError if there is no file.
    """
    present = npz_keys(path)
    arrays = {}
    for key in keys:
        if key not in present:
            raise ValueError(f"{path}: key {key!r} is missing, the file has {sorted(present)}")
        try:
            arrays[key] = _read_member(Path(path), f"{key}.npy")
        # What zipfile, zlib and numpy raise for damaged bytes, encryption and pickled objects.
        except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: key {key!r} can't be read ({error})") from error
    return arrays


def _read_member(path: Path, member: str) -> np.ndarray:
    """One array of a zip: mapped where its bytes lie in the file as they are, else read into memory."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
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
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"NPY format version {version} isn't supported")
        shape, fortran_order, dtype = read_header[version](file)
        if dtype.hasobject or 0 in shape:
            file.seek(start)
            return np.lib.format.read_array(file, allow_pickle=False)
        order = "F" if fortran_order else "C"
        return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order=order)


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
        with np.errstate(over="ignore"):
            chunk = np.asarray(array[start : start + rows], dtype=np.float32)
        # Rows of contexts count as bad if any of their T vectors is.
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
