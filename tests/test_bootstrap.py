"""Intervals by resampling articles, against what is known of them."""

import numpy as np
import pytest

from amn_kernels.data import StoredWindows, load_windows, split_windows
from amn_kernels.train.bootstrap import RESAMPLES, Bootstrap, cluster_name, cluster_numbers


def stored(count: int, article) -> StoredWindows:
    vectors = np.ones((count, 4), dtype=np.float32)
    return StoredWindows("ones", np.ones((count, 3, 4), dtype=np.float32), vectors, article)


def test_clusters_are_the_articles_of_the_rows():
    article = np.array([7, 7, 3, 3, 3, 9, *range(10, 17)])
    windows = stored(len(article), article)
    assert cluster_numbers(windows, np.array([0, 2, 4, 5])).tolist() == [1, 0, 0, 2]
    assert cluster_name(windows) == "articles"


@pytest.mark.parametrize("article", [None, np.arange(1000) * 9 // 1000])
def test_windows_that_are_split_by_blocks_are_resampled_by_blocks(article):
    """Few articles would be one or two clusters of the validation windows, and so no interval or none to believe."""
    windows = stored(1000, article)
    clusters = cluster_numbers(windows, split_windows(windows).validation)
    assert clusters.max() + 1 == 20  # 97 windows by fives
    assert cluster_name(windows) == "blocks"


@pytest.mark.parametrize(("count", "length"), [(40, 4), (1000, 10)])
def test_without_articles_blocks_share_no_vectors_with_the_next_but_one(count, length):
    clusters = cluster_numbers(stored(count, None), np.arange(count))
    assert np.bincount(clusters)[:-1].tolist() == [length] * (len(np.unique(clusters)) - 1)


def test_resampled_means_are_those_of_whole_clusters():
    clusters, values = np.array([0, 0, 1, 2, 2, 2]), np.array([1.0, 2.0, 5.0, 7.0, 8.0, 9.0])
    bootstrap = Bootstrap(clusters)
    means = bootstrap.means({"value": values})["value"]
    for draw, mean in list(zip(bootstrap.draws, means, strict=True))[:50]:
        assert draw.sum() == 3
        rows = np.concatenate([np.tile(values[clusters == cluster], times) for cluster, times in enumerate(draw)])
        assert mean == pytest.approx(rows.mean())


def test_windows_that_are_alike_within_articles_do_not_narrow_the_interval():
    """Fifty equal windows an article tell no more than one: the width is that of 100 articles, not of 5,000 windows."""
    of_article = np.random.default_rng(0).standard_normal(100)
    clusters = np.repeat(np.arange(100), 50)
    bootstrap = Bootstrap(clusters)
    low, high = bootstrap.interval(bootstrap.means({"value": of_article[clusters]})["value"])
    assert high - low == pytest.approx(2 * 1.96 * of_article.std() / np.sqrt(100), rel=0.1)
    assert low < of_article.mean() < high


def test_the_interval_holds_the_truth_as_often_as_it_says():
    held = 0
    for seed in range(200):
        order = np.random.default_rng(seed)
        clusters = np.repeat(np.arange(60), order.integers(1, 20, size=60))
        values = order.standard_normal(60)[clusters] + order.standard_normal(len(clusters))
        bootstrap = Bootstrap(clusters)
        low, high = bootstrap.interval(bootstrap.means({"value": values})["value"])
        held += low < 0 < high
    # 95% of 200 within 3 standard deviations, and one percent for the bootstrap's known narrowness.
    assert 0.88 <= held / 200 <= 1.0


def test_one_cluster_has_no_interval():
    bootstrap = Bootstrap(np.zeros(5, dtype=int))
    assert bootstrap.interval(bootstrap.means({"value": np.arange(5.0)})["value"]) is None


def test_draws_are_the_same_every_time_so_that_differences_are_paired():
    windows = load_windows()
    clusters = cluster_numbers(windows, split_windows(windows).validation)
    values = {"value": np.random.default_rng(0).random(len(clusters))}
    first, second = (Bootstrap(clusters).means(values)["value"] for _ in range(2))
    assert len(first) == RESAMPLES
    np.testing.assert_array_equal(first, second)
