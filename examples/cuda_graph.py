"""A whole training step as one CUDA graph: forward, balanced weights, backward and optimizer without the host.

Nothing in the loss reads a device value on the host, and the state of the weighting is updated in place.
Run: python examples/cuda_graph.py (needs a CUDA GPU)
"""

import numpy as np
import torch
from torch import nn

from amn_kernels import FusedSeqLoss
from amn_kernels.data import load_windows, split_windows


def make_step(model, criterion, optimizer, context, target):
    """The step on fixed input tensors, which is what a graph can hold."""

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss = criterion(model(context), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def main(steps=200, batch=256, device="cuda"):
    torch.manual_seed(0)
    windows = load_windows()
    split = split_windows(windows)
    context, target = (x.to(device) for x in windows.batch(split.train[:batch]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(5 * 384, 384)).to(device)
    criterion = FusedSeqLoss(mse=0.5, infonce=0.5).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    step = make_step(model, criterion, optimizer, context, target)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is allocated at the first calls must not be part of the graph
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    before = criterion.stats.cosine_similarity.item()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    rng = np.random.default_rng(0)
    for _ in range(steps):
        for held, new in zip((context, target), windows.batch(rng.choice(split.train, batch)), strict=True):
            held.copy_(new)
        graph.replay()
    print(f"training cosine {before:.3f} before, {criterion.stats.cosine_similarity.item():.3f} after")


if __name__ == "__main__":
    main() if torch.cuda.is_available() else print("skipped: a CUDA graph needs a CUDA GPU, and here is none")
