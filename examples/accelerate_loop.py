"""accelerate: gradient accumulation, mixed precision, and a state that goes on after a restart.

Run: python examples/accelerate_loop.py, or accelerate launch examples/accelerate_loop.py
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from amn_kernels import FusedSeqLoss
from amn_kernels.data import load_windows, split_windows


def main(epochs=2):
    torch.manual_seed(0)
    precision = "bf16" if torch.cuda.is_available() else "no"  # on most CPUs bfloat16 products are slow
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=2)
    windows = load_windows()
    split = split_windows(windows)
    context, target = (rows.to(accelerator.device) for rows in windows.batch(split.validation[:512]))
    train = DataLoader(TensorDataset(*windows.batch(split.train[:8192])), batch_size=128, shuffle=True, drop_last=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(5 * 384, 384))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, train = accelerator.prepare(model, optimizer, train)
    # Nothing to wrap: without learnable_temperature the loss has buffers only. Registered, they are saved and restored.
    criterion = FusedSeqLoss(mse=0.5, infonce=0.5).to(accelerator.device)
    accelerator.register_for_checkpointing(criterion)

    before = torch.cosine_similarity(model(context), target).mean()
    for _ in range(epochs):
        for contexts, targets in train:
            with accelerator.accumulate(model), accelerator.autocast():
                loss = criterion(model(contexts), targets)  # pred may be bfloat16; the loss computes in float32
                accelerator.backward(loss)  # divides by the number of micro-batches
                optimizer.step()
                optimizer.zero_grad()
    after = torch.cosine_similarity(model(context), target).mean()

    folder = tempfile.mkdtemp()
    accelerator.save_state(folder)
    accelerator.load_state(folder)
    accelerator.print(f"validation cosine {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main()
