"""The tables of InfoNCE against other libraries: ratios, the smallest lead, growth and memory."""

import math
import operator
import textwrap

from bench.report.plot import PLOT_NAME
from bench.report.text import MEMORY, document, duration, machine_line, table

DIM, DTYPE = 768, "float32"  # of tables and plot; other cells count for the worst ratio
TITLES = {
    "pred_to_target": "pred to target",
    "both": "both directions",
    "clip": "both directions, gradients for both sides",
    "simclr": "SimCLR's 2N views",
}


def line(entry: dict) -> str:
    """A cell of the grid for people who wait for it."""
    others = {name: r["ratio"] for name, r in entry["contenders"].items() if name != "fused"}
    worst = min(others, key=others.get)
    return (
        f"{entry['contest']:<15} {entry['dtype']:<9} D {entry['dim']:>5,} rows {entry['rows']:>6,}: "
        f"fused {duration(entry['contenders']['fused']['seconds'])}, closest {worst} {others[worst]:.2f}x"
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


def _peers_of(cells: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell["contenders"] if name != "fused"))


def summary(result: dict) -> str:
    """For the README: in how many comparisons with other libraries fused is faster, and the worst of them."""
    cells = result["times"]
    pairs = _pairs(cells)
    ratio, name, cell = min(pairs, key=operator.itemgetter(0))
    names = {name for _, name, _ in pairs}
    lost = sum(ratio < 1 for ratio, _, _ in pairs)
    faster = f"in all {len(pairs)} comparisons" if not lost else f"in {len(pairs) - lost} of {len(pairs)} comparisons"
    return document(
        [
            f"InfoNCE alone, against {len(names)} other implementations: fused was faster {faster}{_near(cells)}. The "
            f"worst ratio is {ratio:.2f}x, against {name} at {_cell(cell)}. All tables: [docs/bench.md](docs/bench.md)."
        ]
    )


def section(result: dict) -> str:
    """For the page: InfoNCE against other libraries, with the worst ratio of each, growth and memory."""
    cells = result["times"]
    others = sorted({f"D = {c['dim']:,} {c['dtype']}" for c in cells if (c["dim"], c["dtype"]) != (DIM, DTYPE)})
    parts = [
        f"{machine_line(result['machine'])}. InfoNCE alone, forward + backward. Before a cell was timed, values had to "
        "agree within 1e-5 and gradients within 1e-4 in float32, 3e-2 and 0.3 in bfloat16, where the others round "
        "similarities to 8 bits. In bfloat16 fused multiplies in float32 and most others in bfloat16, for which AVX2 "
        "has no instructions: expect other ratios on a CPU that has them. The row *fused* has times, each other row "
        "its time over that of fused: above 1 fused is faster.",
        f"Columns: rows at D = {DIM}, {DTYPE}; *worst*: the smallest ratio over all dimensions and dtypes measured"
        f"{', ' + ', '.join(others) + ' included' if others else ''}; *growth*: the exponent of N fitted to the larger "
        f"half of the sizes, or to all if they are at most 3. {_noise(cells)}",
        f"![time and memory against rows]({PLOT_NAME})",
    ]
    for contest, title in TITLES.items():
        of_contest = [c for c in cells if c["contest"] == contest]
        shown = sorted((c for c in of_contest if c["dim"] == DIM and c["dtype"] == DTYPE), key=lambda c: c["rows"])
        if not shown:
            continue
        parts.append(f"### {title[0].upper()}{title[1:]}")
        fused = {c["rows"]: c["contenders"]["fused"]["seconds"] for c in shown}
        rows = [["fused", *map(duration, fused.values()), "", _growth(fused)]]
        for name in _peers_of(shown):
            there = {c["rows"]: c["contenders"][name] for c in shown if name in c["contenders"]}
            ratios = [f"{there[n]['ratio']:.2f}x" if n in there else "" for n in fused]
            rows.append([name, *ratios, _worst(of_contest, name), _growth({n: r["seconds"] for n, r in there.items()})])
        parts.append(table(["", *(f"{n:,}" for n in fused), "worst", "growth"], rows))
        left_out = dict.fromkeys((why, name) for c in of_contest for name, why in c["left_out"].items())
        for why in dict.fromkeys(why for why, _ in left_out):
            parts.append(f"{', '.join(name for w, name in left_out if w == why)}: {why}.")
    parts += _closest(cells)
    parts.append(_losses(cells))
    parts.append(_memory(result))
    return document(part for part in parts if part)


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
        table(["", *(f"{n:,}" for n in sizes)], rows),
    ]


def _noise(cells: list[dict]) -> str:
    rivals = [r for c in cells for name, r in c["contenders"].items() if name != "fused"]
    spread = sorted((r["quartiles"][1] - r["quartiles"][0]) / r["ratio"] for r in rivals)
    load = [c["load"] for c in cells]
    middle, most = spread[len(spread) // 2], spread[9 * len(spread) // 10]
    rotating = sum(c.get("order") != "drawn" for c in cells)
    order = (
        f" In {rotating} of {len(cells)} cells the order of turns rotated, so that each contender mostly came after "
        "the same other one, which is worth 1 to 3% of a ratio; where it is drawn for every round that evens out."
    )
    return (
        f"The machine was shared (load average {min(load):.1f} to {max(load):.1f}). The interquartile range of a ratio "
        f"is {middle:.0%} of it at the median comparison, and at most {most:.0%} in 90% of them."
    ) + (order if rotating else "")


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
        parts.append(table(["", *(f"{n:,}" for n in sizes), "fused as a share of it", "growth"], rows))
    for entry in result["alone"]:
        parts.append(
            f"Fused alone at {entry['rows']:,} rows, D = {entry['dim']}: {duration(entry['seconds'])}, "
            f"{entry['bytes'] / 2**20:,.0f} MiB extra."
        )
    return "\n\n".join(parts)
