"""The harness of the benchmarks on a GPU, run on the CPU: that it measures, tells what failed, and draws."""

import json
import statistics

import torch

from amn_kernels import FusedSeqLoss
from bench import contenders, gpu
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
    figures = gpu.measure(losses, pred, target, rounds=12)
    assert len(turns) == 36
    assert all(turns.count(run) == 12 for run in set(turns))
    assert len(set(turns[::3])) == 3  # none is always the first of its round
    assert sum(figure["seconds"] for figure in figures.values()) > 3 * statistics.median([1, 2, 3])


def test_contenders_on_the_cpu():
    found, left_out = gpu.contenders(gpu.INFONCE, "cpu")
    assert {"cpu", "cpu, balanced", "eager", "torch.compile"} == set(found)
    assert set(left_out) == set(gpu.PEERS)


def test_peers_are_left_out_with_a_reason_where_they_are_not_installed(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    _, left_out = gpu.contenders(gpu.INFONCE, "cuda")
    assert left_out["Inf-CL (TF32, both gradients)"] == "inf_cl is not installed"


def test_peers_are_given_cosines_over_temperature():
    pred, target = inputs(6, 5)
    queries, keys, labels = gpu._units(pred.detach(), target)
    ours = FusedSeqLoss(mse=0.0, infonce=1.0, temperature=gpu.TEMPERATURE, weighting="fixed")(pred, target)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(queries @ keys.mT, labels), ours.detach())


def test_a_peer_that_can_not_be_imported_is_left_out(monkeypatch):
    def broken():
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu, "BACKENDS", {})
    monkeypatch.setattr(gpu, "PEERS", {"peer": ("peer", broken)})
    found, left_out = gpu.contenders(gpu.INFONCE, "cuda")
    assert "peer" not in found
    assert left_out == {"peer": "OSError: libcudart.so.12: cannot open shared object file"}


def test_compilation_has_room_for_every_shape():
    """One compiled loss for all shapes and dtypes of a kind: more of them than torch keeps by default."""
    losses = {"torch.compile": contenders.compiled(lambda pred, target: ((pred - target) ** 2).sum())}
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in (3, 4, 5, 6):
            assert "seconds" in gpu.measure(losses, *inputs(rows, 2), rounds=1)["torch.compile"]


def test_a_contender_that_fails_while_it_is_timed_leaves_the_others_their_rounds():
    calls = []

    def tires(pred, target):
        calls.append(0)
        if len(calls) > 6:
            raise RuntimeError("out of memory")
        return pred.sum()

    figures = gpu.measure({"a": lambda p, t: p.sum(), "tires": tires, "c": lambda p, t: p.sum()}, *inputs(2, 3), 5)
    assert figures["tires"] == {"error": "RuntimeError: out of memory"}
    assert all(figures[name]["seconds"] > 0 for name in "ac")


def test_differences_from_the_first_contender_are_told():
    losses = {
        "first": lambda pred, target: (pred * target).sum(),
        "half": lambda pred, target: (pred * target).sum() / 2,
        "its own" + gpu.BALANCED: lambda pred, target: pred.sum(),
    }
    figures = gpu.measure(losses, *inputs(5, 3), rounds=1)
    assert figures["first"]["difference"] == {"from": "first", "value": 0.0, "gradient": 0.0}
    assert figures["half"]["difference"] == {"from": "first", "value": 0.5, "gradient": 0.5}
    assert "difference" not in figures["its own" + gpu.BALANCED]


def test_nothing_more_is_run_on_a_device_that_failed(monkeypatch):
    broken, ran = [], []

    def breaks(pred, target):
        broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    losses = {"a": lambda p, t: p.sum(), "breaks": breaks, "c": lambda p, t: ran.append(0) or p.sum()}
    monkeypatch.setattr(gpu, "answers", lambda device: not broken)
    monkeypatch.setattr(gpu, "contenders", lambda terms, device: (losses, {}))
    (entry,) = gpu.measured("cpu", (4, 8), rounds=2, dim=3)
    assert {name: figures["error"].split(":")[0] for name, figures in entry["contenders"].items()} == {
        "a": "not timed",
        "breaks": "RuntimeError",
        "c": "not timed",
    }
    assert not ran


def test_every_entry_is_written_at_once_and_others_are_kept(tmp_path, monkeypatch):
    """An interruption loses nothing; the same cell is replaced, one of another card is not."""
    path, result = tmp_path / "figures.json", {"entries": []}
    monkeypatch.setattr(gpu, "contenders", lambda terms, device: ({"a": lambda p, t: p.sum()}, {}))
    entries = gpu.measured("cpu", (4, 8), rounds=1, kinds=["all"], dtypes=["bf16"], dim=3)
    gpu.keep(result, entry := next(entries), path)
    assert [e["rows"] for e in json.loads(path.read_text())["entries"]] == [4]
    gpu.keep(result, {**entry, "machine": {"device": "cuda", "name": "other"}}, path)
    gpu.keep(result, {**entry, "contenders": {}}, path)
    assert [(e["machine"].get("name"), len(e["contenders"])) for e in json.loads(path.read_text())["entries"]] == [
        ("other", 1),
        (None, 0),
    ]


def test_the_cells_asked_for_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "contenders", lambda terms, device: ({"a": lambda p, t: p.sum()}, {}))
    for rows in ("4", "8"):
        options = ["--device", "cpu", "--rows", rows, "--kinds", "infonce", "--dtypes", "bf16", "--out", str(tmp_path)]
        monkeypatch.setattr("sys.argv", ["bench.gpu", *options])
        gpu.main()
    entries = json.loads((tmp_path / "gpu.json").read_text())["entries"]
    assert [(e["kind"], e["dtype"], e["rows"]) for e in entries] == [("infonce", "bf16", 4), ("infonce", "bf16", 8)]


def test_figures_are_printed_drawn_and_json(tmp_path, monkeypatch, capsys):
    def few(terms, device):
        return {"cpu": FusedSeqLoss(backend="cpu"), "peer": failing}, {"other": "it is not installed"}

    monkeypatch.setattr(gpu, "contenders", few)
    result = json.loads(json.dumps({"entries": list(gpu.measured("cpu", (4, 8), rounds=2, dim=6))}))
    assert len(result["entries"]) == 8
    gpu.plot(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    gpu.print_table(result)
    printed = capsys.readouterr().out
    assert "no such kernel" in printed
    assert "Left out: other (it is not installed)" in printed


def test_a_contender_of_16_bits_is_left_out_of_float32(monkeypatch):
    (name,) = gpu.OF_16_BITS
    monkeypatch.setattr(gpu, "contenders", lambda terms, device: ({name: lambda p, t: p.sum()}, {"b": "not there"}))
    single, half = gpu.measured("cpu", (4,), rounds=1, kinds=["infonce"], dim=3)
    assert single["contenders"] == {}
    assert single["left_out"] == {"b": "not there", f"{name} in fp32": "its backward takes 16 bits only"}
    assert [*half["contenders"]] == [name]
    assert half["left_out"] == {"b": "not there"}


def test_the_plot_says_what_was_measured(tmp_path, monkeypatch):
    import matplotlib.figure

    told = []
    monkeypatch.setattr(matplotlib.figure.Figure, "suptitle", lambda self, text: told.append(text))
    monkeypatch.setattr(gpu, "contenders", lambda terms, device: ({"a": lambda p, t: p.sum()}, {}))
    gpu.plot({"entries": list(gpu.measured("cpu", (4,), rounds=1, kinds=["all"], dim=6))}, tmp_path / "figure.png")
    assert told == ["Forward + backward, called from Python, D = 6"]
