"""What is compared with other libraries: InfoNCE in four forms, in each of them losses that compute the same thing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from amn_kernels import FusedSeqLoss
from amn_kernels.reference import eager
from bench import peers
from bench.contenders import compiled

TEMPERATURE = 0.07
OURS = "fused"
NTXENT_ROWS = 256
"""The largest number of rows for pytorch-metric-learning, whose time and memory grow with N³: 17 GB at 1,024 rows."""

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contest:
    """One form of InfoNCE and who computes it."""

    target_learns: bool  # whether target needs a gradient as well
    contenders: Callable[[int], dict[str, Loss]]  # by name, for a number of rows
    left_out: dict[str, Callable[[int], str | None]]  # why a contender is not there for a number of rows


def plain(pred: Tensor, target: Tensor) -> Tensor:
    return eager.seq_loss(pred, target, infonce=1.0, temperature=TEMPERATURE)


def plain_both(pred: Tensor, target: Tensor) -> Tensor:
    """As one writes it with a single product of similarities."""
    logits = F.normalize(pred, dim=-1) @ F.normalize(target, dim=-1).mT / TEMPERATURE
    own = torch.arange(len(pred), device=pred.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2


def fused(**options) -> Loss:
    return FusedSeqLoss(mse=0.0, infonce=1.0, temperature=TEMPERATURE, weighting="fixed", **options)


def fused_views() -> Loss:
    """The fused loss on SimCLR's problem: 2N queries and keys, where the ids leave out the view itself."""
    loss = fused()

    def run(pred, target):
        ids = torch.arange(len(pred), device=pred.device).repeat(2)
        return loss(torch.cat([pred, target]), torch.cat([target, pred]), ids=ids)

    return run


def _one_direction(rows: int) -> dict[str, Loss]:
    found = {
        OURS: fused(),
        "eager PyTorch": plain,
        "torch.compile": compiled(plain),
        "sentence-transformers MNRL": peers.ranking(TEMPERATURE),
        "sentence-transformers CachedMNRL": peers.cached_ranking(TEMPERATURE),
        "cut-cross-entropy (torch_compile)": peers.cut_cross_entropy(TEMPERATURE),
        "torch linear_cross_entropy": peers.linear_cross_entropy(TEMPERATURE),
        "torch linear_cross_entropy, chunked": peers.linear_cross_entropy(TEMPERATURE, chunked=True),
    }
    if rows <= NTXENT_ROWS:
        found["pytorch-metric-learning NTXent"] = peers.ntxent(TEMPERATURE)
    return found


def _both_directions(rows: int) -> dict[str, Loss]:
    return {
        OURS: fused(direction="both"),
        "eager PyTorch": plain_both,
        "torch.compile": compiled(plain_both),
        "open_clip ClipLoss": peers.clip(TEMPERATURE),
        "sentence-transformers MNRL": peers.ranking(TEMPERATURE, both=True),
        "sentence-transformers CachedMNRL": peers.cached_ranking(TEMPERATURE, both=True),
    }


def _views(rows: int) -> dict[str, Loss]:
    return {OURS: fused_views(), "lightly NTXent": peers.simclr(TEMPERATURE)}


def _ntxent_grows(rows: int) -> str | None:
    return f"time and memory grow with N³; run up to {NTXENT_ROWS} rows" if rows > NTXENT_ROWS else None


CONTESTS = {
    "pred_to_target": Contest(False, _one_direction, {"pytorch-metric-learning NTXent": _ntxent_grows}),
    "both": Contest(False, _both_directions, {}),
    "clip": Contest(True, _both_directions, {}),
    "simclr": Contest(True, _views, {}),
}
"""By the names that `report.peers.TITLES` has titles for."""


def make_inputs(rows: int, dim: int, dtype: torch.dtype, target_learns: bool) -> tuple[Tensor, Tensor]:
    """Seeded pred and target [rows, dim]: pred is target plus noise of four times its size, so that no loss is 0."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(rows, dim, generator=generator)
    pred = target + 4 * torch.randn(rows, dim, generator=generator)
    return pred.to(dtype).requires_grad_(), target.to(dtype).requires_grad_(target_learns)


# Largest relative differences from the fused loss: of the value, and of the gradient as one vector. The 16-bit
# contenders round similarities and weights to 8 bits, the fused loss computes in float32.
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (3e-2, 3e-1)}


def check_equal(losses: dict[str, Loss], pred: Tensor, target: Tensor) -> dict[str, float]:
    """The largest relative difference of each contender's gradients from the fused loss's.

    Raises AssertionError where a contender computes something else.
    """
    leaves = [x for x in (pred, target) if x.requires_grad]

    def evaluate(loss):
        value = loss(pred, target)
        return value.detach().float(), [g.float() for g in torch.autograd.grad(value, leaves)]

    value, gradients = evaluate(losses[OURS])
    of_value, of_gradient = TOLERANCE[pred.dtype]
    differences = {}
    for name, loss in losses.items():
        other, others = evaluate(loss)
        assert abs(other - value) <= of_value * abs(value), f"{name}: {other} in place of {value}"
        differences[name] = 0.0
        for a, b in zip(others, gradients, strict=True):
            difference = ((a - b).norm() / b.norm()).item()
            assert difference <= of_gradient, f"{name}: gradients differ by {difference:.2g}"
            differences[name] = max(differences[name], difference)
    return differences
