"""Windows of context vectors and the vector that follows, and their split into training, validation and test."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amn_kernels.data.npz import check_array, check_articles, npz_keys, open_npz
from amn_kernels.data.packed import load_bundled

SPLIT_SEED = 0
TRAIN_SHARE, VALIDATION_SHARE = 0.8, 0.1
# Fewer can't be split 80/10/10 with something in every part.
MIN_ARTICLES = 10
CONTEXT_KEYS = ("context_sequences", "contexts")
TARGET_KEYS = ("target_vectors", "targets")
FINGERPRINT_WINDOWS = 64


class Windows(ABC):
    """W windows of T context vectors and one target, all of dimension D.

    name: what messages call it; dim: D; context: T; article [W] int64: the article of each window, or None if unknown.
    """

    name: str
    dim: int
    context: int
    article: np.ndarray | None

    @abstractmethod
    def __len__(self) -> int:
        """W, the number of windows."""

    @abstractmethod
    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Contexts [B, T, D] and targets [B, D], float32 on the CPU, of the windows numbered by rows [B]."""

    @cached_property
    def by_article(self) -> bool:
        """Whether windows are split and resampled by article: those are known, and at least `MIN_ARTICLES`."""
        return self.article is not None and len(np.unique(self.article)) >= MIN_ARTICLES

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 by which a later run knows these data: of W, T, D, all article numbers and 64 windows over all of W.

        A sample, because files may be larger than memory: a change of a few vectors between those can go unnoticed.
        """
        digest = hashlib.sha256(f"{len(self)} {self.context} {self.dim}".encode())
        # Converted, never computed with (the bundled vectors' squared norms are exact), so any machine finds the same.
        for part in self.batch(np.unique(np.linspace(0, len(self) - 1, FINGERPRINT_WINDOWS).astype(np.int64))):
            digest.update(part.numpy().tobytes())
        if self.article is not None:
            digest.update(self.article.tobytes())
        return digest.hexdigest()


class IndexedWindows(Windows):
    """Every window of a sequence of vectors that lies within one article; only the vectors are held in memory."""

    def __init__(self, name: str, vectors: np.ndarray, article: np.ndarray, context: int) -> None:
        """vectors: [N, D] in reading order, article: [N]; context: T >= 1. Raises ValueError if no window fits."""
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        # An article may come back later in the file, so windows follow the runs and not the numbers alone.
        run = np.concatenate([[0], np.cumsum(article[1:] != article[:-1])])
        starts = np.arange(max(0, len(vectors) - context))
        self.starts = starts[run[starts] == run[starts + context]]
        if not len(self.starts):
            raise ValueError(
                f"{name}: key 'article': no article has the {context + 1} vectors that a window needs, "
                f"{len(vectors)} rows in {int(run[-1]) + 1} articles"
            )
        self.name, self.vectors, self.context = name, vectors, context
        self.dim = vectors.shape[1]
        self.article = article[self.starts]

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """As in Windows: gathers the vectors by index."""
        positions = self.starts[rows][:, None] + np.arange(self.context + 1)
        vectors = _to_float32(self.vectors[positions])
        return vectors[:, :-1], vectors[:, -1]


class StoredWindows(Windows):
    """Windows that a file holds as they are, usually memory-mapped."""

    def __init__(self, name: str, contexts: np.ndarray, targets: np.ndarray, article: np.ndarray | None) -> None:
        """contexts: [W, T, D], targets: [W, D], article: [W] or None."""
        self.name, self.contexts, self.targets, self.article = name, contexts, targets, article
        self.context, self.dim = contexts.shape[1:]

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """As in Windows: reads the rows from the file if it is mapped."""
        return _to_float32(self.contexts[rows]), _to_float32(self.targets[rows])


def _to_float32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def load_windows(path: Path | str | None = None, context: int = 5, bundled: str = "verses") -> Windows:
    """Windows of a user's NPZ file, or of the bundled set of that name if path is None.

    A file has either `vectors` [N, D] and `article` [N] (windows of `context` vectors are made within each article), or
    `context_sequences` [W, T, D] and `target_vectors` [W, D] (aliases `contexts`, `targets`; T is the file's), with
    `article` [W] if known. Users' vectors are used as they are, not normalised. Raises FileNotFoundError, and
    ValueError naming file, key and row.
    """
    if path is None:
        vectors, article = load_bundled(bundled)
        return IndexedWindows(f"bundled {bundled}", vectors, article, context)
    keys = npz_keys(path)
    if "vectors" in keys:
        arrays = open_npz(path, ("vectors", "article"))
        vectors = check_array(path, "vectors", arrays["vectors"], rank=2)
        return IndexedWindows(str(path), vectors, check_articles(path, arrays["article"], len(vectors)), context)
    context_key = next((key for key in CONTEXT_KEYS if key in keys), None)
    target_key = next((key for key in TARGET_KEYS if key in keys), None)
    if context_key is None or target_key is None:
        missing = "'target_vectors'" if context_key else "'context_sequences'" if target_key else "'vectors'"
        raise ValueError(
            f"{path}: key {missing} is missing: expected 'vectors' and 'article', or 'context_sequences' and "
            f"'target_vectors', the file has {sorted(keys)}"
        )
    return _load_stored(path, context_key, target_key, has_article="article" in keys)


def _load_stored(path: Path | str, context_key: str, target_key: str, has_article: bool) -> StoredWindows:
    arrays = open_npz(path, (context_key, target_key, *(["article"] if has_article else [])))
    contexts = check_array(path, context_key, arrays[context_key], rank=3)
    targets = check_array(path, target_key, arrays[target_key], rank=2)
    if len(contexts) != len(targets) or contexts.shape[2] != targets.shape[1]:
        raise ValueError(
            f"{path}: key {target_key!r} must be [{len(contexts)}, {contexts.shape[2]}] to match {context_key!r}, "
            f"got shape {list(targets.shape)}"
        )
    article = check_articles(path, arrays["article"], len(targets)) if has_article else None
    return StoredWindows(str(path), contexts, targets, article)


@dataclass(frozen=True)
class Split:
    """Numbers of the windows in each part, ascending."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_windows(windows: Windows) -> Split:
    """80% training, 10% validation, 10% test; no vector of one part is in another, copies in the data aside.

    By article: a seeded permutation of the articles that have windows. Without articles, or with fewer than 10, in
    three contiguous blocks with T windows left out between them, because windows less than T + 1 apart share vectors;
    of ready windows that are not in reading order this says nothing.
    Raises ValueError if a part would be empty.
    """
    articles = np.unique(windows.article) if windows.article is not None else np.empty(0)
    if windows.by_article:
        order = np.random.default_rng(SPLIT_SEED).permutation(articles)
        first, second = _borders(len(articles))
        split = Split(*(_rows_of(windows, part) for part in (order[:first], order[first:second], order[second:])))
    else:
        first, second = _borders(len(windows))
        gap = windows.context
        split = Split(
            np.arange(first), np.arange(first + gap, second), np.arange(min(second + gap, len(windows)), len(windows))
        )
    counts = {"training": len(split.train), "validation": len(split.validation), "test": len(split.test)}
    if min(counts.values()) == 0:
        key = "article" if windows.article is not None else "target_vectors"
        raise ValueError(
            f"{windows.name}: key {key!r}: {len(windows)} windows in {max(1, len(articles))} article(s) are too few "
            "for training, validation and test: " + ", ".join(f"{count} {part}" for part, count in counts.items())
        )
    return split


def _borders(count: int) -> tuple[int, int]:
    first = round(TRAIN_SHARE * count)
    return first, first + round(VALIDATION_SHARE * count)


def _rows_of(windows: Windows, articles: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.isin(windows.article, articles))
