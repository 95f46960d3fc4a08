"""How the pages show figures: paragraphs, tables, times, and the machine they are of."""

import textwrap
from collections.abc import Iterable

MEMORY = (
    "Extra peak memory of a step in MiB: the most that was resident during forward and backward, less what was before; "
    "gradients are in it, inputs are not."
)


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def document(parts: Iterable[str]) -> str:
    """Paragraphs, broken into lines, and tables as they are."""
    broken = (
        part if "\n" in part or part.startswith("!") else textwrap.fill(part, 120, break_on_hyphens=False)
        for part in parts
    )
    return "\n\n".join(broken)


def machine_line(of: dict) -> str:
    threads = "one thread" if of["threads"] == 1 else f"{of['threads']} threads"
    return f"CPU with {of['cores']} cores and {of['isa'].upper()}, {threads}, {of['clock']}, torch {of['torch']}"


def quartiles(ratio: dict) -> str:
    low, high = ratio["quartiles"]
    return f"{low:.2f}-{high:.2f}x"
