"""What the benchmarks rest on: equality before timing, turns, fits, pages that show the files and nothing else."""

import collections
import itertools
import json
import re

import pytest
import torch

pytest.importorskip("bench.contests", reason="the peers extra and open_clip_torch are not installed")

from bench import contenders, contests, grid, profile, report, timing


def test_equality_notices_another_temperature():
    """Each contender of a contest computes what the fused loss does; one that does not is named."""
    contest = contests.CONTESTS["both"]
    pred, target = contests.make_inputs(17, 8, torch.float32, contest.target_learns)
    losses = {name: loss for name, loss in contest.contenders(17).items() if "compile" not in name}
    assert max(contests.check_equal(losses, pred, target).values()) <= 1e-4
    losses["colder"] = contests.peers.clip(contests.TEMPERATURE * 1.01)
    with pytest.raises(AssertionError, match="colder"):
        contests.check_equal(losses, pred, target)


class NotANumber(torch.autograd.Function):
    """The identity with a gradient that is none."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


@pytest.mark.parametrize("side", [0, 1])
def test_equality_notices_a_gradient_that_is_no_number(side):
    pred, target = contests.make_inputs(17, 8, torch.float32, True)

    def bad(*rows):
        return contests.plain_both(*(NotANumber.apply(x) if i == side else x for i, x in enumerate(rows)))

    with pytest.raises(AssertionError, match="bad: gradients differ by nan"):
        contests.check_equal({"fused": contests.fused(direction="both"), "bad": bad}, pred, target)


def test_figures_of_two_machines_are_not_mixed(tmp_path):
    path = tmp_path / "peers.json"
    assert grid.start(path)["machine"] == report.machine()
    before = {"times": [1], "memory": [], "alone": [], "machine": report.machine()}
    path.write_text(json.dumps(before))
    assert grid.start(path) == before
    path.write_text(json.dumps({**before, "machine": {**report.machine(), "cores": 96}}))
    with pytest.raises(ValueError, match=r"another machine \(cores 96, here \d+\): write elsewhere with --json"):
        grid.start(path)


def test_figures_written_elsewhere_leave_the_pages_alone(tmp_path, monkeypatch):
    rendered = []
    monkeypatch.setattr(report, "render", lambda: rendered.append(True))
    options = ["--contests", "--memory-rows", "--most-rows", "0", "--json"]
    monkeypatch.setattr("sys.argv", ["bench.grid", *options, str(tmp_path / "peers.json")])
    grid.main()
    assert not rendered
    monkeypatch.setattr(report, "PEERS", tmp_path / "own.json")
    monkeypatch.setattr("sys.argv", ["bench.grid", *options, str(tmp_path / "own.json")])
    grid.main()
    assert rendered


def test_a_step_after_other_work_is_timed_by_the_same_clock(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(timing, "_clock", lambda: float(next(ticks)))
    assert profile.after_other_work(4, times=3) == 1.0


def test_a_contender_that_is_no_longer_compiled_is_an_error():
    double = contenders.compiled(lambda x: 2 * x)
    with torch._dynamo.config.patch(recompile_limit=1):
        double(torch.ones(2))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            double(torch.ones(3))


def test_exponent_of_a_power_law():
    """Only the larger half counts: a fixed cost at small sizes does not bend the fit."""
    assert report.peers.exponent({2**k: 7.0 * 4**k for k in range(5, 12)}) == pytest.approx(2)
    assert report.peers.exponent({32: 1.0, 64: 1.0, 1024: 1.0, 2048: 4.0, 4096: 16.0}) == pytest.approx(2)
    assert report.peers.exponent({32: 1.0}) is None


def test_turns(monkeypatch):
    """All take part in every round, but a long one only in the first; a turn is several calls of a short one."""
    now, calls = [0.0], []
    monkeypatch.setattr(timing, "_clock", lambda: now[0])

    def contender(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds

        return run

    runs = {"base": contender("base", 0.001), "other": contender("other", 0.002), "slow": contender("slow", 0.1)}
    times = timing.interleaved(runs, seconds=0.5, least=2)
    rounds = len(times["base"])
    assert len(times["other"]) == rounds > len(times["slow"]) == 2
    assert calls.count("base") == 2 + 5 * rounds  # 2 to warm up and to see how long a call takes; turns of 5 ms
    calls.clear()
    rounds = len(timing.interleaved(runs, seconds=0.5, least=2, settle=3)["base"])
    assert calls.count("base") == 2 + 8 * rounds
    result = timing.summary(times, "base")
    assert {name: round(r["ratio"]) for name, r in result.items()} == {"base": 1, "other": 2, "slow": 100}
    assert result["other"]["seconds"] == pytest.approx(0.002)


def test_contenders_come_after_each_other_equally_often(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing, "_clock", lambda: now[0])

    def contender(name):
        def run():
            calls.append(name)
            now[0] += timing.TURN

        return run

    timing.interleaved({name: contender(name) for name in "abcd"}, seconds=1000 * 4 * timing.TURN)
    pairs = collections.Counter(itertools.pairwise(calls))
    shares = {(a, b): n / calls.count(b) for (a, b), n in pairs.items() if a != b}
    assert len(shares) == 12
    assert all(0.2 < share < 0.4 for share in shares.values()), shares


def test_parts_of_the_profile_add_up():
    """Arithmetic and overhead of the table are the whole step, and each share is of it."""
    names = (
        "matrix products",
        "row_stats",
        "softmax_rows_",
        "row_dots",
        "term_sums",
        "row_combine",
        "Python",
        "engine",
    )
    seconds = {name: (i + 1) * 1e-6 for i, name in enumerate(names)}
    machine = {"torch": "2", "threads": 1, "cores": 1, "isa": "avx2", "clock": "wall time"}
    sizes = [{"rows": 32, "seconds": {**seconds, "step": 36e-6}, "after other work": 50e-6}]
    table = report.terms.profile_section({"machine": machine, "load": 0.0, "sizes": sizes})
    assert "| **arithmetic** | **21 (58%)** |" in table
    assert "| **overhead** | **15 (42%)** |" in table
    assert "| Python | 7 (19%) |" in table


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """What render() writes, in a folder of the test: the README as it is, and no page yet."""
    monkeypatch.setattr(report, "PLOT", tmp_path / report.PLOT.name)
    for name in ("README", "PAGE"):
        monkeypatch.setattr(report, name, tmp_path / getattr(report, name).name)
    report.README.write_text((report.ROOT / "README.md").read_text())
    return tmp_path


@pytest.mark.skipif(
    not all(path.exists() for path in (report.TERMS, report.PROFILE, report.TRAIN, report.PEERS)),
    reason="not all was measured",
)
def test_rendering_changes_nothing(copies):
    """README.md and docs/bench.md show the files and nothing else, however often they are rendered."""
    report.render()
    assert report.README.read_text() == (report.ROOT / "README.md").read_text()
    assert report.PAGE.read_text() == (report.ROOT / "docs/bench.md").read_text()
    assert report.PLOT.read_bytes().startswith(b"\x89PNG")


def test_rendering_replaces_what_is_between_the_markers(copies):
    text = report.README.read_text()
    for name in ("terms", "train", "peers"):
        opening = f"<!-- bench:{name} -->"
        before, after = text.split(opening)
        text = f"{before}{opening}an older figure{after}"
    report.README.write_text(text)
    report.render()
    assert "an older figure" not in report.README.read_text()
    report.README.write_text(text.replace("<!-- bench:terms -->", ""))
    with pytest.raises(ValueError, match="bench:terms"):
        report.render()


def test_what_was_not_measured_is_left_out_of_the_page(copies, monkeypatch):
    monkeypatch.setattr(report, "TERMS", copies / "terms.json")
    monkeypatch.setattr(report, "PEERS", copies / "peers.json")
    monkeypatch.setattr(report, "TRAIN", copies / "train_step.json")
    readme = report.README.read_text()
    report.render()
    assert re.findall("^## (.*)", report.PAGE.read_text(), flags=re.M) == ["Where the time of a step goes"]
    assert report.README.read_text() == readme
    assert not report.PLOT.exists()


@pytest.mark.parametrize(
    ("slow", "says"),
    [
        (1.2, "fused was faster in all 3 comparisons. The worst ratio is 1.20x, against slow at 64 rows, D = 768"),
        (
            1.04,
            "fused was faster in all 3 comparisons, in 1 of them by less than the noise (the lower quartile of the "
            "ratio is not above 1). The worst ratio is 1.04x, against slow at 64 rows, D = 768",
        ),
        (0.97, "fused was faster in 2 of 3 comparisons. The worst ratio is 0.97x, against slow at 64 rows, D = 768"),
    ],
)
def test_the_verdict_names_the_worst_ratio(slow, says):
    def cell(rows, **ratios):
        contenders = {
            name: {"ratio": ratio, "quartiles": [ratio - 0.1, ratio + 0.1]}
            for name, ratio in {"fused": 1.0, **ratios}.items()
        }
        return {"contest": "both", "rows": rows, "dim": 768, "dtype": "float32", "contenders": contenders}

    summary = report.peers.summary({"times": [cell(32, slow=1.5), cell(64, slow=slow, other=2.0)]}).replace("\n", " ")
    assert "against 2 other implementations" in summary
    assert says in summary


def test_the_closest_contender_of_every_cell_is_shown():
    def cell(rows, dtype, **ratios):
        contenders = {name: {"ratio": ratio} for name, ratio in {"fused": 1.0, **ratios}.items()}
        return {"contest": "both", "rows": rows, "dim": 768, "dtype": dtype, "contenders": contenders}

    cells = [cell(32, "bfloat16", a=3.0), cell(32, "float32", a=1.5, b=1.25), cell(64, "float32", a=0.97, b=2.0)]
    table = report.peers._closest(cells)[-1]
    assert "|  | 32 | 64 |" in table
    assert "| both directions, float32, D = 768 | 1.25x | 0.97x |" in table
    assert "| both directions, bfloat16, D = 768 | 3.00x |  |" in table
