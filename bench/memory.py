"""Peak memory of one forward + backward beyond the input: `python -m bench.memory NAME ROWS` prints bytes.

Each contender runs in a process of its own, because the peak of a process never falls.
"""

import resource
import subprocess
import sys

from bench.contenders import ALL_TERMS, inputs, losses, step

DIM = 768


def peak_bytes() -> int:
    """Largest resident set of this process so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, rows: int) -> int:
    """Extra peak bytes of contender `name`, measured in a fresh process."""
    output = subprocess.run(
        [sys.executable, "-m", "bench.memory", name, str(rows)], check=True, capture_output=True, text=True
    )
    return int(output.stdout)


if __name__ == "__main__":
    name, rows = sys.argv[1], int(sys.argv[2])
    loss = losses(ALL_TERMS)[name]
    step(loss, *inputs(256, DIM))()  # libraries loaded, threads started
    run = step(loss, *inputs(rows, DIM))
    before = peak_bytes()
    run()
    print(peak_bytes() - before)
