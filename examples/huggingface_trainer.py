"""Hugging Face Trainer: `compute_loss_func`, right under gradient accumulation.

Run: python examples/huggingface_trainer.py
"""

import tempfile

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from amn_kernels import FusedSeqLoss
from amn_kernels.data import load_windows, split_windows


class Vectors(Dataset):
    def __init__(self, context, target):
        self.rows = [{"context": c, "labels": t} for c, t in zip(context, target, strict=True)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Predictor(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(5 * 384, 384))
        self.criterion = FusedSeqLoss(**options)  # in the model, so that its running norms are saved with it

    def forward(self, context):
        return {"pred": self.layers(context)}

    def loss(self, outputs, labels, num_items_in_batch=None):
        """Trainer adds up what this returns over the micro-batches of one update, so each has to give its share.

        num_items_in_batch counts the numbers in the labels of all of them, N·D. The sum is then the loss of the whole
        batch for mse and cosine; infonce, moment and variance are per micro-batch, because they compare its rows.
        """
        loss = self.criterion(outputs["pred"], labels)
        return loss if num_items_in_batch is None else loss * (labels.numel() / num_items_in_batch)


if __name__ == "__main__":
    torch.manual_seed(0)
    windows = load_windows()
    split = split_windows(windows)
    context, target = windows.batch(split.validation[:512])
    model, train = Predictor(mse=0.5, infonce=0.5), Vectors(*windows.batch(split.train[:8192]))
    before = torch.cosine_similarity(model(context)["pred"], target).mean()
    arguments = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=128, gradient_accumulation_steps=2, learning_rate=1e-3,
        max_steps=60, logging_steps=20, save_steps=60, remove_unused_columns=False, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=train, compute_loss_func=model.loss).train()
    after = torch.cosine_similarity(model(context)["pred"], target).mean()
    print(f"validation cosine {before:.3f} before, {after:.3f} after")
