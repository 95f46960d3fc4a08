"""The loss equals other libraries' where they define the same thing: values, gradients of pred and of target."""

import pytest
import torch
from error_rule import make_rows, relative_error

from amn_kernels import functional

peers = pytest.importorskip("bench.peers", reason="the peers extra and open_clip_torch are not installed")

N, D, TEMPERATURE, MARGIN = 65, 24, 0.1, 0.6
IDS = torch.arange(N) % 9


def hard_negatives():
    return make_rows(2 * N, D, seed=5)[0]


def cases():
    """Name: (peer, our options, our tensors)."""
    return {
        "open_clip ClipLoss": (peers.clip(TEMPERATURE), {"direction": "both"}, {}),
        "MultipleNegativesRankingLoss": (peers.ranking(TEMPERATURE), {}, {}),
        "MultipleNegativesRankingLoss, both": (peers.ranking(TEMPERATURE, both=True), {"direction": "both"}, {}),
        "MultipleNegativesRankingLoss, hard negatives": (
            peers.ranking(TEMPERATURE, extra_negatives=hard_negatives()),
            {},
            {"extra_negatives": hard_negatives()},
        ),
        "CachedMultipleNegativesRankingLoss": (peers.cached_ranking(TEMPERATURE, rows=10), {}, {}),
        "CachedMultipleNegativesRankingLoss, both": (
            peers.cached_ranking(TEMPERATURE, both=True, rows=10),
            {"direction": "both"},
            {},
        ),
        "cut-cross-entropy": (peers.cut_cross_entropy(TEMPERATURE), {}, {}),
        "linear_cross_entropy": (peers.linear_cross_entropy(TEMPERATURE), {}, {}),
        "linear_cross_entropy, chunked": (peers.linear_cross_entropy(TEMPERATURE, chunked=True), {}, {}),
        "GISTEmbedLoss": (peers.gist(TEMPERATURE, MARGIN), {"false_negative_margin": MARGIN}, {}),
        "NTXentLoss": (peers.ntxent(TEMPERATURE), {}, {}),
        "SupConLoss": (peers.supcon(TEMPERATURE, IDS), {"positives": "ids"}, {"ids": IDS}),
    }


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", cases())
def test_equals_peer(name, backend):
    pred, target = make_rows(N, D, distance=0.8)
    peer, options, tensors = cases()[name]

    def ours(pred, target):
        loss, _ = functional.seq_loss(
            pred,
            target,
            mse=0.0,
            infonce=1.0,
            temperature=TEMPERATURE,
            weighting="fixed",
            backend=backend,
            **options,
            **tensors,
        )
        return loss

    theirs = peers.gradients(peer, pred, target)
    for got, wanted in zip(peers.gradients(ours, pred, target), theirs, strict=True):
        assert relative_error(got, wanted) <= 1e-6  # norm-wise; float32 on both sides


def test_equals_lightly():
    """SimCLR: of 2N views each is a query, its partner the positive, all others but itself negatives."""
    pred, target = make_rows(N, D, distance=0.8)
    ids = torch.arange(N).repeat(2)  # excludes the view itself among the keys

    def ours(pred, target):
        queries, keys = torch.cat([pred, target]), torch.cat([target, pred])
        return functional.seq_loss(
            queries, keys, ids=ids, mse=0.0, infonce=1.0, temperature=TEMPERATURE, weighting="fixed"
        )[0]

    theirs = peers.gradients(peers.simclr(TEMPERATURE), pred, target)
    for got, wanted in zip(peers.gradients(ours, pred, target), theirs, strict=True):
        assert relative_error(got, wanted) <= 1e-6


def test_the_cases_do_what_they_say():
    """Margin, hard negatives, second direction and ids each change the value, or equality would show nothing."""
    pred, target = make_rows(N, D, distance=0.8)
    plain = peers.ntxent(TEMPERATURE)(pred, target)
    for name, (peer, options, tensors) in cases().items():
        if options or tensors:
            assert abs(peer(pred, target) - plain) > 1e-3, name


def test_who_falls_far_behind_is_not_run_with_more_rows():
    from bench.grid import LONGEST, OURS, too_slow

    def cell(rows, **seconds):
        contenders = {name: {"seconds": s} for name, s in {OURS: LONGEST / 5, **seconds}.items()}
        return {"contest": "both", "rows": rows, "dim": 8, "dtype": "bfloat16", "contenders": contenders}

    cells = [cell(32, late=LONGEST / 2, long=1.5 * LONGEST, near=0.1), cell(64, late=3 * LONGEST, near=0.1)]
    assert too_slow(cells, "both", 64, 8, "bfloat16") == set()  # 1.5 LONGEST is long, but 7.5 times fused
    assert too_slow(cells, "both", 128, 8, "bfloat16") == {"late"}
    assert too_slow(cells, "both", 128, 9, "bfloat16") == too_slow(cells, "clip", 128, 8, "bfloat16") == set()
