"""Lightning: the loss as a part of the LightningModule, its diagnostics in the log.

Run: python examples/lightning_module.py
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from amn_kernels import FusedSeqLoss
from amn_kernels.data import load_windows, split_windows


class Predictor(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(5 * 384, 384))
        self.criterion = FusedSeqLoss(mse=0.5, infonce=0.5)  # a submodule: moved and saved with the model

    def training_step(self, batch, _):
        context, target = batch
        loss = self.criterion(self.layers(context), target)
        if self.global_step % self.trainer.log_every_n_steps == 0:  # as_dict() reads from the device
            self.log_dict(self.criterion.stats.as_dict())
        return loss

    def validation_step(self, batch, _):
        context, target = batch
        self.criterion(self.layers(context), target)  # in eval mode: its running norms stay as they are
        self.log("cosine", self.criterion.stats.cosine_similarity, batch_size=len(target))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    lightning.seed_everything(0)
    windows = load_windows()
    split = split_windows(windows)
    train = DataLoader(TensorDataset(*windows.batch(split.train[:8192])), batch_size=256, shuffle=True, drop_last=True)
    validation = DataLoader(TensorDataset(*windows.batch(split.validation[:512])), batch_size=512)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=20,
    )  # fmt: skip
    model = Predictor()
    (before,) = trainer.validate(model, validation, verbose=False)
    trainer.fit(model, train)
    (after,) = trainer.validate(model, validation, verbose=False)
    print(f"validation cosine {before['cosine']:.3f} before, {after['cosine']:.3f} after")
