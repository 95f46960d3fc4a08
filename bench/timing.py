"""Times of several contenders on a machine that others use too: they take turns, and ratios are taken within a turn."""

import statistics
import time
from collections.abc import Callable

import torch

_clock = time.perf_counter


def use_processor_time() -> None:
    """One thread from now on, and its processor time for every figure: what others do on the machine then hardly shows.

    Waiting of threads for each other can't be told from being kept waiting by others, so this is for one thread only.
    """
    global _clock
    torch.set_num_threads(1)
    _clock = time.thread_time


def clock_name() -> str:
    return "wall time" if _clock is time.perf_counter else "processor time"


def interleaved(runs: dict[str, Callable[[], None]], seconds: float, least: int = 3) -> dict[str, list[float]]:
    """Seconds of each call, by name: rounds of one call each until about `seconds` have passed, at least `least`.

    The order rotates, so that each contender comes after each other one and finds the caches as that left them.
    """
    for run in runs.values():  # warm-up: compilation, thread pools, allocator
        run()
    times = {name: [] for name in runs}
    order = list(runs)
    end = time.perf_counter() + seconds
    while len(times[order[0]]) < least or time.perf_counter() < end:
        order.append(order.pop(0))
        for name in order:
            start = _clock()
            runs[name]()
            times[name].append(_clock() - start)
    return times


def summary(times: dict[str, list[float]], base: str) -> dict[str, dict]:
    """Per contender the median in seconds, and of its ratio to `base` in the same round the median and quartiles."""
    result = {}
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(seconds, times[base], strict=True))
        result[name] = {
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
            "rounds": len(seconds),
        }
    return result
