"""Other libraries' losses on bare tensors, for equality tests and benchmarks: each where it defines the same thing.

All take pred and target [N, D] and return a scalar. Needs the `peers` extra, and open_clip_torch, of which only loss.py
is loaded: the package itself imports torchvision.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss, SupConLoss
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss, MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def open_clip_losses() -> ModuleType:
    """The module open_clip.loss, loaded alone."""
    package = importlib.util.find_spec("open_clip")
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clip(temperature: float) -> Loss:
    """open_clip ClipLoss: InfoNCE in both directions, of features that the caller normalises."""
    loss = open_clip_losses().ClipLoss()
    return lambda pred, target: loss(F.normalize(pred, dim=-1), F.normalize(target, dim=-1), 1 / temperature)


def ranking(temperature: float, *, both: bool = False, extra_negatives: Tensor | None = None) -> Loss:
    """sentence-transformers MultipleNegativesRankingLoss.

    Both directions are its "symmetric" form. Its hard negatives come N at a time, so extra_negatives are [k N, D].
    """
    directions = ("query_to_doc", "doc_to_query") if both else ("query_to_doc",)
    loss = MultipleNegativesRankingLoss(
        nn.Identity(), scale=1 / temperature, directions=directions, partition_mode="per_direction"
    )

    def run(pred, target):
        hard = [] if extra_negatives is None else list(extra_negatives.split(len(pred)))
        return loss.compute_loss_from_embeddings([pred, target, *hard], None)

    return run


class _Columns(nn.Module):
    """Stands for a model whose embeddings are given: takes and returns features."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features


class _Guide(nn.Module):
    """Embeds both columns as the targets."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["guide"]}


def gist(temperature: float, margin: float) -> Loss:
    """sentence-transformers GISTEmbedLoss with the targets as guide, pred to target only."""
    loss = GISTEmbedLoss.__new__(GISTEmbedLoss)  # its constructor wants whole models with tokenizers
    nn.Module.__init__(loss)
    loss.model, loss.guide = _Columns(), _Guide()
    loss.temperature, loss.margin, loss.margin_strategy = temperature, margin, "absolute"
    loss.contrast_anchors = loss.contrast_positives = loss.gather_across_devices = loss.must_retokenize = False
    loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()

    def run(pred, target):
        columns = [{"sentence_embedding": x, "guide": target} for x in (pred, target)]
        return loss(columns, None)

    return run


def ntxent(temperature: float) -> Loss:
    """pytorch-metric-learning NTXentLoss: InfoNCE, pred to target."""
    return SelfSupervisedLoss(NTXentLoss(temperature=temperature), symmetric=False)


def supcon(temperature: float, ids: Tensor) -> Loss:
    """pytorch-metric-learning SupConLoss: all rows with the own id are positives."""
    loss = SupConLoss(temperature=temperature)
    keys = ids.clone()  # the very same tensor would mean the very same rows, and leave out the diagonal
    return lambda pred, target: loss(pred, ids, ref_emb=target, ref_labels=keys)


def gradients(loss: Loss, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients of pred and of target."""
    leaves = [x.detach().requires_grad_() for x in (pred, target)]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)
