"""From docs/bench/*.json: the plots in docs/, and what the README shows between its bench:... and /bench markers."""

import json
import math
import operator
import os
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from amn_kernels import ops
from amn_kernels.train.runs import write_atomically
from bench import timing

ROOT = Path(__file__).parent.parent
TERMS = ROOT / "docs/bench/terms.json"
PEERS = ROOT / "docs/bench/peers.json"
PROFILE = ROOT / "docs/bench/profile.json"
README = ROOT / "README.md"
DIM, DTYPE = 768, "float32"  # of tables and plots; other cells count for the worst ratio
TITLES = {
    "pred_to_target": "pred to target",
    "both": "both directions",
    "clip": "both directions, gradients for both sides",
    "simclr": "SimCLR's 2N views",
}


def machine() -> dict:
    """What the figures depend on."""
    return {
        "torch": torch.__version__.split("+")[0],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "isa": ops.cpu_isa(),
        "clock": timing.clock_name(),
    }


def render() -> None:
    """Draw the plots and rewrite the README from the files that are there."""
    text = README.read_text()
    if TERMS.exists():
        text = _between(text, "terms", terms_section(json.loads(TERMS.read_text())))
    if PROFILE.exists():
        text = _between(text, "profile", profile_section(json.loads(PROFILE.read_text())))
    if PEERS.exists():
        result = json.loads(PEERS.read_text())
        draw(result)
        text = _between(text, "peers", peers_section(result))
    write_atomically(README, text)


def _between(text: str, name: str, body: str) -> str:
    opening, closing = f"<!-- bench:{name} -->", "<!-- /bench -->"
    pattern = re.compile(re.escape(opening) + ".*?" + re.escape(closing), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no {opening} ... {closing}")
    return pattern.sub(lambda _: f"{opening}\n\n{body.strip()}\n\n{closing}", text)


def line(entry: dict) -> str:
    """A cell of the grid for people who wait for it."""
    others = {name: r["ratio"] for name, r in entry["contenders"].items() if name != "fused"}
    worst = min(others, key=others.get)
    return (
        f"{entry['contest']:<15} {entry['dtype']:<9} D {entry['dim']:>5,} rows {entry['rows']:>6,}: "
        f"fused {_time(entry['contenders']['fused']['seconds'])}, closest {worst} {others[worst]:.2f}x"
    )


def exponent(points: dict[int, float]) -> float | None:
    """b of a least-squares fit log y = a + b log rows over the larger half of the sizes; None for fewer than 2."""
    chosen = sorted(points)[len(points) // 2 :] if len(points) > 3 else sorted(points)
    if len(chosen) < 2:
        return None
    x, y = [math.log(n) for n in chosen], [math.log(max(points[n], 1e-12)) for n in chosen]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _document(parts: Iterable[str]) -> str:
    """Paragraphs, broken into lines, and tables as they are."""
    broken = (
        part if "\n" in part or part.startswith("!") else textwrap.fill(part, 120, break_on_hyphens=False)
        for part in parts
    )
    return "\n\n".join(broken)


def _machine(of: dict) -> str:
    threads = "one thread" if of["threads"] == 1 else f"{of['threads']} threads"
    return f"CPU with {of['cores']} cores and {of['isa'].upper()}, {threads}, {of['clock']}, torch {of['torch']}"


def terms_section(result: dict) -> str:
    """MSE + cosine + InfoNCE against eager PyTorch and torch.compile, memory and accuracy."""
    parts = [
        f"{_machine(result['machine'])}. MSE + cosine + InfoNCE, forward + backward, float32, D = 768, fixed weights, "
        "so that all compute the same; medians of runs by turns in one process, ratios within a turn (load average of "
        f"the machine at the start: {result['load']:.1f}). The last column is what the two matrix products that the op "
        "contains take alone.",
    ]
    rows = []
    for entry in (e for e in result["times"] if e["kind"] == "all_terms"):
        of = entry["contenders"]
        rows.append(
            [
                f"{entry['rows']:,}", *(_time(of[name]["seconds"]) for name in ("fused", "eager", "compile")),
                f"{min(of['eager']['ratio'], of['compile']['ratio']):.2f}x", f"{of['balanced']['ratio']:.2f}x",
                f"{of['bfloat16']['ratio']:.2f}x", f"{of['products']['ratio']:.0%}",
            ]
        )  # fmt: skip
    times, ratios = ("fused", "eager", "torch.compile"), ("faster of the two / fused", "balanced / fixed weights")
    parts.append(_table(["rows", *times, *ratios, "bfloat16 / float32", "two bare products / fused"], rows))
    for entry in (e for e in result["times"] if e["kind"] == "streamed_terms"):
        of = {name: _time(r["seconds"]) for name, r in entry["contenders"].items()}
        share = 1 / entry["contenders"]["move"]["ratio"]
        parts.append(
            f"MSE + cosine alone at {entry['rows']:,} rows: {of['fused']} (torch.compile {of['compile']}, eager "
            f"{of['eager']}), {share:.2f} times what moving five such tensors takes."
        )
    parts += _scaling([e for e in result["times"] if e["kind"] == "scaling"])
    extra = ", ".join(f"{e['contender']} {e['bytes'] / 2**20:,.0f} MiB at {e['rows']:,}" for e in result["memory"])
    parts.append(f"Extra peak memory by rows (both: in both directions): {extra}.")
    parts.append(
        "Relative error of the float32 gradient against float64, where pred is random or within 5% and 0.1% of target, "
        "fused (eager):"
    )
    terms = list(dict.fromkeys(e["term"] for e in result["accuracy"]))
    distances = list(dict.fromkeys(e["distance"] for e in result["accuracy"]))
    found = {(e["term"], e["distance"]): e for e in result["accuracy"]}
    parts.append(
        _table(
            ["term", *(f"{d:g}" for d in distances)],
            ([t, *(f"{found[t, d]['fused']:.1e} ({found[t, d]['eager']:.1e})" for d in distances)] for t in terms),
        )
    )
    return _document(parts)


def _scaling(entries: list[dict]) -> list[str]:
    """What further threads gain, or nothing where one thread was measured."""
    if not entries:
        return []
    rows = [
        [
            f"{e['rows']:,}",
            *(cell for name in ("fused", "products") for cell in (f"{e[name]['ratio']:.2f}x", _quartiles(e[name]))),
        ]
        for e in entries
    ]
    return [
        f"One thread against {entries[0]['threads']}, switched from turn to turn: time with one over time with all, "
        "median and quartiles, and the same of the two bare products, which bound it:",
        _table(["rows", "fused", "quartiles", "two bare products", "quartiles"], rows),
    ]


def _quartiles(ratio: dict) -> str:
    low, high = ratio["quartiles"]
    return f"{low:.2f}-{high:.2f}x"


ARITHMETIC = 6
"""So many first parts in profile.json are arithmetic, matrix products and primitives; the rest is overhead."""


def profile_section(result: dict) -> str:
    """Where the time of a step goes, part by part, and the share of overhead."""
    sizes = result["sizes"]
    names = [name for name in sizes[0]["seconds"] if name != "step"]

    def row(title: str, of: Callable[[dict], float], marks: str = "") -> list[str]:
        cells = (f"{of(s['seconds']) * 1e6:,.0f} ({of(s['seconds']) / s['seconds']['step']:.0%})" for s in sizes)
        return [f"{marks}{title}{marks}", *(f"{marks}{cell}{marks}" for cell in cells)]

    rows = [row(name, operator.itemgetter(name)) for name in names]
    rows.insert(ARITHMETIC, row("arithmetic", lambda s: sum(s[n] for n in names[:ARITHMETIC]), "**"))
    rows.append(row("overhead", lambda s: sum(s[n] for n in names[ARITHMETIC:]), "**"))
    rows.append(["**step**", *(f"**{s['seconds']['step'] * 1e6:,.0f}**" for s in sizes)])
    return _document(
        [
            f"{_machine(result['machine'])} (load average {result['load']:.1f}). MSE + cosine + InfoNCE, forward + "
            "backward, float32, D = 768, fixed weights: microseconds and share of the step. Products and primitives "
            "are timed by themselves, in turns with the step; what lies between is a difference, so that the parts "
            "add up.",
            _table(["", *(f"{s['rows']:,} rows" for s in sizes)], rows),
        ]
    )


def _peers_of(cells: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell["contenders"] if name != "fused"))


def peers_section(result: dict) -> str:
    """InfoNCE alone against other libraries: ratios, the worst of each, growth, memory, and where they win."""
    cells = result["times"]
    others = sorted({f"D = {c['dim']} {c['dtype']}" for c in cells if (c["dim"], c["dtype"]) != (DIM, DTYPE)})
    parts = [
        f"{_machine(result['machine'])}. InfoNCE alone, forward + backward; equality of value and gradients was "
        "asserted before a cell was timed. Contenders take turns in one process; a figure is the median of the peer's "
        "time over that of fused in the same turn, above 1 where fused is faster. Columns: rows at "
        f"D = {DIM}, {DTYPE}; *worst*: over all cells measured{' (' + ', '.join(others) + ' too)' if others else ''}; "
        f"*growth*: the exponent of N fitted to the larger half. {_noise(cells)}",
        "![time and memory against rows](docs/bench-peers.png)",
    ]
    for contest, title in TITLES.items():
        of_contest = [c for c in cells if c["contest"] == contest]
        shown = sorted((c for c in of_contest if c["dim"] == DIM and c["dtype"] == DTYPE), key=lambda c: c["rows"])
        if not shown:
            continue
        parts.append(f"**{title[0].upper()}{title[1:]}**")
        fused = {c["rows"]: c["contenders"]["fused"]["seconds"] for c in shown}
        rows = [["fused", *map(_time, fused.values()), "", _growth(fused)]]
        for name in _peers_of(shown):
            there = {c["rows"]: c["contenders"][name] for c in shown if name in c["contenders"]}
            ratios = [f"{there[n]['ratio']:.2f}x" if n in there else "" for n in fused]
            rows.append([name, *ratios, _worst(of_contest, name), _growth({n: r["seconds"] for n, r in there.items()})])
        parts.append(_table(["", *(f"{n:,}" for n in fused), "worst", "growth"], rows))
        for name, why in {n: w for c in of_contest for n, w in c["left_out"].items()}.items():
            parts.append(f"{name}: {why}.")
    parts.append(_losses(cells))
    parts.append(_memory(result))
    return _document(part for part in parts if part)


def _noise(cells: list[dict]) -> str:
    rivals = [r for c in cells for name, r in c["contenders"].items() if name != "fused"]
    spread = sorted((r["quartiles"][1] - r["quartiles"][0]) / r["ratio"] for r in rivals)
    load = [c["load"] for c in cells]
    middle, most = spread[len(spread) // 2], spread[9 * len(spread) // 10]
    return (
        f"The machine was shared (load average {min(load):.1f} to {max(load):.1f}): from quartile to quartile of the "
        f"turns it is {middle:.0%} of the ratio in the middle comparison, at most {most:.0%} in nine of ten."
    )


def _growth(points: dict[int, float]) -> str:
    b = exponent(points)
    return "" if b is None else f"N^{b:.2f}"


def _worst(cells: list[dict], name: str) -> str:
    found = [(c["contenders"][name]["ratio"], c) for c in cells if name in c["contenders"]]
    ratio, cell = min(found, key=lambda pair: pair[0])
    dtype = "" if cell["dtype"] == DTYPE else f", {cell['dtype']}"
    dim = "" if cell["dim"] == DIM else f", D {cell['dim']:,}"
    return f"{ratio:.2f}x ({cell['rows']:,}{dim}{dtype})"


def _losses(cells: list[dict]) -> str:
    pairs = [(r["ratio"], n, c) for c in cells for n, r in c["contenders"].items() if n != "fused"]
    lost = sorted((p for p in pairs if p[0] < 1), key=lambda p: p[0])
    if not lost:
        return f"Fused was the faster one in all {len(pairs)} comparisons."
    where = "; ".join(
        f"{n}, {TITLES[c['contest']]}, {c['rows']:,} rows, D {c['dim']:,}, {c['dtype']}: {ratio:.2f}x"
        for ratio, n, c in lost
    )
    return f"Fused was the slower one in {len(lost)} of {len(pairs)} comparisons: {where}."


def _memory(result: dict) -> str:
    parts = []
    for contest, title in TITLES.items():
        entries = [e for e in result["memory"] if e["contest"] == contest]
        sizes = sorted({e["rows"] for e in entries})
        if not sizes:
            continue
        found = {(e["contender"], e["rows"]): e["bytes"] for e in entries}
        rows = []
        for name in dict.fromkeys(e["contender"] for e in entries):
            own = {n: found[name, n] for n in sizes if (name, n) in found}
            last = max(own)
            share = "" if name == "fused" else f"{found['fused', last] / own[last]:.0%}"
            rows.append([name, *(f"{own[n] / 2**20:,.0f}" if n in own else "" for n in sizes), share, _growth(own)])
        parts.append(f"Extra peak memory, {title}, MiB at D = {DIM}, float32:")
        parts.append(_table(["", *(f"{n:,}" for n in sizes), "fused / it", "growth"], rows))
    for entry in result["alone"]:
        parts.append(
            f"Fused alone at {entry['rows']:,} rows, D = {entry['dim']}: {_time(entry['seconds'])}, "
            f"{entry['bytes'] / 2**20:,.0f} MiB extra."
        )
    return "\n\n".join(parts)


def draw(result: dict) -> None:
    """Time and memory against rows, pred to target, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    cells = [c for c in result["times"] if c["contest"] == "pred_to_target" and c["dim"] == DIM and c["dtype"] == DTYPE]
    cells.sort(key=lambda c: c["rows"])
    names = ["fused", *_peers_of(cells)]
    for name in names:
        style = {"linewidth": 2.5, "zorder": 3} if name == "fused" else {"linewidth": 1.2}
        there = [(c["rows"], c["contenders"][name]["seconds"] * 1e3) for c in cells if name in c["contenders"]]
        axes[0].plot(*zip(*there, strict=True), marker="o", markersize=3, label=name, **style)
        held = sorted(
            (e["rows"], e["bytes"] / 2**20)
            for e in result["memory"]
            if e["contest"] == "pred_to_target" and e["contender"] == name
        )
        axes[1].plot([n for n, _ in held], [m for _, m in held], marker="o", markersize=3, **style)
    axes[0].set_ylabel("forward + backward, ms")
    axes[1].set_ylabel("extra peak memory, MiB")
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="rows")
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.xaxis.set_major_locator(ticker.FixedLocator([2**k for k in range(5, 16)]))
        axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda rows, _: f"{rows:,.0f}"))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, loc="lower right")
    figure.suptitle(f"InfoNCE, pred to target, D = {DIM}, {DTYPE}", fontsize=10)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/bench-peers.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    render()
