"""Wrong arguments: TypeError or ValueError naming the argument, or else the loss of the reference; nothing in between.

One argument of a good call is replaced by something from `WILD` (for options) or `TENSORS` (for tensors).
"""

import math

import numpy as np
import torch
from hypothesis import strategies as st

from amn_kernels import FusedSeqLoss, NegativeQueue, functional
from amn_kernels.options import TERMS, LossOptions

ROWS = torch.arange(12.0).view(4, 3).sin()
GRID = ROWS.view(2, 2, 3)
KEEP = torch.ones(4, dtype=torch.bool)

WILD = (
    None, -1, 0, 1, 2.5, -0.0, math.nan, math.inf, -math.inf, 1e308, 1e-320, 5e-324, 10**400, -(10**5000), 1 << 31,
    1 << 62, 1 << 63, 1j, "", "x", "1", b"x", "both", "ids", "step", "mse", "cosine", "gradient", "cpu", True, False,
    [], (), {}, [None], ["mse"], ("cosine", "cosine"), {"cosine"}, {"moment": 1}, range(3), object(), int,
    "cosine " * 50, np.float32(1.5), np.float64(0.5), np.int64(3), np.bool_(True), np.array([1.0, 2.0]),
    np.array(["both", "x"]), torch.tensor(1.0), torch.tensor([1.0, 2.0]), torch.float32,
)  # fmt: skip


def _nested() -> torch.Tensor:
    return torch.nested.nested_tensor([ROWS[:2], ROWS[2:]], layout=torch.jagged)


TENSORS = {
    "none": lambda: None,
    "list": lambda: [[1.0, 2.0, 3.0]] * 4,
    "numpy": ROWS.numpy,
    "number": lambda: 1.0,
    "scalar": lambda: torch.tensor(1.0),
    "vector": lambda: ROWS[0],
    "fewer rows": lambda: ROWS[:3],
    "one row": lambda: ROWS[:1],
    "no rows": lambda: ROWS[:0],
    "no columns": lambda: ROWS[:, :0],
    "fewer columns": lambda: ROWS[:, :2],
    "grid": lambda: GRID,
    "four dimensions": lambda: GRID[None],
    "int64": ROWS.long,
    "bool": ROWS.bool,
    "complex64": lambda: ROWS.to(torch.complex64),
    "float8": lambda: ROWS.to(torch.float8_e4m3fn),
    "quantised": lambda: torch.quantize_per_tensor(ROWS, 0.1, 0, torch.qint8),
    "sparse": ROWS.to_sparse,
    "csr": ROWS.to_sparse_csr,
    "mkldnn": ROWS.to_mkldnn,
    "nested": _nested,
    "meta": lambda: ROWS.to("meta"),
    "row of bools": lambda: KEEP,
    "short row of bools": lambda: KEEP[:3],
    "sparse row of bools": KEEP.to_sparse,
    "row of integers": lambda: torch.arange(4),
    "row of bytes": lambda: torch.arange(4, dtype=torch.uint8),
    "row of floats": lambda: torch.ones(4),
    "column of integers": lambda: torch.arange(4).unsqueeze(1),
    "row of integers elsewhere": lambda: torch.arange(4, device="meta"),
    "good": lambda: ROWS.clone(),
    "negative bit": lambda: torch.complex(ROWS, -ROWS).conj().imag,
}

OPTIONS = tuple(name for name, field in LossOptions.__dataclass_fields__.items() if field.init)
BASES = ({}, {"infonce": 0.5}, {"mse": 0.0, "infonce": 1.0, "direction": "both"}, {"moment": 1.0, "variance": 1.0})

options = st.tuples(st.sampled_from(OPTIONS), st.sampled_from(range(len(WILD))), st.sampled_from(BASES), st.booleans())
tensors = st.tuples(
    st.sampled_from(["pred", "target", "mask", "extra_negatives", "ids"]),
    st.sampled_from(sorted(TENSORS)),
    st.sampled_from(BASES),
    st.booleans(),
    st.booleans(),
)
queues = st.tuples(
    st.sampled_from(["size", "dim", "dtype", "targets", "mask"]),
    st.one_of(st.sampled_from(range(len(WILD))), st.sampled_from(sorted(TENSORS))),
)


def _call(pred, target, given: dict, options: dict, *, module: bool):
    if module:
        return FusedSeqLoss(**options)(pred, target, **given)
    return functional.seq_loss(pred, target, **given, **options)[0]


def _must_name(arguments: tuple[str, ...], error: Exception) -> None:
    text = str(error)
    assert any(name in text for name in arguments), f"none of {arguments} in {type(error).__name__}: {text}"
    assert len(text) < 1000, f"an error of {len(text)} characters"


def _named_or_right(arguments: tuple[str, ...], run, reference, largest: float = 1.0) -> None:
    """`largest`: of the weights, by which rounding is multiplied."""
    try:
        got = run()
    except (TypeError, ValueError) as error:
        _must_name(arguments, error)
        return
    wanted = reference()
    if wanted.isfinite() or got.isfinite():
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * largest)


def check_option(name, at, base, module) -> None:
    """One option replaced."""
    value = WILD[at]
    options = {**base, name: value}
    if name == "weighting" and callable(value):
        return  # what a function of the caller raises is the caller's
    by_id = name == "positives" and isinstance(value, str) and value == "ids" and "infonce" in base
    given = {"ids": torch.arange(4)} if by_id else {}
    rows = GRID if name == "negatives" and isinstance(value, str) and value == "step" else ROWS

    def run(backend=None):
        fixed = {} if backend is None or name == "backend" else {"backend": backend}
        return _call(rows, rows.flip(0), given, {**options, **fixed}, module=module)

    weight = float(value) if name in TERMS and isinstance(value, int) and 1 < value < 1 << 64 else 1.0
    _named_or_right((name,), run, lambda: run("reference"), weight)


def check_tensor(name, kind, base, both, module) -> None:
    """One tensor replaced; or pred and target by the same, which then have the same shape."""
    value = TENSORS[kind]()
    given = {"pred": ROWS, "target": ROWS.flip(0)}
    given[name] = value
    if both and name in ("pred", "target"):
        given = {"pred": value, "target": value}
    if kind == "meta" and both:
        return  # shapes and dtypes alone are a good input: tracing needs that
    pred, target = given.pop("pred"), given.pop("target")

    def run(backend=None):
        return _call(pred, target, given, {**base, "backend": backend}, module=module)

    # Shapes and devices differ between two; which of them is the wrong one can't be told.
    arguments = ("pred", "target") if name in ("pred", "target") else (name,)
    _named_or_right(arguments, run, lambda: run("reference"))


def check_queue(name, which) -> None:
    """The same for the arguments of the queue."""
    value = TENSORS[which]() if isinstance(which, str) else WILD[which]
    sizes = {"size": 4, "dim": 3, "dtype": torch.float32}
    if name in ("size", "dim") and isinstance(value, int) and value > 1 << 20:
        return  # a size is what it is: memory is the caller's
    try:
        queue = NegativeQueue(**{**sizes, **({name: value} if name in sizes else {})})
        targets = value if name == "targets" else torch.ones(4, queue.rows.shape[1])
        queue.push(targets, value if name == "mask" else None)
    except (TypeError, ValueError) as error:
        _must_name((name,), error)
        return
    assert len(queue) <= len(queue.rows)
