"""Files with corrupted bytes: the loaders give an error that names the file, or the very data that was saved.

Bytes are flipped, cut off, inserted and repeated, or a whole file is written that claims something false: a shape or
dtype that its bytes don't have, pickled objects, other compression, more data than memory. Nothing is ever executed
(`Canary`).
"""

import ast
import hashlib
import io
import math
import os
import struct
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import load

from amn_kernels.data.npz import check_array, npz_keys, open_npz
from amn_kernels.data.windows import IndexedWindows, load_windows
from amn_kernels.train.checkpoints import load_checkpoint, save_checkpoint
from amn_kernels.train.config import TrainConfig
from amn_kernels.train.models import AMN
from amn_kernels.train.runs import load_history, load_run, save_config, save_epoch

ROWS, DIM = 40, 5
KEYS = ("vectors", "article")
FOLDER = Path()
"""Where the files are written."""


class Canary:
    """An object that, unpickled, makes a file: if that is there, a loader has executed what it read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


@cache
def arrays() -> dict[str, np.ndarray]:
    """What the NPZ files hold."""
    vectors = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    return {"vectors": vectors, "article": np.arange(ROWS) // 10}


@cache
def npz_bytes(compressed: bool) -> bytes:
    """A good file."""
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays())
    return file.getvalue()


def state() -> dict:
    """What the checkpoint holds."""
    weights = torch.arange(60, dtype=torch.float32).view(12, 5)
    return {"step": 7, "rate": 0.1, "weights": weights, "moments": {0: {"mean": weights / 3}}, "names": ["a", None]}


@cache
def checkpoint_bytes() -> dict[str, bytes]:
    """Every file of a good checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(Path(folder), 7, state(), keep=1)
        return {file.name: file.read_bytes() for file in path.iterdir()}


def sums(contents: dict[str, bytes]) -> bytes:
    """Checksums of a checkpoint's files, in the order that it has them."""
    names = ("tensors.safetensors", "state.json")
    return "".join(f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in names).encode()


@cache
def run_bytes() -> dict[str, bytes]:
    """Every file of a good run of one epoch."""
    with tempfile.TemporaryDirectory() as folder:
        out, model = Path(folder), AMN(DIM)
        windows = IndexedWindows("vectors", **arrays(), context=3)
        save_config(out, TrainConfig(out=out), windows)
        save_epoch(out, model, torch.ones(2, 3, DIM), [{"epoch": 0, "loss": None}, {"epoch": 1, "loss": 0.5}], True)
        return {file.name: file.read_bytes() for file in out.iterdir()}


@dataclass(frozen=True)
class Damage:
    """One change to a file; places are shares of its length, so that they fit every file."""

    kind: str
    place: float
    length: int
    byte: int

    def apply(self, data: bytes) -> bytes:
        """The changed file."""
        at = int(self.place * len(data))
        if self.kind == "flip":
            return data[:at] + bytes([data[at] ^ (1 << self.byte % 8)]) + data[at + 1 :] if data else data
        if self.kind == "set":
            return data[:at] + bytes([self.byte]) + data[at + 1 :]
        if self.kind == "cut":
            return data[:at]
        if self.kind == "remove":
            return data[:at] + data[at + self.length :]
        if self.kind == "repeat":
            return data[: at + self.length] + data[at:]
        return data[:at] + bytes([self.byte]) * self.length + data[at:]  # insert


damages = st.lists(
    st.builds(
        Damage,
        kind=st.sampled_from(["flip", "set", "cut", "remove", "repeat", "insert"]),
        place=st.floats(0, 1, exclude_max=True),
        length=st.integers(1, 64),
        byte=st.integers(0, 255),
    ),
    min_size=1,
    max_size=3,
)


def npy(header: str | bytes, data: bytes, version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    """An NPY member with any header; `length` is what it claims of the header."""
    raw = header.encode() if isinstance(header, str) else header
    raw += b"\n"
    form = "<H" if version[0] == 1 else "<I"
    most = 0xFFFF if version[0] == 1 else 0xFFFFFFFF
    return (
        b"\x93NUMPY"
        + bytes(version)
        + struct.pack(form, min(most, len(raw) if length is None else length))
        + raw
        + data
    )


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A whole zip with right checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def good_member(key: str) -> bytes:
    """As numpy writes it."""
    file = io.BytesIO()
    np.save(file, arrays()[key])
    return file.getvalue()


HEADER = "{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
DESCRS = (
    "'<f4'", "'<f8'", "'<f2'", "'>f4'", "'|O'", "'<U9'", "'|V20'", "'<c8'", "'<M8[s]'", "'|b1'", "'<i8'", "'<f16'",
    "'<f3'", "'x'", "3", "None", "[('a', '<f4')]", "[('a', '|O')]", "[('a', '<f4', (1000000, 1000000))]",
    "('<f4', (5,))", "{'names': ['a'], 'formats': ['O']}",
)  # fmt: skip
SHAPES = (
    "(40, 5)", "(5, 40)", "(41, 5)", "(40, 6)", "(200,)", "()", "(0, 5)", "(40, 5, 0)", "(-40, -5)", "(-1, 5)",
    "[40, 5]", "(40, 5.0)", "(True, 200)", "(1000000000000, 5)", "(9223372036854775807, 2)",
    "(18446744073709551616, 5)", "(4611686018427387904, 4)", "(40, None)", "40", "'40'",
    "(" + "1, " * 70 + "200)", "(10**9, 5)",
)  # fmt: skip
HEADERS = (
    "", "{}", "[", "[" * 5000, "(" * 9000, "{'descr': '<f4'}", "{[1]: 2}", "__import__('os').getcwd()", "'''", "\\",
    "1L", "{'descr': '<f4', 'fortran_order': False, 'shape': (40L, 5L)}", "é" * 30, "\x00" * 30, "1 +" * 3000,
    "-" * 9000, "    {}\n  {}", "{'descr': '<f4', 'fortran_order': 0, 'shape': (40, 5)}", "9" * 9000, "{" + "1:" * 4000,
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A whole NPZ file whose header of `vectors` claims something."""

    header: str
    compression: int
    version: tuple[int, int]
    length: int | None
    spare: int
    size: int = ROWS * DIM * 4
    """Bytes of the array, before the spare ones."""

    def data(self) -> bytes:
        """The file."""
        payload = np.resize(arrays()["vectors"].view(np.uint8), self.size).tobytes()
        payload = payload[: self.spare] if self.spare < 0 else payload + bytes(self.spare)
        members = {"vectors.npy": npy(self.header.encode(), payload, self.version, self.length)}
        return zipped({**members, "article.npy": good_member("article")}, self.compression)


GOOD = {
    "descr": ("'<f4'", "'<f8'", "'<f2'", "'>f4'", "'<i8'", "'<c8'"),
    "order": ("False", "True"),
    "shape": ("(40, 5)", "(5, 40)", "(41, 5)", "(40, 6)", "(200,)", "(0, 5)", "(2, 4, 5)"),
    "compression": (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
    "version": ((1, 0), (2, 0), (3, 0)),
    "length": (None,),
    "spare": (0,),
}
"""What a file may say and be read, by field of a claim."""
WRONG = {
    "descr": DESCRS,
    "order": ("None", "2"),
    "shape": SHAPES,
    "compression": (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA),
    "version": ((1, 1), (255, 0)),
    "length": (0, 1, 65535, 1 << 31, (1 << 32) - 1),
    "spare": (1, -1, 1000),
    "header": HEADERS,
}


@st.composite
def _claims(draw) -> Claim:
    """Right in all fields, or wrong in one or two; without a wrong one the bytes are as many as the header says."""
    wrong = draw(st.one_of(st.just([]), st.lists(st.sampled_from(list(WRONG)), min_size=1, max_size=2, unique=True)))
    of = {name: draw(st.sampled_from((WRONG if name in wrong else GOOD)[name])) for name in GOOD}
    header = HEADER.format(**{name: of.pop(name) for name in ("descr", "order", "shape")})
    size = ROWS * DIM * 4
    if not {"descr", "shape"} & set(wrong):
        claimed = ast.literal_eval(header)
        size = math.prod(claimed["shape"]) * np.dtype(claimed["descr"]).itemsize
    if "header" in wrong:
        header = draw(st.sampled_from(HEADERS))
    return Claim(header, **of, size=size)


claims = st.tuples(_claims())


def _must_name(path: Path, error: Exception) -> None:
    assert str(path) in str(error), f"the error does not name the file: {error}"


def check_npz(path: Path) -> None:
    """An error naming the file, or arrays of the shape and type that vectors and articles have; never a crash."""
    try:
        npz_keys(path)
        found = open_npz(path, KEYS)
        check_array(path, "vectors", found["vectors"], rank=2)
    except ValueError as error:
        _must_name(path, error)
    try:
        load_windows(path, context=3)
    except ValueError as error:
        _must_name(path, error)


def check_damaged_npz(compressed: bool, changes: list[Damage]) -> None:
    """Changed bytes are an error, unless they are none of the arrays' (dates, for instance)."""
    path, data = FOLDER / "damaged.npz", npz_bytes(compressed)
    for change in changes:
        data = change.apply(data)
    path.write_bytes(data)
    check_npz(path)
    try:
        found = open_npz(path, KEYS)
    except ValueError:
        return
    for key, wanted in arrays().items():
        assert np.array_equal(found[key], wanted), f"{key} came back changed, without an error"


def check_claim(claim: Claim) -> None:
    """A file that is whole and may be wrong: an error, or the array that numpy reads."""
    path = FOLDER / "claim.npz"
    path.write_bytes(claim.data())
    check_npz(path)
    try:
        found = open_npz(path, KEYS)["vectors"]
    except ValueError:
        return
    with np.load(path) as file:
        wanted = file["vectors"]
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), "type or shape is not the one that numpy reads"
    assert found.tobytes() == wanted.tobytes(), "the array is not the one that numpy reads"


def _write_damaged(folder: Path, files: dict[str, bytes], name: str, changes: list[Damage]) -> Path:
    files = dict(files)
    for change in changes:
        files[name] = change.apply(files[name])
    folder.mkdir(exist_ok=True)
    for each, data in files.items():
        (folder / each).write_bytes(data)
    return folder


def check_damaged_checkpoint(name: str, changes: list[Damage]) -> None:
    """Changed bytes of any file of a checkpoint are an error that names it, unless they change nothing."""
    folder = _write_damaged(FOLDER / "checkpoint", checkpoint_bytes(), name, changes)
    try:
        found = load_checkpoint(folder)
    except ValueError as error:
        _must_name(folder, error)
        return
    assert same(found, state()), f"{name} came back changed, without an error"


def check_damaged_run(name: str, changes: list[Damage]) -> None:
    """Changed bytes of a trained run are an error that names it, or a model that predicts what the saved one did.

    The weights have no checksum but a probe, and the options and figures of JSON files are what they say.
    """
    folder = _write_damaged(FOLDER / "run", run_bytes(), name, changes)
    try:
        load_history(folder)
        run = load_run(folder)
    except ValueError as error:
        _must_name(folder, error)
        return
    assert run.dim == DIM
    contexts = torch.ones(2, 3, DIM)
    with torch.no_grad():
        wanted, found = load(run_bytes()["best.safetensors"])["probe.prediction"], run.model(contexts)
    assert (found - wanted).norm() <= 3e-3 * wanted.norm(), f"{name} came back as another model, without an error"


damaged_npz = st.tuples(st.booleans(), damages)
damaged_checkpoint = st.tuples(st.sampled_from(["tensors.safetensors", "state.json", "SHA256SUMS"]), damages)
damaged_run = st.tuples(st.sampled_from(["config.json", "best.safetensors", "history.jsonl"]), damages)


def same(a, b) -> bool:
    """Whether two states are equal."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
