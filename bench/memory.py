"""Extra peak memory of one forward + backward beyond the input, each contender in a process of its own.

The peak of a process never falls. Processes are forked from one that has only imported the libraries, so that each
starts with the same memory and in a moment.
"""

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

DIM = 768


def resident_bytes(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak since the last reset) of this process; Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def measure(name: str, rows: int) -> int:
    """Extra peak bytes of contender `name` of `bench.contenders`."""
    return _in_fresh_processes(_all_terms, name, rows)[0]


def measure_contender(contest: str, name: str, rows: int) -> tuple[int, float]:
    """Extra peak bytes of a contender of a contest of `bench.contests`, and the seconds of the step."""
    return _in_fresh_processes(_contest, contest, name, rows)


def _in_fresh_processes(f, *arguments) -> tuple[int, float]:
    """The medians of what three processes find."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.contests", "bench.contenders"])
    found = []
    for _ in range(3):
        with context.Pool(1) as pool:
            found.append(pool.apply(f, arguments))
    extra, seconds = zip(*found, strict=True)
    return statistics.median(extra), statistics.median(seconds)


def _all_terms(name: str, rows: int) -> tuple[int, float]:
    from bench.contenders import ALL_TERMS, inputs, losses, step

    loss = losses(ALL_TERMS)[name]
    return _extra_peak(lambda: step(loss, *inputs(rows, DIM)))


def _contest(contest: str, name: str, rows: int) -> tuple[int, float]:
    from bench.contenders import step
    from bench.contests import CONTESTS, make_inputs

    form = CONTESTS[contest]
    loss = form.contenders(rows)[name]
    return _extra_peak(lambda: step(loss, *make_inputs(rows, DIM, torch.float32, form.target_learns)))


def _extra_peak(make: Callable[[], Callable[[], object]]) -> tuple[int, float]:
    make()()  # libraries loaded, threads started, code compiled for the size
    run = make()
    # Memory that the allocator keeps would hide a part of the peak, and starting peaks higher than what stays.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    run()
    return resident_bytes("VmHWM") - before, time.perf_counter() - start
