"""sentence-transformers: a loss class with its `forward(sentence_features, labels)` contract.

The model is built from nothing, and the pairs are names and documentation of the standard library: no download.
Run: python examples/sentence_transformers_loss.py
"""

import importlib
import inspect
import tempfile

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from amn_kernels import FusedSeqLoss


class FusedLoss(nn.Module):
    """Columns: anchor, positive, then any number of hard negatives; labels are not used, as in MNRL."""

    def __init__(self, model, **options):
        super().__init__()
        self.model = model
        self.criterion = FusedSeqLoss(**options)

    def forward(self, sentence_features, labels):
        anchor, positive, *negatives = [self.model(column)["sentence_embedding"] for column in sentence_features]
        return self.criterion(anchor, positive, extra_negatives=torch.cat(negatives) if negatives else None)


def pairs():
    """Every function of some modules of the standard library: its name in words, the first line of its docstring."""
    for module in ("os", "os.path", "shutil", "random", "statistics", "math", "string", "inspect", "textwrap", "ast"):
        for name, function in inspect.getmembers(importlib.import_module(module), callable):
            lines = (inspect.getdoc(function) or "").splitlines()
            if lines and not name.startswith("_"):
                yield name.replace("_", " "), lines[0]


if __name__ == "__main__":
    torch.manual_seed(0)
    names, documentation = zip(*pairs(), strict=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(names + documentation, trainers.BpeTrainer(vocab_size=1000, show_progress=False))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=64)], device="cpu")
    before = model.similarity_pairwise(model.encode(names), model.encode(documentation)).mean()
    data = Dataset.from_dict({"anchor": names, "positive": documentation})
    arguments = SentenceTransformerTrainingArguments(
        tempfile.mkdtemp(), num_train_epochs=10, per_device_train_batch_size=64, learning_rate=0.01, report_to=[],
        disable_tqdm=True, logging_steps=20, save_strategy="no", dataloader_drop_last=True,
    )  # fmt: skip
    loss = FusedLoss(model, mse=0.2, infonce=1.0, direction="both")  # gradients for both columns, in one pass
    SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss).train()
    after = model.similarity_pairwise(model.encode(names), model.encode(documentation)).mean()
    print(f"training cosine {before:.3f} before, {after:.3f} after")
