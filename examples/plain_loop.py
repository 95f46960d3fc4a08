"""A plain PyTorch loop: predict the next sentence vector from the five before it.

Run: python examples/plain_loop.py
"""

import numpy as np
import torch
from torch import nn

from amn_kernels import FusedSeqLoss
from amn_kernels.data import load_windows, split_windows


def main(steps=80, batch=256):
    torch.manual_seed(0)
    windows = load_windows()  # bundled sentence vectors: five of context [5, 384] and the one that follows [384]
    split = split_windows(windows)
    validation = windows.batch(split.validation[:512])
    model = nn.Sequential(nn.Flatten(), nn.Linear(5 * 384, 384))
    criterion = FusedSeqLoss(mse=0.5, infonce=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    before = evaluate(model, criterion, *validation)
    rng = np.random.default_rng(0)
    for step in range(steps):
        context, target = windows.batch(rng.choice(split.train, batch, replace=False))
        loss = criterion(model(context), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:  # as_dict() reads from the device, so not at every step
            shown = criterion.stats.as_dict()
            print(step, *(f"{name} {shown[name]:.3g}" for name in ("loss_mse", "loss_infonce", "share_mse")))
    print(f"validation cosine {before:.3f} before, {evaluate(model, criterion, *validation):.3f} after")


@torch.no_grad()
def evaluate(model, criterion, context, target):
    """Mean cosine between prediction and target. In eval mode the running norms of the weighting stay as they are."""
    criterion.eval()
    criterion(model(context), target)
    criterion.train()
    return criterion.stats.cosine_similarity.item()


if __name__ == "__main__":
    main()
