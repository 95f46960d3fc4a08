"""Peak memory of one forward + backward beyond the input: `python -m bench.memory NAME ROWS` prints bytes.

Each contender runs in a process of its own, because the peak of a process never falls.
"""

import subprocess
import sys
from pathlib import Path

from bench.contenders import ALL_TERMS, inputs, losses, step

DIM = 768


def resident_bytes(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak since the last reset) of this process; Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


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
    # Starting libraries peaks higher than they stay: the peak is counted from here on.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    run()
    print(resident_bytes("VmHWM") - before)
