"""Products of sm_90 that still read shared memory while it is refilled, found in Triton's intermediate code (TTGIR).

A `warp_group_dot` is asynchronous: after `warp_group_dot_wait {pendings = n}` the last n still read their operands, and
a copy into one of these is a race. No barrier prevents it, and what executes the code before this step does not see it.
"""

import re
from collections import deque
from collections.abc import Iterator

_ALLOCATED = re.compile(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x")
_VIEW = re.compile(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)")
_PRODUCT = re.compile(r"ttng\.warp_group_dot (%\w+(?:#\d+)?), (%\w+(?:#\d+)?),(.*isAsync = true)?")
_WAIT = re.compile(r"ttng\.warp_group_dot_wait .*{pendings = (\d+)")
_FILLED = re.compile(r"ttg\.(?:async_copy_global_to_local|local_store) %\w+(?:#\d+)?, (%\w+)")


def refills_while_read(ttgir: str) -> int:
    """Copies into a buffer of one slot that a product may still be reading.

    Nothing is known of buffers with several slots, where the one to fill is computed at run time, nor of those that a
    loop carries. ValueError for a product that is not understood.
    """
    slots, of, found = {}, {}, set()
    pending = deque()
    for line in _run(ttgir.splitlines()):
        if match := _ALLOCATED.search(line):
            slots[match[1]] = int(match[2])
        elif match := _VIEW.search(line):
            of[match[1]] = of.get(match[2], match[2])
        elif match := _PRODUCT.search(line):
            if match[3]:
                pending.append({of.get(x, x) for x in match.groups()[:2]})
            else:
                pending.clear()
        elif "ttng.warp_group_dot " in line:
            raise ValueError(f"not understood: {line.strip()}")
        elif match := _WAIT.search(line):
            while len(pending) > int(match[1]):
                pending.popleft()
        elif match := _FILLED.search(line):
            buffer = of.get(match[1], match[1])
            if slots.get(buffer) == 1 and any(buffer in operands for operands in pending):
                found.add(line)
    return len(found)


def _run(lines: list[str]) -> Iterator[str]:
    """The lines in the order in which they are executed, every loop twice."""
    i = 0
    while i < len(lines):
        line = lines[i]
        yield line
        i += 1
        if " scf.for " in line or " scf.while " in line:
            indent = line[: len(line) - len(line.lstrip())]
            end = next(j for j in range(i, len(lines)) if lines[j].startswith(indent + "}"))
            body = lines[i:end]
            yield from _run(body)
            yield from _run(body)
            i = end
