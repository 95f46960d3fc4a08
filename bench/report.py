"""From docs/bench/*.json: docs/bench.md, its plot, and what the README has between its bench:... and /bench markers."""

import json
import math
import operator
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from amn_kernels import ops
from amn_kernels.train.runs import write_atomically
from bench import timing
from bench.plot import draw

ROOT = Path(__file__).parent.parent
TERMS = ROOT / "docs/bench/terms.json"
PEERS = ROOT / "docs/bench/peers.json"
PROFILE = ROOT / "docs/bench/profile.json"
TRAIN = ROOT / "docs/bench/train_step.json"
README = ROOT / "README.md"
PAGE = ROOT / "docs/bench.md"
PLOT = ROOT / "docs/bench-peers.png"
INTRODUCTION = (
    "Written by the commands named below, from the figures that they leave in `docs/bench`. All of it is of one CPU; "
    "nothing was measured on a GPU. Contenders take turns in one process, and a ratio is the median of those within a "
    "turn. The matrix products are torch's own (MKL) on both sides. At few rows the fixed cost of a call counts, not "
    "arithmetic."
)
DIM, DTYPE = 768, "float32"  # of tables and plot; other cells count for the worst ratio
MEMORY = (
    "Extra peak memory of a step in MiB: the most that was resident during forward and backward, less what was before; "
    "gradients are in it, inputs are not."
)
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
    """Draw the plot, write the page and rewrite the README, all from the files that are there."""
    terms, profile, train, peers = (
        json.loads(path.read_text()) if path.exists() else None for path in (TERMS, PROFILE, TRAIN, PEERS)
    )
    text = README.read_text()
    if terms:
        text = _between(text, "terms", terms_summary(terms))
    if train:
        text = _between(text, "train", train_summary(train))
    if peers:
        draw(peers, PLOT, DIM, DTYPE)
        text = _between(text, "peers", peers_summary(peers))
    write_atomically(PAGE, page(terms, profile, train, peers))
    write_atomically(README, text)


def page(terms: dict | None, profile: dict | None, train: dict | None, peers: dict | None) -> str:
    """docs/bench.md; what was not measured is left out."""
    parts = ["# Benchmarks", _document([INTRODUCTION])]
    for title, command, section, result in (
        ("MSE + cosine + InfoNCE", "make bench", terms_section, terms),
        ("Where the time of a step goes", "make profile", profile_section, profile),
        ("The share of the loss in a training step", "make bench-train", train_section, train),
        ("InfoNCE against other libraries", "make bench-peers", peers_section, peers),
    ):
        if result:
            parts += [f"## {title}", f"Measured by `{command}`.", section(result)]
    return "\n\n".join(parts) + "\n"


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


def terms_summary(result: dict) -> str:
    """For the README: MSE + cosine + InfoNCE against eager PyTorch and torch.compile, time and memory."""
    return _document(
        [
            f"{_machine(result['machine'])}. MSE + cosine + InfoNCE, forward + backward, float32, D = 768; medians. At "
            'fixed weights, so that all compute the same; *balanced* is `weighting="gradient"`. A ratio is the median '
            "over turns, not the quotient of two columns.",
            _times(result, ("balanced",)),
            f"{MEMORY} What is empty was not measured.",
            _terms_memory(result),
        ]
    )


def terms_section(result: dict) -> str:
    """For the page: the same with what bounds it, the gain from threads, and accuracy."""
    return _document(
        [
            f"{_machine(result['machine'])}. MSE + cosine + InfoNCE, forward + backward, float32, D = 768, fixed "
            "weights, so that all compute the same; medians (load average of the machine at the start: "
            f"{result['load']:.1f}). The last three columns: with balanced weights, in bfloat16, and the two matrix "
            "products that the op contains, alone. A ratio is the median over turns, not the quotient of two columns.",
            _times(result, ("balanced", "bfloat16", "products")),
            *_streamed(result),
            *_scaling([e for e in result["times"] if e["kind"] == "scaling"]),
            f"{MEMORY} What is empty was not measured.",
            _terms_memory(result),
            "Relative error of the float32 gradient against float64, of fused (of eager). Columns: pred is random (1), "
            "within 5% of target (0.05), or within 0.1% (0.001).",
            _accuracy(result),
        ]
    )


UNITS_OF_FUSED = {
    "balanced": "balanced / fused",
    "bfloat16": "bfloat16 / fused",
    "products": "two bare products / fused",
}
"""Heading of what is shown as a ratio to the fused op alone."""


def _times(result: dict, ratios: Iterable[str]) -> str:
    rows = []
    for entry in (e for e in result["times"] if e["kind"] == "all_terms"):
        of = entry["contenders"]
        faster = min(of["eager"]["ratio"], of["compile"]["ratio"])
        times = (_time(of[name]["seconds"]) for name in ("fused", "eager", "compile"))
        rows.append([f"{entry['rows']:,}", *times, *(f"{x:.2f}x" for x in (faster, *(of[n]["ratio"] for n in ratios)))])
    head = ["rows", "fused", "eager PyTorch", "torch.compile", "faster of these two / fused"]
    return _table([*head, *(UNITS_OF_FUSED[name] for name in ratios)], rows)


def _streamed(result: dict) -> Iterator[str]:
    for entry in (e for e in result["times"] if e["kind"] == "streamed_terms"):
        of = {name: _time(r["seconds"]) for name, r in entry["contenders"].items()}
        share = 1 / entry["contenders"]["move"]["ratio"]
        yield (
            f"MSE + cosine alone at {entry['rows']:,} rows: {of['fused']} (torch.compile {of['compile']}, eager "
            f"{of['eager']}). The step reads pred and target twice and writes a gradient. PyTorch's `pred.sum()`, "
            f"`target.sum()` and `pred + target`, which read and write as much, take {of['move']}: fused takes "
            f"{share:.2f} times that."
        )


def _terms_memory(result: dict) -> str:
    found = {(e["contender"], e["rows"]): f"{e['bytes'] / 2**20:,.0f}" for e in result["memory"]}
    names, sizes = (list(dict.fromkeys(keys)) for keys in zip(*found, strict=True))
    titles = {"eager": "eager PyTorch", "compile": "torch.compile", "both": "fused, both directions"}
    rows = ([titles.get(name, name), *(found.get((name, n), "") for n in sizes)] for name in names)
    return _table(["", *(f"{n:,} rows" for n in sizes)], rows)


def _accuracy(result: dict) -> str:
    terms = list(dict.fromkeys(e["term"] for e in result["accuracy"]))
    distances = list(dict.fromkeys(e["distance"] for e in result["accuracy"]))
    found = {(e["term"], e["distance"]): e for e in result["accuracy"]}
    return _table(
        ["term", *(f"{d:g}" for d in distances)],
        ([t, *(f"{found[t, d]['fused']:.1e} ({found[t, d]['eager']:.1e})" for d in distances)] for t in terms),
    )


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
        f"What {entries[0]['threads']} threads gain over one: time with one over time with all, median and quartiles. "
        "The number of threads is switched from turn to turn. The two bare products bound it:",
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
    rows.append(["step, after other work", *(f"{s['after other work'] * 1e6:,.0f}" for s in sizes)])
    return _document(
        [
            f"{_machine(result['machine'])} (load average {result['load']:.1f}). MSE + cosine + InfoNCE, forward + "
            "backward, float32, D = 768, fixed weights: microseconds and share of the step. Products and primitives "
            "are timed by themselves, in turns with the step; what lies between is a difference, so that the parts "
            "add up. All of them find caches and threads as a call like them left them; the last line is of a step "
            "after 64 MiB have gone through the caches. PyTorch's own part of a backward is that of `x * 2.0`.",
            _table(["", *(f"{s['rows']:,} rows" for s in sizes)], rows),
        ]
    )


def train_summary(result: dict) -> str:
    """For the README: what the loss takes of a whole training step."""

    def shares(name: str) -> str:
        of = (s["contenders"][name] for s in result["sizes"])
        return " and ".join(f"{c['loss'] / c['step']:.1%}" for c in of)

    rows = " and ".join(f"{s['rows']:,}" for s in result["sizes"])
    return _document(
        [
            f"Of a whole training step of AMN, D = 768, batch {rows}, the fused loss with balanced weights takes "
            f"{shares('fused, balanced')}, eager PyTorch with fixed ones {shares('eager, fixed')}. The larger the "
            f"model, the smaller both. {_machine(result['machine'])}."
        ]
    )


def train_section(result: dict) -> str:
    """For the page: loss and whole step of every contender."""
    rows = []
    for size in result["sizes"]:
        for name, c in size["contenders"].items():
            share = f"{c['loss'] / c['step']:.1%}"
            rows.append([f"{size['rows']:,} rows, {name}", _time(c["loss"]), _time(c["step"]), share])
    return _document(
        [
            f"{_machine(result['machine'])} (load average {result['load']:.1f}). AMN on five vectors of D = 768: "
            "prediction, MSE + InfoNCE, gradients, clipping, AdamW; medians over steps, in which the contenders take "
            "turns.",
            _table(["", "loss", "step", "share"], rows),
        ]
    )


def _peers_of(cells: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell["contenders"] if name != "fused"))


def peers_summary(result: dict) -> str:
    """For the README: in how many comparisons with other libraries fused is faster, and the worst of them."""
    cells = result["times"]
    pairs = _pairs(cells)
    ratio, name, cell = min(pairs, key=operator.itemgetter(0))
    names = {name for _, name, _ in pairs}
    lost = sum(ratio < 1 for ratio, _, _ in pairs)
    faster = f"in all {len(pairs)} comparisons" if not lost else f"in {len(pairs) - lost} of {len(pairs)} comparisons"
    return _document(
        [
            f"InfoNCE alone, against {len(names)} other implementations: fused was faster {faster}{_near(cells)}. The "
            f"worst ratio is {ratio:.2f}x, against {name} at {_cell(cell)}. All tables: [docs/bench.md](docs/bench.md)."
        ]
    )


def peers_section(result: dict) -> str:
    """For the page: InfoNCE against other libraries, with the worst ratio of each, growth and memory."""
    cells = result["times"]
    others = sorted({f"D = {c['dim']:,} {c['dtype']}" for c in cells if (c["dim"], c["dtype"]) != (DIM, DTYPE)})
    parts = [
        f"{_machine(result['machine'])}. InfoNCE alone, forward + backward. Before a cell was timed, values had to "
        "agree within 1e-5 and gradients within 1e-4 in float32, 3e-2 and 0.3 in bfloat16, where the others round "
        "similarities to 8 bits. In bfloat16 fused multiplies in float32 and most others in bfloat16, for which AVX2 "
        "has no instructions: expect other ratios on a CPU that has them. The row *fused* has times, each other row "
        "its time over that of fused: above 1 fused is faster.",
        f"Columns: rows at D = {DIM}, {DTYPE}; *worst*: the smallest ratio over all dimensions and dtypes measured"
        f"{', ' + ', '.join(others) + ' included' if others else ''}; *growth*: the exponent of N fitted to the larger "
        f"half of the sizes, or to all if they are at most 3. {_noise(cells)}",
        f"![time and memory against rows]({PLOT.name})",
    ]
    for contest, title in TITLES.items():
        of_contest = [c for c in cells if c["contest"] == contest]
        shown = sorted((c for c in of_contest if c["dim"] == DIM and c["dtype"] == DTYPE), key=lambda c: c["rows"])
        if not shown:
            continue
        parts.append(f"### {title[0].upper()}{title[1:]}")
        fused = {c["rows"]: c["contenders"]["fused"]["seconds"] for c in shown}
        rows = [["fused", *map(_time, fused.values()), "", _growth(fused)]]
        for name in _peers_of(shown):
            there = {c["rows"]: c["contenders"][name] for c in shown if name in c["contenders"]}
            ratios = [f"{there[n]['ratio']:.2f}x" if n in there else "" for n in fused]
            rows.append([name, *ratios, _worst(of_contest, name), _growth({n: r["seconds"] for n, r in there.items()})])
        parts.append(_table(["", *(f"{n:,}" for n in fused), "worst", "growth"], rows))
        left_out = dict.fromkeys((why, name) for c in of_contest for name, why in c["left_out"].items())
        for why in dict.fromkeys(why for why, _ in left_out):
            parts.append(f"{', '.join(name for w, name in left_out if w == why)}: {why}.")
    parts += _closest(cells)
    parts.append(_losses(cells))
    parts.append(_memory(result))
    return _document(part for part in parts if part)


def _closest(cells: list[dict]) -> list[str]:
    """The smallest ratio of every cell, in one table."""
    sizes = sorted({c["rows"] for c in cells})
    forms = sorted({(c["dtype"] != DTYPE, c["dtype"], c["dim"]) for c in cells})
    rows = []
    for contest, title in TITLES.items():
        for _, dtype, dim in forms:
            of_form = [c for c in cells if (c["contest"], c["dtype"], c["dim"]) == (contest, dtype, dim)]
            ratios = {c["rows"]: min(ratio for ratio, *_ in _pairs([c])) for c in of_form}
            if ratios:
                shown = (f"{ratios[n]:.2f}x" if n in ratios else "" for n in sizes)
                rows.append([f"{title}, {dtype}, D = {dim:,}", *shown])
    return [
        "### The smallest lead at every size",
        "The smallest ratio of a cell, whoever's it is. Who takes over a second and ten times as long as fused is not "
        "run with more rows; a cell without anybody else is empty, as is what was not measured.",
        _table(["", *(f"{n:,}" for n in sizes)], rows),
    ]


def _noise(cells: list[dict]) -> str:
    rivals = [r for c in cells for name, r in c["contenders"].items() if name != "fused"]
    spread = sorted((r["quartiles"][1] - r["quartiles"][0]) / r["ratio"] for r in rivals)
    load = [c["load"] for c in cells]
    middle, most = spread[len(spread) // 2], spread[9 * len(spread) // 10]
    return (
        f"The machine was shared (load average {min(load):.1f} to {max(load):.1f}). The interquartile range of a ratio "
        f"is {middle:.0%} of it at the median comparison, and at most {most:.0%} in 90% of them."
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


def _pairs(cells: list[dict]) -> list[tuple[float, str, dict]]:
    """Ratio, contender and cell of all comparisons with fused."""
    return [(r["ratio"], n, c) for c in cells for n, r in c["contenders"].items() if n != "fused"]


def _cell(cell: dict) -> str:
    return f"{cell['rows']:,} rows, D = {cell['dim']:,}, {cell['dtype']}"


def _losses(cells: list[dict]) -> str:
    pairs = _pairs(cells)
    lost = sorted((p for p in pairs if p[0] < 1), key=lambda p: p[0])
    if not lost:
        return f"Fused was the faster one in all {len(pairs)} comparisons{_near(cells)}."
    where = "; ".join(f"{n}, {TITLES[c['contest']]}, {_cell(c)}: {ratio:.2f}x" for ratio, n, c in lost)
    return f"Fused was the slower one in {len(lost)} of {len(pairs)} comparisons: {where}."


def _near(cells: list[dict]) -> str:
    """In how many of the comparisons that fused wins the other one was not slower in a quarter of the rounds."""
    won = [r for c in cells for name, r in c["contenders"].items() if name != "fused" and r["ratio"] >= 1]
    near = sum(r["quartiles"][0] <= 1 for r in won)
    return (
        f", in {near} of them by less than the noise (the lower quartile of the ratio is not above 1)" if near else ""
    )


def _memory(result: dict) -> str:
    parts = [f"### Memory\n\n{textwrap.fill(MEMORY, 120)}"] if result["memory"] else []
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
        parts.append(f"{title[0].upper()}{title[1:]}, D = {DIM}, float32:")
        parts.append(_table(["", *(f"{n:,}" for n in sizes), "fused as a share of it", "growth"], rows))
    for entry in result["alone"]:
        parts.append(
            f"Fused alone at {entry['rows']:,} rows, D = {entry['dim']}: {_time(entry['seconds'])}, "
            f"{entry['bytes'] / 2**20:,.0f} MiB extra."
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    render()
