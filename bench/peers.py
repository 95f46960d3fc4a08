"""Other libraries' losses on bare tensors, for equality tests and benchmarks: each where it defines the same thing.

All take pred and target [N, D] and return a scalar. Needs the `peers` extra, and of open_clip_torch, lightly and
cut-cross-entropy single files, which are loaded alone: the packages import torchvision or Triton.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss, SupConLoss
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    GISTEmbedLoss,
    MultipleNegativesRankingLoss,
)
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


def _without_init(package: str) -> ModuleType:
    """An installed package whose modules can be imported although its own __init__ can't."""
    if package not in sys.modules:
        folder = importlib.util.find_spec(package.split(".")[0]).submodule_search_locations[0]
        module = ModuleType(package)
        module.__path__ = [str(Path(folder, *package.split(".")[1:]))]
        sys.modules[package] = module
    return sys.modules[package]


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


class _GradientCache(torch.autograd.Function):
    """The gradient made chunk by chunk in the forward, as the library caches it for the backward of the model."""

    @staticmethod
    def forward(ctx, loss, *embeddings):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(x.requires_grad) for x in embeddings]
            value = loss.calculate_loss([[x] for x in leaves], with_backward=any(x.requires_grad for x in leaves))
        ctx.save_for_backward(*(leaf.grad for leaf in leaves))
        return value.detach()

    @staticmethod
    def backward(ctx, incoming):
        return None, *(None if x is None else incoming * x for x in ctx.saved_tensors)


def cached_ranking(temperature: float, *, both: bool = False, rows: int = 1024) -> Loss:
    """sentence-transformers CachedMultipleNegativesRankingLoss, which never has more than `rows` rows of similarities.

    Only its part after the model, which is what a loss on bare tensors is.
    """
    directions = ("query_to_doc", "doc_to_query") if both else ("query_to_doc",)
    loss = CachedMultipleNegativesRankingLoss(
        nn.Sequential(nn.Identity()),
        scale=1 / temperature,
        mini_batch_size=rows,
        directions=directions,
        partition_mode="per_direction",
    )
    return lambda pred, target: _GradientCache.apply(loss, pred, target)


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


def simclr(temperature: float) -> Loss:
    """lightly NTXentLoss without a memory bank: the rows of both views are queries, and all others are their keys."""
    _without_init("lightly.loss")
    _without_init("lightly.models.modules")
    models = _without_init("lightly.models")
    # The memory bank, which is off, would import torchvision through it.
    models.utils = sys.modules.setdefault("lightly.models.utils", ModuleType("lightly.models.utils"))
    return importlib.import_module("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=temperature)


def cut_cross_entropy(temperature: float) -> Loss:
    """cut-cross-entropy in its torch_compile implementation, the one for CPUs: keys are the classifier."""
    _without_init("cut_cross_entropy")
    loss = importlib.import_module("cut_cross_entropy.torch_compile").torch_compile_linear_cross_entropy
    return lambda pred, target: loss(
        F.normalize(pred, dim=-1) / temperature,
        F.normalize(target, dim=-1),
        torch.arange(len(pred), device=pred.device),
    )


def linear_cross_entropy(temperature: float, *, chunked: bool = False) -> Loss:
    """torch's own linear_cross_entropy (2.13 and newer), plain or in chunks of rows."""
    options = {"options": nn.LinearCrossEntropyOptions()} if chunked else {}
    return lambda pred, target: F.linear_cross_entropy(
        F.normalize(pred, dim=-1) / temperature,
        F.normalize(target, dim=-1),
        torch.arange(len(pred), device=pred.device),
        **options,
    )


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
