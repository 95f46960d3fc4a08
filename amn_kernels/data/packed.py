"""The bundled sentence embeddings and the int8 format that they are stored in.

A packed file is an NPZ with `codes` [N, D] int8 and `article` [N], integers. Every vector was divided by its own
largest magnitude and rounded to 127 steps; the scale isn't stored, since the vectors are unit norm and the loader
renormalises. Measured on the bundled sets: the cosine between a vector and its packed form is above 0.9999.
"""

from pathlib import Path

import numpy as np

from amn_kernels.data.npz import check_array, check_articles, open_npz

BUNDLED = {"verses": "verses-384.npz", "techdocs": "techdocs-384.npz"}


def pack_vectors(source: Path | str, destination: Path | str) -> None:
    """Packs an NPZ with `vectors` [N, D] (any norm but zero) and `article` [N] into the int8 format.

    Only directions survive: a packed vector comes back with unit norm. Raises ValueError as `open_npz` does for files
    that can't be read, and for NaN, infinite or zero vectors.
    """
    arrays = open_npz(source, ("vectors", "article"))
    vectors = check_array(source, "vectors", arrays["vectors"], rank=2)
    article = check_articles(source, arrays["article"], rows=len(vectors))
    vectors = vectors.astype(np.float32)
    scale = np.abs(vectors).max(axis=1, keepdims=True) / 127
    codes = np.rint(vectors / scale).astype(np.int8)
    np.savez_compressed(destination, codes=codes, article=article)


def load_packed(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [N, D] float32 with unit norm and article numbers [N] of a packed file; ValueError if it is damaged."""
    arrays = open_npz(path, ("codes", "article"))
    codes = arrays["codes"]
    if codes.ndim != 2 or codes.dtype != np.int8:
        raise ValueError(f"{path}: key 'codes' must be int8 [N, D], got {codes.dtype} {list(codes.shape)}")
    vectors = codes.astype(np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if (norms == 0).any():
        raise ValueError(f"{path}: key 'codes', row {int(np.argmin(norms))}: zero vector")
    vectors /= norms
    return vectors, check_articles(path, arrays["article"], rows=len(codes))


def load_bundled(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [N, 384] and articles [N] of a bundled set: "verses" (31,102 rows) or "techdocs" (3,505 rows)."""
    if name not in BUNDLED:
        raise ValueError(f"unknown bundled set {name!r}, expected one of {sorted(BUNDLED)}")
    return load_packed(Path(__file__).parent / BUNDLED[name])
