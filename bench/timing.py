"""Times of several contenders on a machine that others use too: they take turns, and ratios are taken within a turn."""

import random
import statistics
import time
from collections.abc import Callable

import torch

TURN = 0.005
"""Seconds: a turn is as many calls as take about so long, at least one."""

_clock = time.perf_counter


def use_processor_time() -> None:
    """One thread from now on, and its processor time for every figure: what others do on the machine then shows less.

    Waiting of threads for each other can't be told from being kept waiting by others, so this is for one thread only.
    """
    global _clock
    torch.set_num_threads(1)
    _clock = time.thread_time


def clock_name() -> str:
    """What the figures are."""
    return "wall time" if _clock is time.perf_counter else "processor time"


def interleaved(
    runs: dict[str, Callable[[], None]], seconds: float, least: int = 3, settle: int = 0
) -> dict[str, list[float]]:
    """Seconds per call, by name, of every turn: rounds of one turn each for about `seconds`, at least `least` rounds.

    The order is drawn anew for every round, from a fixed seed: who always came after the same one would find the caches
    and threads that this one leaves, worth 1 to 3% of a ratio. One that takes more than ten times the first
    one's time is in the first `least` rounds only, or there would be few rounds for all. The first `settle` calls of a
    turn are not counted: caches and threads are then as the last one of the same kind left them.
    """
    once = {}
    for name, run in runs.items():
        run()  # compilation, thread pools, allocator
        once[name] = turn(run, 1)
    times = {name: [] for name in runs}
    order, first = list(runs), next(iter(runs))
    end = _clock() + seconds
    orders = random.Random(0)
    while len(times[first]) < least or _clock() < end:
        orders.shuffle(order)
        for name in order:
            if len(times[name]) < least or once[name] <= 10 * once[first]:
                for _ in range(settle):
                    runs[name]()
                times[name].append(turn(runs[name], max(1, round(TURN / once[name]))))
    return times


def turn(run: Callable[[], None], calls: int) -> float:
    """Seconds per call."""
    start = _clock()
    for _ in range(calls):
        run()
    return (_clock() - start) / calls


def summary(times: dict[str, list[float]], base: str) -> dict[str, dict]:
    """Per contender the median in seconds, and of its ratio to `base`, in the same round, median and quartiles."""
    result = {}
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(seconds, times[base], strict=False))
        result[name] = {
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
            "rounds": len(seconds),
        }
    return result
