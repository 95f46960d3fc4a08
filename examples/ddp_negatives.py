"""DistributedDataParallel with the negatives of all ranks: every rank's loss is that of the whole batch.

Run: torchrun --nproc-per-node 2 examples/ddp_negatives.py
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from amn_kernels import FusedSeqLoss
from amn_kernels.data import load_windows, split_windows


def main(steps=40, batch=256):
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    windows = load_windows()
    split = split_windows(windows)
    context, target = windows.batch(split.validation[:512])
    model = DistributedDataParallel(nn.Sequential(nn.Flatten(), nn.Linear(5 * 384, 384)))
    criterion = FusedSeqLoss(mse=0.5, infonce=0.5, gather_negatives=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    before = torch.cosine_similarity(model(context), target).mean()
    rng = np.random.default_rng(0)  # the same on every rank, which takes its part of the batch
    for _ in range(steps):
        rows = rng.choice(split.train, batch, replace=False)[rank::ranks]
        contexts, targets = windows.batch(rows)
        loss = criterion(model(contexts), targets)  # keys go round in a ring; the same number on every rank
        optimizer.zero_grad()
        loss.backward()  # DistributedDataParallel's mean over ranks is the gradient of that number
        optimizer.step()
    after = torch.cosine_similarity(model(context), target).mean()
    if rank == 0:
        negatives = round(criterion.stats.chance.exp().item())
        print(f"{len(rows)} rows on each of {ranks} ranks, every row against {negatives} keys")
        print(f"validation cosine {before:.3f} before, {after:.3f} after")
    dist.barrier()  # or gloo may abort a process that still holds a tensor of the last step
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
