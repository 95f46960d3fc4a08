"""Next-vector predictors, by name. Each maps contexts [B, T, D] to predictions [B, D].

Those that don't start from the mean of the context take ``residual=True``: they then predict what is to be added to it,
and start from adding nothing. The mean is hard to beat, and the only part of such a model that knows vectors of a kind
that was not trained on.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

ATTENTION_DIM = 256
HIDDEN_DIMS = (512, 256)


class AMN(nn.Module):
    """Attention and an MLP that correct the mean of the context; 1,510,912 parameters at D = 768.

    The last layer starts at zero, so that training starts from the mean of the context, which is hard to beat: on the
    bundled verses the validation cosine after 7 epochs was 0.566 so (its best), and 0.540 with PyTorch's default start.
    """

    def __init__(self, dim: int) -> None:
        """dim: D, the size of the vectors."""
        super().__init__()
        self.query = nn.Linear(dim, ATTENTION_DIM)
        self.key = nn.Linear(dim, ATTENTION_DIM)
        wide, narrow = HIDDEN_DIMS
        self.residual = nn.Sequential(
            nn.Linear(2 * dim, wide),
            nn.GELU(),
            nn.LayerNorm(wide),
            nn.Linear(wide, narrow),
            nn.GELU(),
            nn.LayerNorm(narrow),
            nn.Linear(narrow, dim),
        )
        nn.init.zeros_(self.residual[-1].weight)
        nn.init.zeros_(self.residual[-1].bias)

    def forward(self, context: Tensor) -> Tensor:
        """context: [B, T, D] -> prediction [B, D]."""
        baseline = context.mean(dim=1)  # [B, D]
        logits = torch.einsum("btk,bk->bt", self.key(context), self.query(baseline)) / math.sqrt(ATTENTION_DIM)
        mixed = torch.einsum("bt,btd->bd", logits.softmax(dim=1), context)
        return baseline + self.residual(torch.cat([baseline, mixed], dim=1))


class Predictor(nn.Module):
    """What the three models below share: the hidden size, the last layer and the mean of the context."""

    HIDDEN = 512

    def __init__(self, residual: bool, last: nn.Linear) -> None:
        super().__init__()
        self.residual = residual
        # What the last layer reads is of order 1, elements of vectors of length 1 are of order 1 / sqrt(D). With
        # torch's initial weights a prediction is ten times too long, and most of an epoch goes into shortening it.
        scale = 0.0 if residual else last.out_features**-0.5
        with torch.no_grad():
            last.weight.mul_(scale)
            last.bias.mul_(scale)

    def forward(self, context: Tensor) -> Tensor:
        """context: [B, T, D] -> prediction [B, D]."""
        predicted = self.predict(context)
        return context.mean(dim=1) + predicted if self.residual else predicted

    def predict(self, context: Tensor) -> Tensor:  # [B, T, D] -> [B, D]
        """The prediction, or with ``residual`` what is added to the mean of the context."""
        raise NotImplementedError


class LSTM(Predictor):
    """Two layers of LSTM, of which the last step is read; 5,120,768 parameters at D = 768."""

    def __init__(self, dim: int, *, residual: bool = False) -> None:
        """dim: D, the size of the vectors; residual: add to the mean of the context."""
        last = nn.Linear(self.HIDDEN, dim)
        super().__init__(residual, last)
        self.lstm = nn.LSTM(dim, self.HIDDEN, num_layers=2, dropout=0.2, batch_first=True)
        self.output = last

    def predict(self, context: Tensor) -> Tensor:
        """As in `Predictor`."""
        # On most CPUs oneDNN has no LSTM of 16 bits. On other devices autocast stays as it is.
        with torch.autocast("cpu", enabled=False):
            hidden = self.lstm(context)[0]
        return self.output(hidden[:, -1])


class GRU(Predictor):
    """Four residual blocks of one GRU layer and a LayerNorm each; 7,095,552 parameters at D = 768."""

    def __init__(self, dim: int, *, residual: bool = False) -> None:
        """dim: D, the size of the vectors; residual: add to the mean of the context."""
        last = nn.Linear(self.HIDDEN, dim)
        super().__init__(residual, last)
        self.input = nn.Linear(dim, self.HIDDEN)
        self.layers = nn.ModuleList(nn.GRU(self.HIDDEN, self.HIDDEN, batch_first=True) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(self.HIDDEN) for _ in range(4))
        self.output = last

    def predict(self, context: Tensor) -> Tensor:
        """As in `Predictor`."""
        hidden = self.input(context)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            hidden = norm(hidden + layer(hidden)[0])
        return self.output(hidden[:, -1])


class Transformer(Predictor):
    """Four decoder layers whose memory is their own input, causal throughout; 17,867,520 parameters at D = 768."""

    def __init__(self, dim: int, *, residual: bool = False) -> None:
        """dim: D, the size of the vectors; residual: add to the mean of the context."""
        last = nn.Linear(self.HIDDEN, dim)
        super().__init__(residual, last)
        self.input = nn.Linear(dim, self.HIDDEN)
        layer = nn.TransformerDecoderLayer(
            self.HIDDEN, nhead=8, dim_feedforward=2048, dropout=0.1, batch_first=True, norm_first=False
        )
        self.decoder = nn.TransformerDecoder(layer, num_layers=4)
        self.head = nn.Sequential(nn.Linear(self.HIDDEN, self.HIDDEN), nn.GELU(), nn.LayerNorm(self.HIDDEN), last)

    def predict(self, context: Tensor) -> Tensor:
        """As in `Predictor`."""
        steps = context.shape[1]
        hidden = self.input(context) + sinusoids(steps, self.HIDDEN).to(context)
        causal = nn.Transformer.generate_square_subsequent_mask(steps, device=context.device, dtype=context.dtype)
        hidden = self.decoder(
            hidden, hidden, tgt_mask=causal, memory_mask=causal, tgt_is_causal=True, memory_is_causal=True
        )
        return self.head(hidden[:, -1])


def sinusoids(steps: int, dim: int) -> Tensor:  # [T, D]
    """Positions as sines and cosines of falling frequency: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5."""
    position = torch.arange(steps).unsqueeze(1)
    angles = position * torch.exp(-math.log(10000.0) * torch.arange(0, dim, 2) / dim)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


MODELS: dict[str, Callable[..., nn.Module]] = {"amn": AMN, "lstm": LSTM, "gru": GRU, "transformer": Transformer}
"""Name: constructor that takes D, and for all but AMN, which always does, ``residual``."""


def register_model(name: str, constructor: Callable[..., nn.Module]) -> None:
    """Make a model of your own known under a name; ValueError if that is taken.

    Args:
        name: For ``--model``.
        constructor: Takes D and returns a module that maps contexts [B, T, D] to predictions [B, D].
    """
    if name in MODELS:
        raise ValueError(f"there is a model {name!r} already")
    MODELS[name] = constructor


def takes_residual(name: str) -> bool:
    """Whether the model of that name has the option ``residual``."""
    return "residual" in inspect.signature(MODELS[name]).parameters


def build_model(name: str, dim: int, *, residual: bool = False) -> nn.Module:
    """A new model for vectors of size `dim`; ValueError for an unknown name, or a residual that it does not take."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}, expected one of {sorted(MODELS)}")
    if not residual:
        return MODELS[name](dim)
    if not takes_residual(name):
        raise ValueError(f"residual is not an option of the model {name!r}")
    return MODELS[name](dim, residual=True)
