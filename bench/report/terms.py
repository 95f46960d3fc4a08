"""The tables of our own terms: a step against PyTorch, where its time goes, and its share of a training step."""

import operator
from collections.abc import Callable, Iterable, Iterator

from bench.report.text import MEMORY, document, duration, machine_line, quartiles, table


def summary(result: dict) -> str:
    """For the README: MSE + cosine + InfoNCE against eager PyTorch and torch.compile, time and memory."""
    return document(
        [
            f"{machine_line(result['machine'])}. MSE + cosine + InfoNCE, forward + backward, float32, D = 768; "
            'medians. At fixed weights, so that all compute the same; *balanced* is `weighting="gradient"`. A '
            "ratio is the median over turns, not the quotient of two columns.",
            _times(result, ("balanced",)),
            f"{MEMORY} What is empty was not measured.",
            _terms_memory(result),
        ]
    )


def section(result: dict) -> str:
    """For the page: the same with what bounds it, the gain from threads, and accuracy."""
    return document(
        [
            f"{machine_line(result['machine'])}. MSE + cosine + InfoNCE, forward + backward, float32, D = 768, fixed "
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
        times = (duration(of[name]["seconds"]) for name in ("fused", "eager", "compile"))
        rows.append([f"{entry['rows']:,}", *times, *(f"{x:.2f}x" for x in (faster, *(of[n]["ratio"] for n in ratios)))])
    head = ["rows", "fused", "eager PyTorch", "torch.compile", "faster of these two / fused"]
    return table([*head, *(UNITS_OF_FUSED[name] for name in ratios)], rows)


def _streamed(result: dict) -> Iterator[str]:
    for entry in (e for e in result["times"] if e["kind"] == "streamed_terms"):
        of = {name: duration(r["seconds"]) for name, r in entry["contenders"].items()}
        move = entry["contenders"]["move"]
        least, most = (1 / ratio for ratio in reversed(move["quartiles"]))
        yield (
            f"MSE + cosine alone at {entry['rows']:,} rows: {of['fused']} (torch.compile {of['compile']}, eager "
            f"{of['eager']}). The step reads pred and target twice and writes a gradient. PyTorch's `pred.sum()`, "
            f"`target.sum()` and `pred + target`, which read and write as much, take {of['move']}: fused takes "
            f"{1 / move['ratio']:.2f} times that in the median of {move['rounds']} rounds, {least:.2f} to {most:.2f} "
            "times in the middle half of them."
        )


def _terms_memory(result: dict) -> str:
    found = {(e["contender"], e["rows"]): f"{e['bytes'] / 2**20:,.0f}" for e in result["memory"]}
    names, sizes = (list(dict.fromkeys(keys)) for keys in zip(*found, strict=True))
    titles = {"eager": "eager PyTorch", "compile": "torch.compile", "both": "fused, both directions"}
    rows = ([titles.get(name, name), *(found.get((name, n), "") for n in sizes)] for name in names)
    return table(["", *(f"{n:,} rows" for n in sizes)], rows)


def _accuracy(result: dict) -> str:
    terms = list(dict.fromkeys(e["term"] for e in result["accuracy"]))
    distances = list(dict.fromkeys(e["distance"] for e in result["accuracy"]))
    found = {(e["term"], e["distance"]): e for e in result["accuracy"]}
    return table(
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
            *(cell for name in ("fused", "products") for cell in (f"{e[name]['ratio']:.2f}x", quartiles(e[name]))),
        ]
        for e in entries
    ]
    return [
        f"What {entries[0]['threads']} threads gain over one: time with one over time with all, median and quartiles. "
        "The number of threads is switched from turn to turn. The two bare products bound it:",
        table(["rows", "fused", "quartiles", "two bare products", "quartiles"], rows),
    ]


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
    return document(
        [
            f"{machine_line(result['machine'])} (load average {result['load']:.1f}). MSE + cosine + InfoNCE, forward + "
            "backward, float32, D = 768, fixed weights: microseconds and share of the step. Products and primitives "
            "are timed by themselves, in turns with the step; what lies between is a difference, so that the parts "
            "add up. All of them find caches and threads as a call like them left them; the last line is of a step "
            "after 64 MiB have gone through the caches. PyTorch's own part of a backward is that of `x * 2.0`.",
            table(["", *(f"{s['rows']:,} rows" for s in sizes)], rows),
        ]
    )


def train_summary(result: dict) -> str:
    """For the README: what the loss takes of a whole training step."""

    def shares(name: str) -> str:
        of = (s["contenders"][name] for s in result["sizes"])
        return " and ".join(f"{c['loss'] / c['step']:.1%}" for c in of)

    rows = " and ".join(f"{s['rows']:,}" for s in result["sizes"])
    return document(
        [
            f"Of a whole training step of AMN, D = 768, batch {rows}, the fused loss with balanced weights takes "
            f"{shares('fused, balanced')}, eager PyTorch with fixed ones {shares('eager, fixed')}. The larger the "
            f"model, the smaller both. {machine_line(result['machine'])}."
        ]
    )


def train_section(result: dict) -> str:
    """For the page: loss and whole step of every contender."""
    rows = []
    for size in result["sizes"]:
        for name, c in size["contenders"].items():
            share = f"{c['loss'] / c['step']:.1%}"
            rows.append([f"{size['rows']:,} rows, {name}", duration(c["loss"]), duration(c["step"]), share])
    return document(
        [
            f"{machine_line(result['machine'])} (load average {result['load']:.1f}). AMN on five vectors of D = 768: "
            "prediction, MSE + InfoNCE, gradients, clipping, AdamW; medians over steps, in which the contenders take "
            "turns.",
            table(["", "loss", "step", "share"], rows),
        ]
    )
