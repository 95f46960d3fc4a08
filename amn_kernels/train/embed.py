"""Own text as a dataset: files to paragraphs to vectors, part by part, so that it goes on where it was interrupted."""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from amn_kernels.train.runs import write_atomically
from amn_kernels.train.trainer import check_device

Encoder = Callable[[list[str]], np.ndarray]
"""Texts to vectors [N, D]."""

PART = 256  # paragraphs


@dataclass(frozen=True)
class EmbedConfig:
    """Options of `amn-kernels embed`; the texts under the fields are its help."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Text files, UTF-8; each is one article, its paragraphs are divided by blank lines."""
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Name or folder of a sentence-transformers model."""
    out: Path = Path("vectors.npz")
    """NPZ file to write, for `train --data`; what is done is kept beside it until it is whole."""
    device: str = "cpu"
    """Torch device, for example cpu or cuda."""


def embed(config: EmbedConfig, console: Console, load_encoder: Callable[[EmbedConfig], Encoder] | None = None) -> None:
    """Writes `vectors` [N, D] float32 of unit length and `article` [N], the number of the file.

    An interrupted run goes on with the next part when it is started again with the same texts and model.
    ValueError for a file that can't be read or has no text, for a device that is not there, and where
    sentence-transformers is missing.
    """
    if not config.files:
        raise ValueError("files must name at least one text file")
    check_device(config.device)
    texts, article = read_paragraphs(config.files)
    digest = hashlib.sha256(json.dumps([config.model, texts]).encode()).hexdigest()
    parts = config.out.with_name(f"{config.out.name}.{digest[:16]}.parts")
    starts = range(0, len(texts), PART)
    missing = [start for start in starts if not (parts / f"{start:09d}.npy").exists()]
    if missing:
        encode = (load_encoder or _sentence_transformers)(config)
        parts.mkdir(parents=True, exist_ok=True)
        for start in track(missing, "embedding", console=console, transient=True, disable=not console.is_terminal):
            vectors = np.asarray(encode(texts[start : start + PART]), dtype=np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
            content = io.BytesIO()
            np.save(content, vectors)
            write_atomically(parts / f"{start:09d}.npy", content.getvalue())
    content = io.BytesIO()
    vectors = np.concatenate([np.load(parts / f"{start:09d}.npy") for start in starts])
    np.savez(content, vectors=vectors, article=article)
    write_atomically(config.out, content.getvalue())
    shutil.rmtree(parts)
    console.print(f"{config.out}: {len(vectors):,} paragraphs of {len(config.files):,} files, {vectors.shape[1]}-d")


def read_paragraphs(files: tuple[Path, ...]) -> tuple[list[str], np.ndarray]:  # N texts, [N]
    """The paragraphs of all files with their file's number; ValueError naming a file without any, or unreadable."""
    texts: list[str] = []
    article: list[int] = []
    for number, path in enumerate(files):
        try:
            blocks = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: can't be read as text ({error})") from error
        paragraphs = [" ".join(block.split()) for block in blocks if block.strip()]
        if not paragraphs:
            raise ValueError(f"{path}: no text in it")
        texts += paragraphs
        article += [number] * len(paragraphs)
    return texts, np.array(article)


def _sentence_transformers(config: EmbedConfig) -> Encoder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(
            f"embed needs sentence-transformers: in a checkout, pip install --no-build-isolation '.[embed]' ({error})"
        ) from error
    model = SentenceTransformer(config.model, device=config.device)
    return lambda texts: model.encode(texts, convert_to_numpy=True, show_progress_bar=False)
