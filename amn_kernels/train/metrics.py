"""Cosine and retrieval metrics of next-vector predictors.

Ranking: the candidates are all targets of the evaluated windows, by cosine with the prediction. A window's rank is 1
plus the number of other candidates that score at least as high, so ties count against the model, and so does NaN.
Candidates that are exact copies of the window's own target are right answers too: they neither help nor hinder. In the
second ranking, candidates that are exact copies of one of the window's context vectors are left out; the own target
never is.
"""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from amn_kernels.data import Windows
from amn_kernels.train.baselines import PredictFunction

HITS = (1, 5, 10)
PREDICT_ROWS = 1024
# Of the [chunk, N] score matrix.
SCORE_BYTES = 32 << 20


@torch.no_grad()
def mean_cosine(
    predictor: PredictFunction, windows: Windows, rows: np.ndarray, device: torch.device | str = "cpu"
) -> float:
    """Mean over the windows `rows` of the cosine between prediction and target; needs a model in eval mode."""
    total = 0.0
    for start in range(0, len(rows), PREDICT_ROWS):
        context, target = (tensor.to(device) for tensor in windows.batch(rows[start : start + PREDICT_ROWS]))
        total += F.cosine_similarity(predictor(context), target, dim=1).double().sum().item()
    return total / len(rows)


class RetrievalTask:
    """The targets of the windows `rows`, with what ranking needs; made once and used for every predictor."""

    def __init__(self, windows: Windows, rows: np.ndarray) -> None:
        """Reads the windows once. N = len(rows)."""
        self.windows, self.rows = windows, rows
        targets, last, target_ids, context_ids = [], [], [], []
        for start in range(0, len(rows), PREDICT_ROWS):
            context, target = windows.batch(rows[start : start + PREDICT_ROWS])
            targets.append(target)
            last.append(context[:, -1])
            target_ids.append(vector_ids(target))
            context_ids.append(vector_ids(context))
        self.targets = torch.cat(targets)  # [N, D]
        self.last = torch.cat(last)  # [N, D]
        self.target_ids = torch.cat(target_ids)  # [N]
        self.context_ids = torch.cat(context_ids)  # [N, T]

    @torch.no_grad()
    def predict(self, predictor: PredictFunction, reorder: np.random.Generator | None = None) -> Tensor:
        """Predictions [N, D]; with `reorder`, for contexts whose T vectors stand in a random other order."""
        pred = []
        for start in range(0, len(self.rows), PREDICT_ROWS):
            context, _ = self.windows.batch(self.rows[start : start + PREDICT_ROWS])
            if reorder is not None:
                order = torch.from_numpy(reorder.random(context.shape[:2])).argsort(dim=1)  # [B, T]
                context = context.take_along_dim(order[:, :, None], dim=1)
            pred.append(predictor(context))
        return torch.cat(pred)

    def measure(self, pred: Tensor) -> dict[str, Tensor]:
        """The metrics of each window, [N] float64, by name.

        pred: [N, D]. `cosine`; `hit@1`, `hit@5`, `hit@10` (0 or 1) and `mrr` (1 / rank); the same four as
        `excluded_...`, with the context left out; `margin`: the cosine with the target minus that with the context's
        last vector, negative where the prediction is rather a copy of what was there.
        """
        cosine = F.cosine_similarity(pred, self.targets, dim=1).double()
        metrics = {"cosine": cosine, "margin": cosine - F.cosine_similarity(pred, self.last, dim=1).double()}
        every, excluded = ranks(pred, self.targets, self.target_ids, self.context_ids)
        for prefix, rank in (("", every), ("excluded_", excluded)):
            metrics |= {f"{prefix}hit@{k}": (rank <= k).double() for k in HITS}
            metrics[f"{prefix}mrr"] = 1 / rank.double()
        return metrics

    def evaluate(self, predictor: PredictFunction) -> dict[str, float]:
        """The means of `measure` over the windows."""
        return {name: values.mean().item() for name, values in self.measure(self.predict(predictor)).items()}


def vector_ids(vectors: Tensor) -> Tensor:
    """[..., D] float32 -> [...] int64: equal for equal vectors, and different (to 1 in 2^64) for others."""
    # Adding 0.0 makes -0.0 and 0.0 the same bytes.
    rows = (vectors.flatten(0, -2) + 0.0).numpy()
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return torch.from_numpy(np.frombuffer(digests, dtype=np.int64).copy()).view(vectors.shape[:-1])


def ranks(pred: Tensor, targets: Tensor, target_ids: Tensor, context_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks [N] int64 among all candidates, and with each window's context vectors left out.

    pred, targets: [N, D]; target_ids: [N]; context_ids: [N, T], as vector_ids gives them. The module's text has the
    rule. Works on row chunks of [chunk, N] scores of at most 32 MiB.
    """
    candidates = F.normalize(targets, dim=1)
    sorted_ids, order = target_ids.sort()
    chunk = max(1, SCORE_BYTES // (4 * len(targets)))
    every, excluded = [], []
    for start in range(0, len(pred), chunk):
        own = slice(start, start + chunk)
        scores = F.normalize(pred[own], dim=1) @ candidates.T  # [chunk, N]
        own_scores = scores.diagonal(offset=start)[:, None]
        # Negated so that NaN, for which every comparison is false, counts as beaten.
        ahead = ~(scores < own_scores)
        ahead[_copies(target_ids[own, None], sorted_ids, order)] = False
        every.append(1 + ahead.sum(dim=1))
        ahead[_copies(context_ids[own], sorted_ids, order)] = False
        excluded.append(1 + ahead.sum(dim=1))
    return torch.cat(every), torch.cat(excluded)


def _copies(ids: Tensor, sorted_ids: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of all pairs (row of `ids`, candidate) with an equal id.

    ids: [chunk, T]; sorted_ids: [N] ascending, order: [N] the candidates' numbers in that order.
    """
    flat = ids.flatten()
    first = torch.searchsorted(sorted_ids, flat)
    counts = torch.searchsorted(sorted_ids, flat, right=True) - first
    pair = torch.repeat_interleave(torch.arange(len(flat)), counts)
    # Position of each pair within its own run of equal ids.
    offset = torch.arange(len(pair)) - (counts.cumsum(0) - counts)[pair]
    return pair // ids.shape[1], order[first[pair] + offset]
