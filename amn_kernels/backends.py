"""The backends, what each can do, and which one serves a call.

Order of choice: explicit argument, then the environment variable AMN_KERNELS_BACKEND, then the best available one. An
automatic choice falls back; an explicit one that can't be met raises and says why.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amn_kernels import ops, reference, triton
from amn_kernels.options import FUSED_TERMS, LossOptions, shown
from amn_kernels.stats import TermOutputs
from amn_kernels.weighting import BalancedWeighting

ENVIRONMENT = "AMN_KERNELS_BACKEND"


class Call(NamedTuple):
    """One call of the loss: the checked arguments, as every backend gets them."""

    pred: Tensor
    target: Tensor
    options: LossOptions
    weights: Tensor | None = None  # [m] the fixed weights, in the dtype of the values
    weighting: nn.Module | None = None
    """What gives the weights once values and Gram matrix are known; None for the fixed ones."""
    temperature: Tensor | None = None  # 0-dim, where it is learned
    mask: Tensor | None = None
    extra_negatives: Tensor | None = None
    ids: Tensor | None = None


class Outcome(NamedTuple):
    """What a backend returns for a call."""

    loss: Tensor  # []: weights·values
    outputs: TermOutputs
    weights: Tensor  # [m] those that were applied


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute the loss."""

    name: str
    summary: str
    why_unavailable: Callable[[], str | None]
    """Why it can't be used in this installation at all; None if it can."""
    why_unsupported: Callable[[Call], str | None]
    """Why it can't serve this call; None if it can."""
    run: Callable[[Call], Outcome]


def _is_transformed() -> bool:
    """Whether the call is inside a torch.func transform or a forward-mode level, which a C++ function does not see."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0  # can't be traced


def _why_not_over_ranks(call: Call) -> str | None:
    from amn_kernels import distributed  # here and not above: a quarter of the time that the package takes to import

    return distributed.why_unsupported(call.pred)


def _run_over_ranks(call: Call) -> Outcome:
    from amn_kernels import distributed

    return weighted(call, distributed.term_outputs(call))


_CPU = torch.device("cpu")
_UNFUSED = f"terms other than {', '.join(FUSED_TERMS)} are not fused"


def _compiled_unsupported(call: Call, elsewhere: bool) -> str | None:
    if elsewhere:
        return f"pred is on {call.pred.device}"
    if not call.options.fused:
        return _UNFUSED
    if _is_transformed():
        return "torch.func transforms and forward-mode derivatives are not fused"
    if call.options.over_ranks:
        return _why_not_over_ranks(call)
    return None


def _cpu_unsupported(call: Call) -> str | None:
    # Not by `device.type`: to make that string takes as long as all other checks together.
    return _compiled_unsupported(call, call.pred.device != _CPU)


def _cuda_unsupported(call: Call) -> str | None:
    if call.options.over_ranks:
        return "a batch over ranks goes through Python: backend 'triton'"
    return _compiled_unsupported(call, not call.pred.is_cuda)


def _compiled_run(call: Call) -> Outcome:
    """One call of the compiled op, balance of the weights included."""
    if call.options.over_ranks:
        return _run_over_ranks(call)
    inputs = (call.temperature, call.mask, call.extra_negatives, call.ids)
    if isinstance(call.weighting, BalancedWeighting):
        state = call.weighting.arguments(call.pred.device)
        return Outcome(*ops.seq_loss_balanced(call.pred, call.target, call.options, state, *inputs))
    loss, outputs = ops.seq_loss(call.pred, call.target, call.options, call.weights, *inputs)
    return Outcome(loss, outputs, call.weights) if call.weighting is None else weighted(call, outputs)


def _triton_unsupported(call: Call) -> str | None:
    if not call.pred.is_cuda:
        return f"pred is on {call.pred.device}"
    if reason := triton.why_unsupported(call.pred.device):
        return reason
    if not call.options.fused:
        return _UNFUSED
    if torch.float64 in (call.pred.dtype, call.target.dtype):
        return "it computes in float32, and the input is float64"
    if _is_transformed():
        return "torch.func transforms and forward-mode derivatives are not fused"
    if call.options.over_ranks:
        return _why_not_over_ranks(call)
    return None


def _triton_run(call: Call) -> Outcome:
    if call.options.over_ranks:
        return _run_over_ranks(call)
    from amn_kernels.triton import backend, small_groups

    if small_groups.why_unsupported(call) is None:
        return small_groups.run(call)
    return _run_unweighted(backend.term_outputs, call)


def weighted(call: Call, outputs: TermOutputs) -> Outcome:
    """The outcome where weights and loss are computed outside the op."""
    weights = call.weights if call.weighting is None else call.weighting(outputs.values.detach(), outputs.gram)
    return Outcome(torch.dot(outputs.values, weights), outputs, weights)


def _run_unweighted(term_outputs: Callable[..., TermOutputs], call: Call) -> Outcome:
    """The outcome by a backend that knows terms but no weights."""
    outputs = term_outputs(
        call.pred,
        call.target,
        call.options,
        temperature=call.temperature,
        mask=call.mask,
        extra_negatives=call.extra_negatives,
        ids=call.ids,
    )
    return weighted(call, outputs)


def _reference_unsupported(call: Call) -> str | None:
    return "it does not work over ranks" if call.options.over_ranks else None


def _reference_run(call: Call) -> Outcome:
    # The stack of transforms can't be traced.
    if call.weighting is not None and _is_transformed() and not torch.compiler.is_compiling():
        functorch, given = torch._C._functorch, shown(call.options.weighting)
        levels = functorch.get_interpreter_stack() or ()
        if any(level.key() == functorch.TransformType.Vmap for level in levels):
            raise ValueError(f"weighting must be 'fixed' under torch.func.vmap, got {given}")
        device = call.pred.device
        if levels and isinstance(call.weighting, BalancedWeighting) and call.weighting.moves_in_python(device):
            raise ValueError(
                "weighting must be 'fixed', or the loss in eval mode, under torch.func transforms without compiled "
                f"kernels for {device}, got {given}"
            )
    return _run_unweighted(reference.term_outputs, call)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", "C++, fused, vectorised, threaded", ops.why_unavailable, _cpu_unsupported, _compiled_run),
        Backend("cuda", "CUDA C++ kernels", ops.why_no_cuda, _cuda_unsupported, _compiled_run),
        Backend("triton", "Triton kernels on CUDA devices", triton.why_unavailable, _triton_unsupported, _triton_run),
        Backend(
            "reference", "plain PyTorch, any device, any option", lambda: None, _reference_unsupported, _reference_run
        ),
    )
}
"""All backends by name, best first."""


def requested(name: str | None) -> str | None:
    """The backend asked for, by argument or else by environment, or None.

    Raises ValueError if it does not exist or this installation does not have it.
    """
    source = "backend"
    if name is None:
        source, name = ENVIRONMENT, os.environ.get(ENVIRONMENT) or None
    if name is None:
        return None
    if not (isinstance(name, str) and name in BACKENDS):
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {shown(name)}")
    if reason := BACKENDS[name].why_unavailable():
        raise ValueError(f"{source}={name!r} is not available: {reason}")
    return name


def choose(call: Call, name: str | None) -> Backend:
    """The backend that serves this call: the one `requested`, or the best; ValueError if it can't."""
    if name is not None:
        if reason := BACKENDS[name].why_unsupported(call):
            raise ValueError(f"backend={name!r} can't serve this call: {reason}")
        return BACKENDS[name]
    for backend in BACKENDS.values():
        if not backend.why_unavailable() and not backend.why_unsupported(call):
            return backend
    reasons = [
        f"{backend.name}: {backend.why_unavailable() or backend.why_unsupported(call)}" for backend in BACKENDS.values()
    ]
    raise ValueError(f"process_group / gather_negatives can't be served ({'; '.join(reasons)})")


def info() -> str:
    """A report for people: which backend serves what in this installation, and why the others don't."""
    import amn_kernels

    isa = "" if ops.why_unavailable() else f", {ops.cpu_isa()} kernels"
    lines = [
        f"amn-kernels {amn_kernels.__version__}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads{isa}",
        f"CUDA device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}",
        f"{ENVIRONMENT}: {os.environ.get(ENVIRONMENT) or 'not set'}",
        "",
        "Backends, best first:",
    ]
    for backend in BACKENDS.values():
        reason = backend.why_unavailable()
        lines.append(
            f"  {backend.name:<10} {f'not available: {reason}' if reason else f'available: {backend.summary}'}"
        )
    lines += ["", "Which backend serves what, on the CPU:"]
    row = torch.ones(2, 3)
    grid = row.view(1, 2, 3)
    calls = {
        "mse, cosine, infonce": Call(row, row, LossOptions(mse=1, cosine=1, infonce=1)),
        "moment": Call(row, row, LossOptions(moment=1)),
        "variance": Call(row, row, LossOptions(variance=1)),
        "direction='both'": Call(row, row, LossOptions(infonce=1, direction="both")),
        "negatives='step'": Call(grid, grid, LossOptions(infonce=1, negatives="step")),
        "negatives='sequence'": Call(grid, grid, LossOptions(infonce=1, negatives="sequence")),
        "mask": Call(row, row, LossOptions(), mask=torch.ones(2, dtype=torch.bool)),
        "extra_negatives": Call(row, row, LossOptions(infonce=1), extra_negatives=row),
        "ids": Call(row, row, LossOptions(infonce=1), ids=torch.arange(2)),
        "learnable_temperature": Call(row, row, LossOptions(infonce=1), temperature=torch.ones(())),
        "target with gradient": Call(row, row.clone().requires_grad_(), LossOptions()),
    }
    for what, call in calls.items():
        try:
            backend = choose(call, requested(None))
            first = next(iter(BACKENDS.values()))
            # Why it is not there at all is said above.
            reason = None if first.why_unavailable() else first.why_unsupported(call)
            why = f"  ({first.name}: {reason})" if reason else ""
            lines.append(f"  {what:<24} {backend.name}{why}")
        except ValueError as error:
            lines.append(f"  {what:<24} none: {error}")
    lines += ["  double backward          reference", "  torch.func transforms    reference"]
    on_cuda = [name for name in ("cuda", "triton", "reference") if not BACKENDS[name].why_unavailable()]
    lines += ["", f"On CUDA devices, best first: {', '.join(on_cuda)}"]
    return "\n".join(lines)
