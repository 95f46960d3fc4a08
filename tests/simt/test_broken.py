"""The shim notices what it must: kernels broken on purpose (broken.cu), each with the build that must say so."""

import re

import pytest

from .build import Build, program, run

SEEDS = (1, 2, 3)

CHECKS = {
    "divergent barrier": r"thread \(\d+, 0, 0\): waits in __syncthreads at .*broken.cu:\d+, others .*divergent barrier",
    "early return": r"thread \(5, 0, 0\): returned, but others .*divergent barrier",
    "wrong mask": r"__shfl_xor_sync at .*broken.cu:\d+: the mask 0x0000ffff does not name the thread itself",
    "divergent shuffle": r"__shfl_xor_sync at .*broken.cu:\d+ with the mask 0xffffffff, but lane \d+ .*divergent warp",
    "lane outside the mask": r"reads lane \d+, which the mask 0x(0000ffff|ffff0000) does not name",
    "too many threads": r"invalid configuration, grid \(3, 1, 1\), block \(2048, 1, 1\)",
    "uninitialised shared": r"wrong result",
}
"""What every build says, the plain one alone included."""

ADDRESSES = {
    "shared out of bounds": r"heap-buffer-overflow[^$]*WRITE of size 4[^$]*broken.cu",
    "global out of bounds": r"heap-buffer-overflow[^$]*READ of size 4[^$]*broken.cu",
    "global write out of bounds": r"heap-buffer-overflow[^$]*WRITE of size 4[^$]*broken.cu",
    "misaligned vector": r"broken.cu:\d+:\d+: runtime error: .*misaligned address .*requires 16 byte alignment",
}
"""What AddressSanitizer and UBSan say."""

RACES = {
    "missing barrier": r"data race",
    "missing barrier between uses": r"data race",
    "missing syncwarp": r"data race",
    "block race": r"data race",
    "block order": r"data race",
}
"""What ThreadSanitizer says."""

BUILDS = [
    pytest.param(Build.PLAIN, id="plain"),
    pytest.param(Build.ASAN, id="asan", marks=pytest.mark.asan),
    pytest.param(Build.TSAN, id="tsan", marks=pytest.mark.tsan),
]


def noticed(build, fault, message):
    for seed in SEEDS:
        done = run(program("broken", build), fault, str(seed))
        assert done.returncode not in (0, 2)
        assert re.search(message, done.stderr), done.stderr[:3000]


@pytest.mark.parametrize("fault", CHECKS)
def test_misuse_is_an_error(fault):
    noticed(Build.PLAIN, fault, CHECKS[fault])


@pytest.mark.asan
@pytest.mark.parametrize("fault", ADDRESSES)
def test_address_is_noticed(fault):
    noticed(Build.ASAN, fault, ADDRESSES[fault])


@pytest.mark.tsan
@pytest.mark.parametrize("fault", RACES)
def test_race_is_noticed(fault):
    noticed(Build.TSAN, fault, RACES[fault])


@pytest.mark.parametrize("build", BUILDS)
def test_sound_kernels_pass(build):
    for seed in SEEDS:
        done = run(program("broken", build), "none", str(seed))
        assert done.returncode == 0, done.stderr[:3000]


def test_schedule_follows_the_seed():
    """The same seed gives the same error, and seeds differ: of which thread diverges first."""
    errors = [run(program("broken", Build.PLAIN), "wrong mask", str(seed)).stderr for seed in (1, 1, 2, 3, 4)]
    assert errors[0] == errors[1]
    assert len(set(errors)) > 1
