"""Text files to vectors: paragraphs, articles, going on after an interruption, and windows that can be trained on."""

import io

import numpy as np
import pytest
from rich.console import Console

from amn_kernels.data import load_windows
from amn_kernels.train import embed as embed_module
from amn_kernels.train.embed import EmbedConfig, embed, read_paragraphs


def quiet():
    return Console(file=io.StringIO(), width=200)


def vector(text):
    return np.random.default_rng(len(text)).standard_normal(6)


def encoder(calls, fail_after=None):
    def load(config):
        def encode(texts):
            if fail_after is not None and len(calls) == fail_after:
                raise KeyboardInterrupt
            calls.append(len(texts))
            return np.stack([vector(text) for text in texts])

        return encode

    return load


@pytest.fixture
def files(tmp_path):
    paths = []
    for number in range(3):
        path = tmp_path / f"text{number}.txt"
        path.write_text("\n\n".join("word " * (i + 1) + "\nsecond line" for i in range(10 + number)) + "\n\n\n")
        paths.append(path)
    return tuple(paths)


def test_paragraphs(files):
    texts, article = read_paragraphs(files)
    assert np.bincount(article).tolist() == [10, 11, 12]
    assert texts[1] == "word word second line"


def test_a_blank_line_may_hold_blanks(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\n \t\ntwo\nlines\n\n \n\nthree\n ")
    assert read_paragraphs((path,))[0] == ["one", "two lines", "three"]


def test_file_is_what_training_reads(files, tmp_path):
    out = tmp_path / "vectors.npz"
    embed(EmbedConfig(files, out=out), quiet(), encoder([]))
    with np.load(out) as data:
        assert data["vectors"].dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(data["vectors"], axis=1), 1, rtol=1e-6)
        wanted = vector("word second line")
        np.testing.assert_allclose(data["vectors"][0], wanted / np.linalg.norm(wanted), rtol=1e-6)
    windows = load_windows(out, 5)
    assert windows.dim == 6
    assert len(list(tmp_path.iterdir())) == 4  # nothing is left but the file


def test_goes_on_where_it_was_interrupted(files, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_module, "PART", 8)
    calls, out = [], tmp_path / "vectors.npz"
    with pytest.raises(KeyboardInterrupt):
        embed(EmbedConfig(files, out=out), quiet(), encoder(calls, fail_after=2))
    assert not out.exists()
    embed(EmbedConfig(files, out=out), quiet(), encoder(calls))
    assert sum(calls) == 33  # no paragraph twice
    whole = tmp_path / "whole.npz"
    embed(EmbedConfig(files, out=whole), quiet(), encoder([]))
    with np.load(out) as a, np.load(whole) as b:
        np.testing.assert_array_equal(a["vectors"], b["vectors"])


def test_other_texts_do_not_take_over_what_was_done(files, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_module, "PART", 8)
    out = tmp_path / "vectors.npz"
    with pytest.raises(KeyboardInterrupt):
        embed(EmbedConfig(files, out=out), quiet(), encoder([], fail_after=2))
    calls = []
    embed(EmbedConfig(files[1:], out=out), quiet(), encoder(calls))
    assert sum(calls) == 23


def test_without_a_device_or_an_encoder_nothing_is_left(files, tmp_path):
    def missing(config):
        raise ValueError("no encoder")

    with pytest.raises(ValueError, match="device 'abacus' can't be used"):
        embed(EmbedConfig(files, out=tmp_path / "vectors.npz", device="abacus"), quiet(), encoder([]))
    with pytest.raises(ValueError, match="no encoder"):
        embed(EmbedConfig(files, out=tmp_path / "vectors.npz"), quiet(), missing)
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_bad_files(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, words in (("empty.txt", "no text in it"), ("binary.txt", "can't be read"), ("gone.txt", "can't be read")):
        with pytest.raises(ValueError, match=f"{name}: {words}"):
            embed(EmbedConfig((tmp_path / name,), out=tmp_path / "out.npz"), quiet(), encoder([]))
    with pytest.raises(ValueError, match="files must name at least one"):
        embed(EmbedConfig((), out=tmp_path / "out.npz"), quiet(), encoder([]))
    assert not (tmp_path / "out.npz").exists()
