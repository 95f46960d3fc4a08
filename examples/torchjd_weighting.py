"""torchjd: its weightings (UPGrad, MGDA, PCGrad ...) on the Gram matrix that the loss has anyway.

torchjd itself would differentiate once per term to get that matrix; here it comes with the forward pass.
Run: python examples/torchjd_weighting.py
"""

import numpy as np
import torch
from torch import nn
from torchjd.aggregation import UPGradWeighting

from amn_kernels import FusedSeqLoss
from amn_kernels.data import load_windows, split_windows


def main(steps=60, batch=256):
    torch.manual_seed(0)
    windows = load_windows()
    split = split_windows(windows)
    context, target = windows.batch(split.validation[:512])
    model = nn.Sequential(nn.Flatten(), nn.Linear(5 * 384, 384))
    upgrad = UPGradWeighting()
    # Called with the inner products [m, m] of the term gradients and the values [m]; λ multiplies what it returns. The
    # λ bring the gradients to one scale, which UPGrad leaves as it is: `amn-kernels audit` prints them for any data.
    criterion = FusedSeqLoss(mse=0.5, infonce=0.0002, weighting=lambda gramian, values: upgrad(gramian))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    before = torch.cosine_similarity(model(context), target).mean()
    rng = np.random.default_rng(0)
    for step in range(steps):
        contexts, targets = windows.batch(rng.choice(split.train, batch, replace=False))
        loss = criterion(model(contexts), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            shown = criterion.stats.as_dict()
            print(step, *(f"{name} {shown[name]:.3g}" for name in ("weight_mse", "share_mse", "share_infonce")))
    after = torch.cosine_similarity(model(context), target).mean()
    print(f"validation cosine {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main()
