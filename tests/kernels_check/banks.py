"""Bank conflicts in shared memory, from machine code: cuxray, which follows addresses from the thread's number on.

It knows a block's shape, not the values that a kernel is launched with, so not every address; how many it does is said.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Banks(NamedTuple):
    """Of the accesses to shared memory of one kernel."""

    ways: int
    """Threads of a warp that want one bank at a time, in the worst access that could be analysed; 1 is no conflict."""
    analysed: int
    accesses: int
    """Instructions; of those that are not analysed nothing is known."""


def why_unavailable() -> str | None:
    """Why nothing can be analysed here, or None."""
    try:
        importlib.metadata.version("cuxray")
    except importlib.metadata.PackageNotFoundError:
        return "cuxray is not installed"
    return None


def bank_conflicts(cubin: Path, block: str, kernels: str, tools: str) -> dict[str, tuple[int, int]]:
    """Worst ways, and accesses analysed, by mangled name, of the kernels whose names match.

    block: its shape, as "32,8"; tools: folder of cuobjdump and nvdisasm, which cuxray would download else.
    """
    environment = {**os.environ, "CUXRAY_NO_FETCH": "1", "PATH": tools + os.pathsep + os.environ["PATH"]}
    command = [sys.executable, "-m", "cuxray", "report", str(cubin), "--fast", "--no-cache", "--json"]
    command += ["--threads", block, "--kernel", kernels]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"cuxray failed for {cubin.name}:\n{done.stderr[-4000:]}")
    found = {}
    for unit in json.loads(done.stdout)["units"]:
        for kernel in unit["kernels"]:
            shared = [site for site in kernel["access"]["by_site"] if site["space"] == "shared"]
            ways = max((site["conflict_ways"] for site in shared), default=1)
            found[kernel["name"]] = ways, sum(site["count"] for site in shared)
    return found


def shared_accesses(code: str) -> int:
    """Loads and stores of shared memory in the disassembly of a kernel."""
    return len(re.findall(r"\b(?:LDS|STS)\b", code))
