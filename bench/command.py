"""What the commands that measure times have in common: `--seconds`, `--json`, `--processor-time` and `--smoke`."""

import argparse
from pathlib import Path

from bench import timing


def make_parser(name: str, description: str | None, json: Path, seconds: float) -> argparse.ArgumentParser:
    """Parser of `python -m NAME`, by default to write the file `json` and to take about `seconds` for each size."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    parser.add_argument("--seconds", type=float, default=seconds, help="about how long each size takes")
    parser.add_argument("--json", type=Path, default=json, help="where the figures go")
    parser.add_argument("--processor-time", action="store_true", help="one thread: for a machine that others use")
    parser.add_argument("--smoke", action="store_true", help="few small sizes into runs/: only shows that it runs")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments given; they decide which clock `timing` looks at, and a smoke run spares the default file."""
    arguments = parser.parse_args()
    if arguments.processor_time:
        timing.use_processor_time()
    if arguments.smoke:
        arguments.json = Path("runs/bench") / parser.get_default("json").name
    return arguments
