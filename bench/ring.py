"""Peak memory of a rank whose rows see the keys of all ranks: `python -m bench.ring [RANKS] [ROWS]`.

The ring against gathering all keys first, with the same kernels and with eager PyTorch, each in processes of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from amn_kernels import FusedSeqLoss
from bench.contenders import inputs
from bench.memory import resident_bytes

DIM = 768


def gathered(target: torch.Tensor) -> list[torch.Tensor]:
    """The targets of every rank."""
    parts = [torch.empty_like(target) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, target)
    return parts


def ring(pred, target):
    """Keys go round."""
    return FusedSeqLoss(mse=0.0, infonce=1.0, weighting="fixed", gather_negatives=True)(pred, target)


def gather(pred, target):
    """The others' targets as extra negatives."""
    others = torch.cat([part for rank, part in enumerate(gathered(target)) if rank != dist.get_rank()])
    return FusedSeqLoss(mse=0.0, infonce=1.0, weighting="fixed")(pred, target, extra_negatives=others)


def gather_eager(pred, target):
    """Own targets first, so that the own key is on the diagonal."""
    parts = gathered(target)
    own = parts.pop(dist.get_rank())
    keys = torch.cat([own, *parts])
    logits = torch.nn.functional.normalize(pred, dim=-1) @ torch.nn.functional.normalize(keys, dim=-1).mT / 0.07
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(pred)))


CONTENDERS = {f.__name__: f for f in (ring, gather, gather_eager)}


def measure(name: str, ranks: int, rows: int) -> int:
    """Largest extra peak of a rank, in bytes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.run(
        [*command, "-m", "bench.ring", name, str(rows)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    return int(process.stdout.split()[-1])


def _worker(name: str, rows: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run = CONTENDERS[name]
    run(*inputs(256, DIM)).backward()  # libraries loaded, connections made
    pred, target = inputs(rows, DIM)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    run(pred, target).backward()
    peak = torch.tensor([resident_bytes("VmHWM") - before])
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(peak.item())
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in CONTENDERS:
        _worker(sys.argv[1], int(sys.argv[2]))
    else:
        ranks, rows = (int(x) for x in (sys.argv[1:] + ["4", "4096"][len(sys.argv) - 1 :])[:2])
        for name in CONTENDERS:
            print(f"{name:<13} {measure(name, ranks, rows) / 2**20:8.1f} MiB per rank, {ranks} ranks of {rows:,} rows")
