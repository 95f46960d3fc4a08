"""What the fuzz of the loss draws: shapes, layouts, dtypes, options, and which rows are special.

Hypothesis draws and shrinks them; the numbers come from a seed.
"""

import random
from dataclasses import dataclass

import torch
from error_rule import make_rows
from hypothesis import strategies as st
from torch import Tensor

from amn_kernels.options import TERMS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)

LARGE = 0.05
"""Probability of more rows than a chunk has."""
PRED_LEARNS = 0.8
"""Probability that pred's gradient is asked for."""
BALANCED = 0.4
"""Probability of weights that are balanced."""

SCALES = (1.0, 1.0, 1e-6, 1e15, 1e3)
SPECIAL = {
    "zero": 0.0,
    "below the smallest norm": 1e-10,
    "subnormal": 1e-40,
    "tiny": 1e-6,
    "huge": 1e15,
    "overflowing": 1e30,
    "nan": torch.nan,
    "inf": torch.inf,
    "-inf": -torch.inf,
}
LAYOUTS = {
    "dense": lambda x: x.clone(),
    "columns first": lambda x: x.mT.contiguous().mT,
    "rows reversed in memory": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "every second column": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "inside a larger matrix": lambda x: torch.nn.functional.pad(x, (3, 2), value=torch.nan)[..., 3:-2],
    "negative bit": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag if x.dtype not in HALF else x.clone(),
    "expanded": lambda x: x[:1].expand_as(x),
    "sliding windows": lambda x: x.flatten().unfold(0, x.shape[-1], 1)[: x[..., 0].numel()].unflatten(0, x.shape[:-1]),
}


@dataclass(frozen=True)
class Case:
    """What a failure prints; `tensors` makes the input of it."""

    shape: tuple[int, ...]  # [N, D] or [B, T, D]
    options: dict
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    layouts: tuple[str, str] = ("dense", "dense")
    scales: tuple[float, float] = (1.0, 1.0)
    distance: float | None = None
    special: tuple[tuple[str, int, str], ...] = ()
    """Of pred, target, both or extra, which row becomes what: a key of `SPECIAL`, or "copy" or "opposite" of row 0."""
    masked: float | None = None
    """Share of masked rows, which hold NaN."""
    ids: int | None = None
    """How many different ones."""
    extra: int = 0
    gradients: tuple[str, ...] = ("pred",)
    incoming: float = 1.0
    chunk_bytes: int | None = None
    seed: int = 0

    def tensors(self) -> dict[str, Tensor | None]:
        """The arguments of the loss, laid out as the case says."""
        pred, target = make_rows(*self.shape, dtype=torch.float64, distance=self.distance, seed=self.seed)
        generator = torch.Generator().manual_seed(self.seed + 1)
        rows, dim = pred[..., 0].numel(), self.shape[-1]
        given: dict[str, Tensor | None] = {"mask": None, "ids": None, "extra": None}
        extra = torch.randn(self.extra, dim, generator=generator, dtype=torch.float64)
        sides = {"pred": pred.view(rows, dim), "target": target.view(rows, dim), "extra": extra}
        for name, scale in zip(("pred", "target"), self.scales, strict=True):
            sides[name] *= scale
        for which, row, kind in self.special:
            for side in ("pred", "target") if which == "both" else (which,):
                x = sides[side]
                if not len(x):
                    continue
                at = row % len(x)
                if kind in ("copy", "opposite"):
                    x[at] = x[0] if kind == "copy" else -x[0]
                elif kind in ("nan", "inf", "-inf"):
                    x[at, row % dim] = SPECIAL[kind]
                else:
                    x[at] *= SPECIAL[kind] / x[at].norm().clamp(min=1e-30)
        if self.masked is not None:
            given["mask"] = torch.rand(self.shape[:-1], generator=generator) >= self.masked
            for x in (pred, target):
                x[~given["mask"]] = torch.nan
        if self.ids is not None:
            given["ids"] = torch.randint(0, self.ids, self.shape[:-1], generator=generator)
        if self.extra:
            given["extra"] = extra.to(self.dtypes[1])
        for (name, x), dtype, layout in zip(
            (("pred", pred), ("target", target)), self.dtypes, self.layouts, strict=True
        ):
            given[name] = LAYOUTS[layout](x.to(dtype))
        return given


@st.composite
def cases(draw) -> Case:
    """Any case; shrinks to one row in one dimension with one term."""
    seed = draw(st.integers(0, 1 << 20))
    # Hypothesis draws the simple far more often than the rare: these have the probability that stands here.
    chance = random.Random(seed)
    large, pred_learns, is_balanced = (chance.random() < share for share in (LARGE, PRED_LEARNS, BALANCED))
    size = st.one_of(st.integers(1, 9), st.integers(1, 70))
    shape = draw(st.one_of(st.tuples(size), st.tuples(st.integers(1, 9), st.integers(1, 9))))
    if large:  # several chunks of rows, and blocks of keys
        shape = (draw(st.integers(1000, 1100)),)
    dim = draw(st.one_of(st.integers(1, 9), st.integers(1, 70), st.sampled_from([128, 257])))
    on = draw(st.lists(st.sampled_from(TERMS), min_size=1, unique=True))
    off = [term for term in TERMS if term not in on]
    options = {term: draw(st.sampled_from([1.0, 0.3, 5.0])) if term in on else 0.0 for term in TERMS}
    options["monitor"] = tuple(draw(st.lists(st.sampled_from(off), unique=True))) if off else ()
    options["variance_target"] = draw(st.sampled_from([None, None, 0.05, 1.0]))
    options["weighting"] = draw(st.sampled_from(["gradient", "value"])) if is_balanced else "fixed"
    if is_balanced:
        options["anchor"] = draw(st.sampled_from([None, *on]))
        options["ema"] = draw(st.sampled_from([0.99, 0.5, 0.0]))
        options["update_every"] = draw(st.sampled_from([1, 2]))
    ids, extra = None, 0
    if "infonce" in (*on, *options["monitor"]):
        options["temperature"] = draw(st.sampled_from([0.07, 0.3, 0.01, 10.0]))
        options["direction"] = draw(st.sampled_from(["pred_to_target", "both"]))
        options["negatives"] = draw(st.sampled_from(["all", "step", "sequence"])) if len(shape) == 2 else "all"
        options["false_negative_margin"] = draw(st.sampled_from([None, None, 0.05, 0.7, 1.3]))
        ids = draw(st.sampled_from([None, None, 1, 3, 1000]))
        options["positives"] = draw(st.sampled_from(["diagonal", "ids"])) if ids else "diagonal"
        extra = draw(st.sampled_from([0, 0, 1, 5, 80]))
    dtype = draw(st.sampled_from(DTYPES))
    other = draw(st.sampled_from(DTYPES)) if draw(st.integers(0, 4)) == 4 else dtype
    layout = st.sampled_from(list(LAYOUTS)) if draw(st.booleans()) else st.just("dense")
    which, kinds = st.sampled_from(["pred", "target", "both", "extra"]), st.sampled_from(["copy", "opposite", *SPECIAL])
    special = st.lists(st.tuples(which, st.integers(0, 1100), kinds), max_size=3)
    leaves = ["target", *(["extra"] if extra else []), *(["temperature"] if "temperature" in options else [])]
    return Case(
        shape=(*shape, dim),
        options=options,
        dtypes=(dtype, other),
        layouts=(draw(layout), draw(layout)),
        scales=(draw(st.sampled_from(SCALES)), draw(st.sampled_from(SCALES))) if draw(st.booleans()) else (1.0, 1.0),
        distance=draw(st.sampled_from([None, 0.3, 0.01, 0.0])),
        special=tuple(draw(special)) if draw(st.booleans()) else (),
        masked=draw(st.sampled_from([None, None, 0.0, 0.3, 0.9, 1.0])),
        ids=ids,
        extra=extra,
        gradients=(*(["pred"] if pred_learns else []), *draw(st.lists(st.sampled_from(leaves), unique=True))),
        incoming=draw(st.sampled_from([1.0, 1024.0])),
        chunk_bytes=draw(st.sampled_from([None, None, 1, 3000, 100_000])),
        seed=seed,
    )
