"""Bundled vectors, users' files and their errors, windows and splits."""

import re
import zipfile

import numpy as np
import pytest

from amn_kernels.data import IndexedWindows, StoredWindows, load_bundled, load_windows, pack_vectors, split_windows
from amn_kernels.data.packed import load_packed

# Two articles of 8 rows and one of 3, which is too short for a window of 5 + 1.
ARTICLE = np.repeat([4, 7, 9], [8, 3, 8])


def make_vectors(rows: int, dim: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def load_error(path) -> str:
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_windows(path)
    return str(caught.value)


def test_bundled_sets_are_unit_norm_float32_in_reading_order():
    for name, rows, articles in (("verses", 31102, 1189), ("techdocs", 3505, 56)):
        vectors, article = load_bundled(name)
        assert vectors.shape == (rows, 384)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        assert len(np.unique(article)) == articles
        assert (np.diff(article) >= 0).all()


def test_bundled_windows_and_split_sizes():
    windows = load_windows()
    split = split_windows(windows)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [20330, 2476, 2363]
    assert len(windows) == 25169


def test_mean_of_context_on_the_verses_has_its_known_cosine():
    windows = load_windows()
    context, target = windows.batch(split_windows(windows).validation)
    cosine = np.mean(
        [np.dot(c, t) / np.linalg.norm(c) for c, t in zip(context.mean(1).numpy(), target.numpy(), strict=True)]
    )
    assert cosine == pytest.approx(0.555, abs=0.01)


def test_packing_keeps_directions(tmp_path):
    vectors = make_vectors(300, dim=384) * np.linspace(0.01, 100, 300, dtype=np.float32)[:, None]
    article = np.arange(300) // 30
    pack_vectors(save(tmp_path / "plain.npz", vectors=vectors, article=article), tmp_path / "packed.npz")
    unpacked, unpacked_article = load_packed(tmp_path / "packed.npz")
    cosine = (unpacked * vectors).sum(1) / np.linalg.norm(vectors, axis=1)
    # Rounding to 127 steps of the largest of 384 normal values (about 3 sd) leaves 1 - cos of about (3 / 127)^2 / 24.
    assert (1 - cosine).max() < 1e-4
    np.testing.assert_array_equal(unpacked_article, article)


def test_packing_keeps_article_numbers_of_64_bits(tmp_path):
    article = np.repeat(np.arange(20) << 32, 12)
    pack_vectors(save(tmp_path / "plain.npz", vectors=make_vectors(240), article=article), tmp_path / "packed.npz")
    np.testing.assert_array_equal(load_packed(tmp_path / "packed.npz")[1], article)


def test_a_fingerprint_is_of_the_data_whatever_file_they_are_in(tmp_path):
    vectors, article = make_vectors(200), np.repeat(np.arange(20), 10)

    def fingerprint(name, vectors=vectors, article=article, context=5):
        return load_windows(save(tmp_path / name, vectors=vectors, article=article), context).fingerprint

    own = fingerprint("own.npz")
    assert fingerprint("again.npz") == fingerprint("wide.npz", vectors=vectors.astype(np.float64)) == own
    others = {
        own,
        fingerprint("other.npz", vectors=make_vectors(200, seed=1)),
        fingerprint("shorter.npz", vectors=vectors[:190], article=article[:190]),
        # The same windows, in other parts of the split.
        fingerprint("renumbered.npz", article=19 - article),
        fingerprint("context.npz", context=4),
    }
    assert len(others) == 5
    # However alike the windows are, and whatever is known of articles, one more is another set.
    ones = np.ones((71, 5, 6), np.float32)
    more, fewer = (StoredWindows("ones", ones[:count], ones[:count, 0], None) for count in (71, 70))
    assert more.fingerprint != fewer.fingerprint


@pytest.mark.parametrize("context", [1, 5])
def test_windows_are_consecutive_rows_of_one_article(context):
    # The vector of row i is (i, 1), so that a batch shows where it came from.
    vectors = np.stack([np.arange(19), np.ones(19)], axis=1).astype(np.float32)
    windows = IndexedWindows("rows", vectors, ARTICLE, context)
    contexts, targets = windows.batch(np.arange(len(windows)))
    positions = np.concatenate([contexts[:, :, 0].numpy(), targets[:, :1].numpy()], axis=1).astype(int)
    assert (np.diff(positions, axis=1) == 1).all()
    np.testing.assert_array_equal(ARTICLE[positions], np.repeat(windows.article[:, None], context + 1, axis=1))
    assert len(windows) == sum(max(0, count - context) for count in (8, 3, 8))


def test_an_article_number_that_comes_back_is_not_joined():
    # Rows 2 to 5 begin and end in article 1 with a row of article 2 between.
    windows = IndexedWindows("rows", make_vectors(9), np.repeat([1, 2, 1], [4, 1, 4]), context=3)
    np.testing.assert_array_equal(windows.starts, [0, 5])


def test_split_is_by_article_disjoint_complete_and_seeded(tmp_path):
    article = np.repeat(np.arange(30), 9)
    path = save(tmp_path / "data.npz", vectors=make_vectors(270), article=article)
    windows = load_windows(path)
    split, again = split_windows(windows), split_windows(load_windows(path))
    parts = (split.train, split.validation, split.test)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(windows)))
    articles = [set(windows.article[part]) for part in parts]
    assert [len(part) for part in articles] == [24, 3, 3]
    assert len(set.union(*articles)) == 30
    np.testing.assert_array_equal(split.validation, again.validation)
    assert set(windows.article[split.train]) != set(range(24)), "the order of the articles must be shuffled"


@pytest.mark.parametrize("keys", [("context_sequences", "target_vectors"), ("contexts", "targets")])
@pytest.mark.parametrize("save_with", [np.savez, np.savez_compressed])
def test_both_forms_of_a_file_give_the_same_windows_and_split(tmp_path, keys, save_with):
    vectors, article = make_vectors(200) * 3, np.repeat(np.arange(20), 10)
    indexed = load_windows(save(tmp_path / "vectors.npz", vectors=vectors, article=article))
    contexts, targets = indexed.batch(np.arange(len(indexed)))
    arrays = {keys[0]: contexts.numpy(), keys[1]: targets.numpy(), "article": indexed.article}
    save_with(tmp_path / "windows.npz", **arrays)
    stored = load_windows(tmp_path / "windows.npz")
    rows = split_windows(indexed).validation
    np.testing.assert_array_equal(rows, split_windows(stored).validation)
    for left, right in zip(indexed.batch(rows), stored.batch(rows), strict=True):
        np.testing.assert_array_equal(left, right)
    # Users' vectors keep their norms.
    np.testing.assert_array_equal(indexed.batch(np.array([0]))[0][0], vectors[:5])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_uncompressed_members_are_mapped_and_read_as_float32(tmp_path, dtype):
    vectors = make_vectors(200).astype(dtype)
    windows = load_windows(save(tmp_path / "data.npz", vectors=vectors, article=np.repeat(np.arange(20), 10)))
    assert isinstance(windows.vectors, np.memmap)
    context, _ = windows.batch(np.array([0, 60]))
    np.testing.assert_array_equal(context[1].numpy(), vectors[120:125].astype(np.float32))


def test_fortran_order_is_mapped_right(tmp_path):
    vectors = np.asfortranarray(make_vectors(200))
    windows = load_windows(save(tmp_path / "data.npz", vectors=vectors, article=np.repeat(np.arange(20), 10)))
    np.testing.assert_array_equal(windows.batch(np.array([3]))[0][0], vectors[3:8])


@pytest.mark.parametrize("articles", [None, 1, 9])
def test_without_enough_articles_blocks_share_no_vector(tmp_path, articles):
    vectors = make_vectors(106)
    positions = np.arange(100)[:, None] + np.arange(6)
    arrays = {"contexts": vectors[positions[:, :5]], "targets": vectors[positions[:, 5]]}
    if articles:
        arrays["article"] = np.arange(100) * articles // 100
    split = split_windows(load_windows(save(tmp_path / "data.npz", **arrays)))
    used = [set(positions[part].flatten()) for part in (split.train, split.validation, split.test)]
    assert sum(map(len, used)) == len(set.union(*used))
    assert [len(split.train), len(split.validation), len(split.test)] == [80, 5, 5]


def good_arrays() -> dict[str, np.ndarray]:
    return {"vectors": make_vectors(200), "article": np.repeat(np.arange(20), 10)}


def good_windows() -> dict[str, np.ndarray]:
    return {"context_sequences": make_vectors(500).reshape(100, 5, 6), "target_vectors": make_vectors(100)}


@pytest.mark.parametrize(
    ("value", "words"),
    [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (0, "zero vector"), (1e300, "NaN or infinite")],
)
@pytest.mark.parametrize("save_with", [np.savez, np.savez_compressed])
def test_bad_vectors_name_file_key_and_row(tmp_path, value, words, save_with):
    path = tmp_path / "data.npz"
    arrays = good_arrays()
    arrays["vectors"] = arrays["vectors"].astype(np.float64)
    arrays["vectors"][[17, 30]] = value
    save_with(path, **arrays)
    message = load_error(path)
    assert "key 'vectors', row 17" in message
    assert words in message
    for key, index in (("context_sequences", (23, 2)), ("target_vectors", (23,))):
        arrays = {name: array.astype(np.float64) for name, array in good_windows().items()}
        arrays[key][index] = value
        save_with(path, **arrays)
        message = load_error(path)
        assert f"key '{key}', row 23" in message
        assert words in message


def test_bad_row_beyond_the_first_piece_is_numbered_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("amn_kernels.data.npz.CHECK_BYTES", 10 * 6 * 4)
    arrays = good_arrays()
    arrays["vectors"][57, 3] = np.nan
    assert "row 57" in load_error(save(tmp_path / "data.npz", **arrays))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vectors": np.ones(5, np.float32)}, "key 'vectors' must be a non-empty [N, D] array, got shape [5]"),
        ({"vectors": np.ones((0, 6), np.float32)}, "key 'vectors' must be a non-empty [N, D] array, got shape [0, 6]"),
        ({"vectors": np.ones((200, 6), int)}, "key 'vectors' must be floating point, got int64"),
        ({"vectors": np.array([{}] * 200)}, "key 'vectors' can't be read"),
        ({"article": np.arange(199)}, "key 'article' must be [200], one for each row, got shape [199]"),
        ({"article": np.ones(200)}, "key 'article' must be integers, got float64"),
        ({"article": np.arange(200)}, "key 'article': no article has the 6 vectors that a window needs"),
    ],
)
def test_wrong_shapes_and_types_of_vector_files(tmp_path, change, words):
    assert words in load_error(save(tmp_path / "data.npz", **(good_arrays() | change)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"context_sequences": make_vectors(100)}, "key 'context_sequences' must be a non-empty [N, T, D] array"),
        ({"target_vectors": make_vectors(99)}, "key 'target_vectors' must be [100, 6]"),
        ({"target_vectors": make_vectors(100, dim=7)}, "key 'target_vectors' must be [100, 6]"),
        ({"article": np.arange(99)}, "key 'article' must be [100]"),
    ],
)
def test_wrong_shapes_of_window_files(tmp_path, change, words):
    assert words in load_error(save(tmp_path / "data.npz", **(good_windows() | change)))


def test_missing_keys_are_named(tmp_path):
    path = tmp_path / "data.npz"
    assert "key 'vectors' is missing" in load_error(save(path, embeddings=make_vectors(9)))
    assert "['embeddings']" in load_error(path)
    assert "key 'article' is missing" in load_error(save(path, vectors=make_vectors(9)))
    assert "key 'target_vectors' is missing" in load_error(save(path, contexts=make_vectors(9)))
    assert "key 'context_sequences' is missing" in load_error(save(path, targets=make_vectors(9)))


@pytest.mark.parametrize("save_with", [np.savez, np.savez_compressed])
def test_truncated_corrupt_and_foreign_files(tmp_path, save_with):
    path = tmp_path / "data.npz"
    save_with(path, **good_arrays())
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        middle = archive.getinfo("vectors.npy").header_offset + archive.getinfo("vectors.npy").compress_size // 2
    path.write_bytes(whole[: len(whole) // 2])
    assert "not an NPZ file, or cut short" in load_error(path)
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :])
    assert "key 'vectors' can't be read" in load_error(path)
    path.write_bytes(b"not a zip")
    assert "not an NPZ file" in load_error(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        load_windows(tmp_path / "nowhere.npz")


def test_too_few_windows_name_file_key_and_counts(tmp_path):
    path = save(tmp_path / "data.npz", vectors=make_vectors(20), article=np.zeros(20, int))
    with pytest.raises(ValueError, match="too few") as caught:
        split_windows(load_windows(path))
    assert str(path) in str(caught.value)
    assert "key 'article': 15 windows in 1 article(s)" in str(caught.value)


def test_unknown_bundled_set_and_bad_context():
    with pytest.raises(ValueError, match="unknown bundled set 'poems'"):
        load_bundled("poems")
    with pytest.raises(ValueError, match="context must be at least 1"):
        load_windows(context=0)
