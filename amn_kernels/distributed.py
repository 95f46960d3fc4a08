"""The loss of one batch whose rows are spread over the ranks of a torch.distributed group.

Keys go round in a ring: every rank sends the block it has to the next one while it works on it, so that a rank holds
two blocks of keys at a time and never all of them. What is gathered for a block, column sums and the gradient of its
targets, travels with it and comes home after the last step. The backward needs no communication.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from amn_kernels import algorithm, ops, triton
from amn_kernels.algorithm import Saved
from amn_kernels.infonce import Exchange, Keys
from amn_kernels.primitives import MEANS, PRODUCTS, CompiledPrimitives, Primitives
from amn_kernels.reference.seq_loss import compute_dtype
from amn_kernels.stats import TermOutputs

_TENSORS = ("pred", "target", "extra_negatives", "temperature")


def why_unsupported(pred: Tensor) -> str | None:
    """Why the ranks can't compute a loss together, or None if they can."""
    if not dist.is_available() or not dist.is_initialized():
        return "torch.distributed is not initialised (init_process_group)"
    if pred.device.type == "cpu":
        return ops.why_unavailable()
    if pred.device.type == "cuda":
        return triton.why_unavailable()
    return f"there are no primitives for {pred.device.type}"


def _primitives(pred: Tensor) -> Primitives:
    if pred.is_cuda:
        from amn_kernels.triton.primitives import TritonPrimitives

        return TritonPrimitives()
    return CompiledPrimitives()


class Group(Exchange):
    """The ranks of a process group; with ``ring`` they see each other's keys."""

    def __init__(
        self, group: dist.ProcessGroup | None, ring: bool, rows: int, device: torch.device, same: dict[str, Any]
    ):
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.ring = ring and self.size > 1
        self.counts = [rows] * self.size
        if not self.ring:
            return
        # Every rank must know how many keys to expect. What differs elsewhere would have ranks wait for what nobody
        # sends, or take one thing for another.
        own = torch.tensor([rows, *(zlib.crc32(repr(fact).encode()) for fact in same.values())], device=device)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own, group=self.group)
        self.counts, *facts = torch.stack(everyone).T.tolist()
        for (name, fact), codes in zip(same.items(), facts, strict=True):
            if len(set(codes)) > 1:
                raise ValueError(f"{name} must be the same on every rank, rank {self.rank} has {fact}")

    def sum(self, x: Tensor) -> Tensor:  # noqa: D102
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x

    def merge_moments(self, moments: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """By the formula of Chan, Golub & LeVeque 1983, rank after rank, the same on each."""
        mine = torch.cat([moments.flatten(), count])
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        moments, count = torch.zeros_like(moments), torch.zeros_like(count)
        for part in parts:
            more, rows = part[:-1].view_as(moments), part[-1:]
            share = torch.where(rows > 0, rows / (count + rows), 0)
            delta = more[:MEANS] - moments[:MEANS]
            products = torch.stack([delta[a] * delta[b] for a, b in PRODUCTS])
            moments[MEANS:] += more[MEANS:] + products * count * share
            moments[:MEANS] += delta * share
            count += rows
        return moments, count

    def blocks(self, own: Keys, further: list[Keys]) -> Iterator[Keys]:  # noqa: D102
        yield from further
        if not self.ring:
            yield own
            return
        block, self._received = own, {}
        gathers = [name for name in ("sums", "attention") if getattr(own, name) is not None]
        for step in range(1, self.size + 1):
            size = self.counts[(self.rank - step) % self.size]
            # While the rows of this rank see the block, its keys are on their way to the next rank already; after the
            # last step only what was gathered for a block goes on, to the rank it belongs to.
            moves, arriving = self._start(
                block, ["keys", "scale", "ids", "cols"] if step < self.size else [], size, step
            )
            yield block
            more_moves, gathered = self._start(block, gathers, size, step)
            for work in (*moves, *more_moves):
                work.wait()
            if step < self.size:
                block = Keys(**arriving, **gathered)
        for name, x in gathered.items():
            getattr(own, name).copy_(x)
        self._received = {}

    def _start(self, block: Keys, names: list[str], size: int, step: int) -> tuple[list[dist.Work], dict[str, Tensor]]:
        """Send tensors of a block to the next rank, and receive those of a block of `size` keys from the one before."""
        following, previous = (dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, -1))
        received, moves = {}, []
        for name in names:
            x = getattr(block, name)
            if x is None:
                continue
            if name in ("sums", "cols"):
                received[name] = x.new_empty(len(x), 1, size)
            else:  # two of each, which take turns: one that is received into, one that is read and sent
                place = (name, step % 2)
                if place not in self._received:
                    self._received[place] = x.new_empty(1, max(self.counts), *x.shape[2:])
                received[name] = self._received[place][:, :size]
            moves.append(dist.P2POp(dist.isend, x.contiguous(), following, self.group))
            moves.append(dist.P2POp(dist.irecv, received[name], previous, self.group))
        return (dist.batch_isend_irecv(moves) if moves else []), received


class _NoDoubleBackward(torch.autograd.Function):
    """The identity on a gradient, whose backward raises.

    `once_differentiable` raises only where the incoming gradient requires one: a penalty on the gradient of the loss
    itself would silently get none.
    """

    @staticmethod
    def forward(ctx, gradient, *made_of):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("a batch over ranks (process_group, gather_negatives) has no double backward")


class _SeqLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, options, needs, mask, ids, pred, target, extra_negatives, temperature):
        ctx.prim, ctx.needs = _primitives(pred), needs
        with torch.cuda.device_of(pred):
            values, gram, metrics, saved = algorithm.forward(
                ctx.prim,
                group,
                options,
                pred,
                target,
                temperature=temperature,
                mask=mask,
                extra_negatives=extra_negatives,
                ids=ids,
                needs=needs,
            )
        ctx.options, ctx.ranks = options, group.size
        ctx.save_for_backward(pred, target, extra_negatives, temperature, *saved)
        gram = values.new_empty(0, 0) if gram is None else gram
        ctx.mark_non_differentiable(gram, metrics)
        return values, gram, metrics

    @staticmethod
    def backward(ctx, grad_values, *_):
        pred, target, extra_negatives, temperature, *saved = ctx.saved_tensors
        with torch.cuda.device_of(pred), torch.no_grad():
            gradients = algorithm.backward(
                ctx.prim,
                ctx.options,
                Saved(*saved),
                grad_values * ctx.ranks,
                pred,
                target,
                temperature=temperature,
                extra_negatives=extra_negatives,
                needs=ctx.needs,
            )
        if torch.is_grad_enabled():  # create_graph
            made_of = [x for x in (grad_values, pred, target, extra_negatives, temperature) if x is not None]
            gradients = {name: _NoDoubleBackward.apply(x, *made_of) for name, x in gradients.items()}
        return None, None, None, None, None, *(gradients.get(name) for name in _TENSORS)


def term_outputs(call) -> TermOutputs:
    """What `backends.Call` asks for, of the batch of all ranks; the call has the rows of this one.

    Every rank of ``options.process_group`` must call it, with its own number of rows. Values, Gram matrix and
    metrics are those of the rows of all ranks as one batch, the same on every rank. Gradients are those of the values
    times the number of ranks, so that the mean over ranks that DistributedDataParallel takes is the gradient of the
    loss. Extra negatives are keys for the rows of their own rank. A rank that fails gives the others an error of
    torch.distributed, within the timeout of the group; ValueError on every rank if, with ``gather_negatives``, they
    differ in more than their rows.
    """
    options, rows = call.options, call.pred.shape[:-1].numel()
    given = {name: getattr(call, name) for name in _TENSORS}
    # Under no_grad nothing: ctx.needs_input_grad would not say so.
    needs = [name for name, x in given.items() if x is not None and x.requires_grad and torch.is_grad_enabled()]
    weighting = options.weighting if isinstance(options.weighting, str) else "a function"
    same = {
        "pred's last dimension": call.pred.shape[-1],
        "the dtype that is computed in": compute_dtype(call.pred, call.target),
        # As the dtype that keys travel in.
        "target's dtype": call.target.dtype if call.target.is_cuda else None,
        "whether ids are given": call.ids is not None,
        "what needs a gradient": needs,
        "what the loss consists of": (options.terms, options.lambdas, options.variance_target),
        "how terms are weighted": (weighting, options.anchor, options.ema, options.update_every),
        "what infonce compares": (
            options.temperature, options.direction, options.positives, options.false_negative_margin,
        ),
    }  # fmt: skip
    group = Group(options.process_group, options.gather_negatives, rows, call.pred.device, same)
    values, gram, metrics = _SeqLoss.apply(group, options, frozenset(needs), call.mask, call.ids, *given.values())
    return TermOutputs(values, gram if gram.numel() else None, metrics)
