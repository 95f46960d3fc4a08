"""The harness of the benchmarks on a GPU, run on the CPU: that it measures, tells what failed, and draws."""

import json
import statistics

import torch

from amn_kernels import FusedSeqLoss
from bench import gpu
from bench.contenders import ALL_TERMS, inputs


def failing(pred, target):
    raise RuntimeError("no such kernel\nand more")


def test_a_contender_that_fails_is_told_and_the_others_are_measured():
    pred, target = inputs(16, 8)
    losses = {"cpu": FusedSeqLoss(**ALL_TERMS, weighting="fixed", backend="cpu"), "peer": failing}
    figures = gpu.measure(losses, pred, target, rounds=3)
    assert figures["peer"] == {"error": "RuntimeError: no such kernel"}
    assert figures["cpu"]["seconds"] > 0
    assert figures["cpu"]["bytes"] is None


def test_every_contender_has_as_many_turns(monkeypatch):
    turns = []
    monkeypatch.setattr(gpu, "_wall_seconds", lambda run: turns.append(run) or float(len(turns)))
    pred, target = inputs(4, 3)
    losses = {name: FusedSeqLoss(backend="cpu") for name in "abc"}
    figures = gpu.measure(losses, pred, target, rounds=5)
    assert len(turns) == 15
    assert all(turns.count(run) == 5 for run in set(turns))
    assert len(set(turns[::3])) == 3  # none is always the first of its round
    assert sum(figure["seconds"] for figure in figures.values()) > 3 * statistics.median([1, 2, 3])


def test_contenders_on_the_cpu():
    found, left_out = gpu.contenders(gpu.INFONCE, "cpu")
    assert {"cpu", "cpu, balanced", "eager", "torch.compile"} == set(found)
    assert set(left_out) == set(gpu.PEERS)


def test_peers_are_left_out_with_a_reason_where_they_are_not_installed(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    _, left_out = gpu.contenders(gpu.INFONCE, "cuda")
    assert left_out["Inf-CL"] == "inf_cl is not installed"


def test_peers_are_given_cosines_over_temperature():
    pred, target = inputs(6, 5)
    queries, keys, labels = gpu._units(pred.detach(), target)
    ours = FusedSeqLoss(mse=0.0, infonce=1.0, temperature=gpu.TEMPERATURE, weighting="fixed")(pred, target)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(queries @ keys.mT, labels), ours.detach())


def test_figures_are_printed_drawn_and_json(tmp_path, monkeypatch, capsys):
    def few(terms, device):
        return {"cpu": FusedSeqLoss(backend="cpu"), "peer": failing}, {"other": "it is not installed"}

    monkeypatch.setattr(gpu, "contenders", few)
    result = json.loads(json.dumps(gpu.benchmark("cpu", (4, 8), rounds=2, dim=6)))
    assert len(result["entries"]) == 8
    gpu.plot(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    gpu.print_table(result)
    printed = capsys.readouterr().out
    assert "no such kernel" in printed
    assert "Left out: other (it is not installed)" in printed
