"""Metrics and baselines against brute force."""

import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from amn_kernels.data import IndexedWindows, StoredWindows, load_bundled, load_windows, split_windows
from amn_kernels.train import metrics
from amn_kernels.train.baselines import LAST, MEAN, MIX, TRAIN_MEAN, fit_baselines, mean_of_context
from amn_kernels.train.evaluate import EvaluationSet, compare, load_ood, print_evaluations, save_evaluations
from amn_kernels.train.metrics import RetrievalTask, mean_cosine, ranks, vector_ids


def make_windows(count: int = 40, dim: int = 4, pool: int = 12, seed: int = 0) -> StoredWindows:
    """Windows drawn from a small pool of vectors, so that targets and contexts hold many exact copies."""
    order = np.random.default_rng(seed)
    vectors = order.standard_normal((pool, dim)).astype(np.float32)
    draws = order.integers(pool, size=(count, 4))
    return StoredWindows("pool", vectors[draws[:, :3]], vectors[draws[:, 3]], None)


def brute_force_rank(pred, targets, context, own, exclude: bool) -> int:
    """The documented rule, one comparison at a time."""

    def same(left, right):
        return bool((left == right).all())

    scores = [F.cosine_similarity(pred, target, dim=0).item() for target in targets]
    rank = 1
    for other, target in enumerate(targets):
        if same(target, targets[own]) or (exclude and any(same(target, vector) for vector in context)):
            continue
        # The scores of this reference and of one matrix product differ in the last bits.
        rank += scores[other] >= scores[own] - 1e-7
    return rank


@pytest.mark.parametrize("score_bytes", [1, 7 * 40 * 4, 32 << 20])
def test_ranks_match_brute_force_with_copies_and_exclusions(monkeypatch, score_bytes):
    monkeypatch.setattr(metrics, "SCORE_BYTES", score_bytes)
    windows = make_windows()
    context, targets = windows.batch(np.arange(40))
    pred = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    every, excluded = ranks(pred, targets, vector_ids(targets), vector_ids(context))
    for row in range(40):
        assert every[row] == brute_force_rank(pred[row], targets, context[row], row, exclude=False)
        assert excluded[row] == brute_force_rank(pred[row], targets, context[row], row, exclude=True)
    assert (excluded < every).any()


def test_metrics_follow_from_the_ranks():
    windows = make_windows()
    context, targets = windows.batch(np.arange(40))
    result = RetrievalTask(windows, np.arange(40)).evaluate(mean_of_context)
    pred = context.mean(dim=1)
    expected = [
        [brute_force_rank(pred[row], targets, context[row], row, exclude) for row in range(40)]
        for exclude in (False, True)
    ]
    for prefix, rank in zip(("", "excluded_"), map(np.array, expected), strict=True):
        for k in (1, 5, 10):
            assert result[f"{prefix}hit@{k}"] == pytest.approx((rank <= k).mean())
        assert result[f"{prefix}mrr"] == pytest.approx((1 / rank).mean())
    assert result["cosine"] == pytest.approx(F.cosine_similarity(pred, targets).mean().item(), abs=1e-6)


def test_ties_count_against_the_model():
    targets = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 0.0]])
    pred = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    nothing = torch.full((3, 1), -1)
    every, _ = ranks(pred, targets, vector_ids(targets), nothing)
    assert every.tolist() == [2, 2, 3]


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_prediction_without_direction_is_ranked_last(value):
    targets = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    every, excluded = ranks(torch.full((9, 4), value), targets, vector_ids(targets), torch.full((9, 2), -1))
    assert every.tolist() == excluded.tolist() == [9] * 9


def test_copies_of_the_own_target_neither_help_nor_hinder():
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    # The own target stays a candidate even where it is one of the context's vectors.
    contexts = vector_ids(targets[[0, 2, 2]])[:, None]
    pred = torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, 0.1]])
    every, excluded = ranks(pred, targets, vector_ids(targets), contexts)
    assert every.tolist() == [1, 2, 3]
    assert excluded.tolist() == [1, 1, 3]


def test_perfect_predictions_score_one():
    windows = make_windows()
    _, targets = windows.batch(np.arange(40))
    scale = torch.linspace(0.1, 10, 40)[:, None]
    result = RetrievalTask(windows, np.arange(40)).evaluate(lambda _: targets * scale)
    del result["margin"]
    assert all(value == pytest.approx(1, abs=1e-6) for value in result.values())


def test_vector_ids_are_equal_exactly_for_equal_vectors():
    vectors = torch.tensor([[1.0, 0.0], [1.0, -0.0], [1.0, 1e-30], [0.0, 1.0]])
    ids = vector_ids(vectors)
    assert ids[0] == ids[1]
    assert len(set(ids.tolist())) == 3


def test_mean_cosine_is_the_mean_over_windows_whatever_the_batches(monkeypatch):
    windows = make_windows()
    rows = np.arange(3, 40)
    context, target = windows.batch(rows)
    expected = F.cosine_similarity(context[:, -1], target).mean().item()
    monkeypatch.setattr(metrics, "PREDICT_ROWS", 8)
    assert mean_cosine(lambda batch: batch[:, -1], windows, rows) == pytest.approx(expected, abs=1e-6)


def test_mix_is_the_least_squares_optimum_on_the_training_windows(monkeypatch):
    monkeypatch.setattr("amn_kernels.train.baselines.FIT_ROWS", 16)
    order = np.random.default_rng(3)
    contexts = order.standard_normal((60, 3, 4)).astype(np.float32)
    targets = (0.7 * contexts.mean(1) - 0.2 * contexts[:, -1] + 0.1 * order.standard_normal((60, 4))).astype(np.float32)
    rows = np.arange(50)
    baselines = fit_baselines(StoredWindows("mix", contexts, targets, None), rows)
    inputs = np.stack([contexts[rows].mean(1).ravel(), contexts[rows, -1].ravel()], axis=1).astype(np.float64)
    expected = np.linalg.lstsq(inputs, targets[rows].ravel().astype(np.float64), rcond=None)[0]
    assert (baselines.mean_coefficient, baselines.last_coefficient) == pytest.approx(tuple(expected), rel=1e-5)
    torch.testing.assert_close(baselines.train_mean, torch.from_numpy(targets[rows].mean(0)), rtol=1e-5, atol=1e-6)


def test_mix_is_defined_with_one_context_vector():
    contexts = np.random.default_rng(0).standard_normal((30, 1, 4)).astype(np.float32)
    baselines = fit_baselines(StoredWindows("one", contexts, 0.5 * contexts[:, 0], None), np.arange(30))
    assert baselines.mean_coefficient + baselines.last_coefficient == pytest.approx(0.5, rel=1e-6)


def test_untrained_figures_on_the_bundled_vectors():
    windows = load_windows()
    baselines, (inside, outside) = compare({}, windows, "validation", load_windows(bundled="techdocs"))
    fitted = fit_baselines(windows, split_windows(windows).train)
    assert baselines.last_coefficient == pytest.approx(fitted.last_coefficient, rel=1e-9)
    assert (inside.windows, outside.windows) == (2476, 3225)
    cosines = {name: values["cosine"] for name, values in inside.metrics.items()}
    assert list(cosines) == [MEAN, LAST, TRAIN_MEAN, MIX]
    # Known to two digits; the split moves the third.
    assert cosines[MEAN] == pytest.approx(0.555, abs=0.01)
    assert cosines[LAST] == pytest.approx(0.446, abs=0.01)
    assert cosines[MIX] > cosines[MEAN]
    for metrics_of_set in (inside.metrics, outside.metrics):
        assert all(values["excluded_hit@10"] >= values["hit@10"] for values in metrics_of_set.values())
    # The verses' mean says nothing about the documentation.
    assert outside.metrics[TRAIN_MEAN]["cosine"] < 0.1


def test_the_bundled_documentation_is_used_where_it_fits():
    longest = int(np.unique(load_bundled("techdocs")[1], return_counts=True)[1].max())
    for context in (5, longest - 1):
        assert load_ood(None, 384, context).context == context
    for dim, context in ((8, 5), (384, longest), (8, longest)):
        assert load_ood(None, dim, context) is None


def test_margin_is_measured_from_the_last_context_vector():
    windows = make_windows()
    context, targets = windows.batch(np.arange(40))
    pred = torch.randn(40, 4, generator=torch.Generator().manual_seed(2))
    margin = RetrievalTask(windows, np.arange(40)).measure(pred)["margin"]
    for row in range(40):
        own, last = (F.cosine_similarity(pred[row], vector, dim=0) for vector in (targets[row], context[row, -1]))
        assert margin[row].item() == pytest.approx((own - last).item(), abs=1e-6)


def test_reordered_contexts_hold_the_same_vectors(monkeypatch):
    monkeypatch.setattr(metrics, "PREDICT_ROWS", 16)
    windows = make_windows()
    task = RetrievalTask(windows, np.arange(40))
    context, _ = windows.batch(np.arange(40))
    reordered = task.predict(lambda batch: batch.flatten(1), reorder=np.random.default_rng(0)).view(40, 3, 4)
    torch.testing.assert_close(reordered.sort(dim=1).values, context.sort(dim=1).values, rtol=0, atol=0)
    assert ((reordered != context).flatten(1).any(dim=1)).float().mean() > 0.5
    torch.testing.assert_close(task.predict(lambda batch: batch.flatten(1)).view(40, 3, 4), context, rtol=0, atol=0)


def by_article(articles: int = 30) -> IndexedWindows:
    """Vectors that stay near a theme of their article."""
    order = np.random.default_rng(5)
    article = np.repeat(np.arange(articles), 12)
    vectors = order.standard_normal((articles, 8))[article] + 0.5 * order.standard_normal((12 * articles, 8))
    return IndexedWindows("themes", vectors.astype(np.float32), article, context=3)


def test_skill_is_the_part_of_the_distance_that_is_removed():
    _, (inside,) = compare({"halved": lambda context: context[:, -1] + context.mean(dim=1)}, by_article(), "test", None)
    distance = {name: 1 - values["cosine"] for name, values in inside.metrics.items()}
    for skill, untrained in (("skill_mean", MEAN), ("skill_last", LAST), ("skill_train_mean", TRAIN_MEAN)):
        for name, values in inside.metrics.items():
            assert values[skill] == pytest.approx(1 - distance[name] / distance[untrained], abs=1e-9)
        # The draws are the same for both, so nothing is left of a predictor beside itself.
        assert inside.intervals[untrained][skill] == (0, 0)
    low, high = inside.intervals["halved"]["cosine"]
    assert low < inside.metrics["halved"]["cosine"] < high
    assert inside.clusters == 3


def test_few_articles_are_resampled_in_blocks():
    windows = by_article(articles=9)
    _, (inside,) = compare({}, windows, "validation", None)
    # 81 windows of which 62 are trained on and 5 validated with, by fours.
    assert (inside.windows, inside.clusters, inside.clustered_by) == (5, 2, "blocks")
    console = Console(file=io.StringIO(), soft_wrap=True, markup=False, highlight=False, width=90)
    print_evaluations(console, fit_baselines(windows, np.arange(9)), [inside])
    assert "5 windows and candidates, 2 blocks\n" in console.file.getvalue()
    assert "95%: bootstrap over blocks." in console.file.getvalue()


def test_a_right_predictor_removes_everything():
    windows = by_article()
    rows = split_windows(windows).validation
    targets = windows.batch(rows)[1]
    evaluation = EvaluationSet("set", RetrievalTask(windows, rows), fit_baselines(windows, rows))
    figures = evaluation.measure(lambda context: targets)
    assert figures.metrics["skill_mean"] == pytest.approx(1, abs=1e-6)
    assert figures.collapse.verdict == "healthy"
    assert figures.collapse.spread == pytest.approx(1, abs=1e-6)


def test_verdicts_on_the_bundled_vectors():
    windows = load_windows()

    def stays_home(context):
        """What a model without the mean of the context does: it knows the directions of its training text only."""
        return 0.2 * context.mean(dim=1) @ basis @ basis.T + fitted.train_mean

    fitted = fit_baselines(windows, split_windows(windows).train)
    basis = fitted.train_subspace.basis.float()
    ood = load_windows(bundled="techdocs")
    _, (inside, outside) = compare({"home": stays_home}, windows, "validation", ood)
    for evaluation in (inside, outside):
        assert evaluation.collapse[TRAIN_MEAN].verdict == "collapsed"
        for name in (MEAN, LAST, MIX):
            assert evaluation.collapse[name].verdict == "healthy"
        assert evaluation.collapse[MEAN].order_sensitivity == pytest.approx(0, abs=1e-6)
        assert evaluation.collapse[LAST].order_sensitivity > 0.3
    assert inside.metrics["home"]["cosine"] > inside.metrics[TRAIN_MEAN]["cosine"]
    assert outside.metrics["home"]["skill_mean"] < -0.5
    assert "it stays in the subspace of the training text (100% of its energy" in outside.collapse["home"].words
    assert outside.collapse["home"].target_subspace < 0.6 < 0.85 < inside.collapse["home"].target_subspace


def test_figures_of_a_single_window_and_json_without_nan(tmp_path):
    windows = by_article()
    task = RetrievalTask(windows, split_windows(windows).validation[:1])
    evaluation = EvaluationSet("one", task, fit_baselines(windows, split_windows(windows).train)).evaluate(
        {"nothing": lambda context: context[:, 0] * float("nan")}
    )
    assert evaluation.collapse == {}
    assert set(evaluation.intervals[MEAN].values()) == {None}
    baselines, evaluations = compare({"nothing": lambda context: context[:, 0] * float("nan")}, windows, "test", None)
    assert evaluations[0].collapse["nothing"].verdict == "not finite"
    save_evaluations(tmp_path / "figures.json", baselines, evaluations)

    def refuse(name):
        raise AssertionError(name)

    content = json.loads((tmp_path / "figures.json").read_text(), parse_constant=refuse)["evaluations"][0]
    assert content["metrics"]["nothing"]["cosine"] is None
    assert content["metrics"][MEAN]["cosine"] == evaluations[0].metrics[MEAN]["cosine"]
    assert content["collapse"][TRAIN_MEAN]["verdict"] == "collapsed"


def test_printed_tables_say_it_in_words():
    baselines, evaluations = compare(
        {"home": lambda context: torch.ones_like(context[:, 0])}, by_article(), "test", None
    )
    console = Console(file=io.StringIO(), soft_wrap=True, markup=False, highlight=False, width=90)
    print_evaluations(console, baselines, evaluations)
    printed = console.file.getvalue()
    assert "themes, test: 27 windows and candidates, 3 articles\n" in printed
    assert "95%: bootstrap over articles." in printed
    assert "home: collapsed: different contexts get nearly the same prediction" in printed
    low, high = evaluations[0].intervals[MEAN]["cosine"]
    assert f"{low:.3f} ... {high:.3f}" in printed
    assert f"{evaluations[0].metrics[LAST]['skill_mean']:.3f}" in printed
    assert "least squares on the training windows of themes" in printed
