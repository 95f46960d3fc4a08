"""Confidence intervals of means over windows, by resampling whole articles.

Neighbouring windows share vectors, so windows are no independent draws; articles nearly are. The cluster bootstrap
(Davison & Hinkley 1997, section 3.8) draws as many articles as there are, with replacement, and takes every window of
each. Where there are too few of them to split data by, blocks of consecutive windows take their place.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from amn_kernels.data import Windows

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0


def cluster_numbers(windows: Windows, rows: np.ndarray) -> np.ndarray:
    """The cluster 0, 1, ... of each of the windows `rows`, [N]: its article.

    Where windows aren't split by article, blocks of consecutive rows: N^(1/3) rows (Künsch 1989), but at least T + 1,
    the distance from which windows share no vectors.
    """
    if windows.by_article:
        return np.unique(windows.article[rows], return_inverse=True)[1]
    return np.arange(len(rows)) // max(windows.context + 1, round(len(rows) ** (1 / 3)))


def cluster_name(windows: Windows) -> Literal["articles", "blocks"]:
    """What `cluster_numbers` makes of these windows."""
    return "articles" if windows.by_article else "blocks"


class Bootstrap:
    """One set of draws, used for every figure of a set of windows, so that differences and ratios are paired."""

    def __init__(self, clusters: np.ndarray) -> None:
        """clusters: the cluster of each window, [N], as `cluster_numbers` gives them."""
        self.clusters = clusters
        self.count = int(clusters.max()) + 1
        sizes = np.bincount(clusters)  # [C]
        equal = np.full(self.count, 1 / self.count)
        # How often each cluster was drawn, [RESAMPLES, C].
        self.draws = np.random.default_rng(SEED).multinomial(self.count, equal, size=RESAMPLES)
        self.windows = self.draws @ sizes  # [RESAMPLES]

    def means(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Values of each window, [N] by name -> their mean in every resample, [RESAMPLES] by name."""
        return {
            name: self.draws @ np.bincount(self.clusters, weights=of_windows) / self.windows
            for name, of_windows in values.items()
        }

    def interval(self, resampled: np.ndarray) -> tuple[float, float] | None:
        """The middle 95% of a figure's values over the resamples, [RESAMPLES]; None with a single cluster."""
        if self.count < 2:
            return None
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(resampled, [tail, 1 - tail])
        return float(low), float(high)
