"""From docs/bench/*.json: docs/bench.md, its plot, and what the README has between its bench:... and /bench markers."""

import json
import os
import re
from pathlib import Path

import torch

from amn_kernels import ops
from amn_kernels.train.runs import write_atomically
from bench import timing
from bench.report import peers, terms
from bench.report.plot import PLOT_NAME, draw
from bench.report.text import document

ROOT = Path(__file__).parents[2]
TERMS = ROOT / "docs/bench/terms.json"
PEERS = ROOT / "docs/bench/peers.json"
PROFILE = ROOT / "docs/bench/profile.json"
TRAIN = ROOT / "docs/bench/train_step.json"
README = ROOT / "README.md"
PAGE = ROOT / "docs/bench.md"
PLOT = ROOT / "docs" / PLOT_NAME
INTRODUCTION = (
    "Written by the commands named below, from the figures that they leave in `docs/bench`. All of it is of one CPU; "
    "nothing was measured on a GPU. Contenders take turns in one process, and a ratio is the median of those within a "
    "turn. The matrix products are torch's own (MKL) on both sides. At few rows the fixed cost of a call counts, not "
    "arithmetic."
)


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
    found = {path: json.loads(path.read_text()) for path in (TERMS, PROFILE, TRAIN, PEERS) if path.exists()}
    if PEERS in found:
        draw(found[PEERS], PLOT, peers.DIM, peers.DTYPE)
    text = README.read_text()
    for name, path, summary in (
        ("terms", TERMS, terms.summary),
        ("train", TRAIN, terms.train_summary),
        ("peers", PEERS, peers.summary),
    ):
        if path in found:
            text = _between(text, name, summary(found[path]))
    parts = ["# Benchmarks", document([INTRODUCTION])]
    for title, command, path, section in (
        ("MSE + cosine + InfoNCE", "make bench", TERMS, terms.section),
        ("Where the time of a step goes", "make profile", PROFILE, terms.profile_section),
        ("The share of the loss in a training step", "make bench-train", TRAIN, terms.train_section),
        ("InfoNCE against other libraries", "make bench-peers", PEERS, peers.section),
    ):
        if path in found:
            parts += [f"## {title}", f"Measured by `{command}`.", section(found[path])]
    write_atomically(PAGE, "\n\n".join(parts) + "\n")
    write_atomically(README, text)


def _between(text: str, name: str, body: str) -> str:
    opening, closing = f"<!-- bench:{name} -->", "<!-- /bench -->"
    pattern = re.compile(re.escape(opening) + ".*?" + re.escape(closing), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no {opening} ... {closing}")
    return pattern.sub(lambda _: f"{opening}\n\n{body.strip()}\n\n{closing}", text)
