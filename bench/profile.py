"""`python -m bench.profile`: where the time of a step goes, MSE + cosine + InfoNCE at D = 768, fixed λ, without a gap.

Every part is timed by itself, in turns with the whole step; what lies between is a difference, so that the parts add up
to the step. A primitive is what its op takes on all rows less what it takes on one row of one number. Writes JSON and
docs/bench.md.
"""

import json
import os
import statistics

import torch

from amn_kernels import FusedSeqLoss, ops
from amn_kernels.checks import check_inputs
from amn_kernels.primitives import PLAIN_ROWS, Attention, CompiledPrimitives, InfonceForm, Pairs, Temperature, TermList
from amn_kernels.train.runs import write_atomically
from bench import command, report, timing
from bench.contenders import ALL_TERMS, inputs, step

DIM = 768
SETTLE = 3
"""Calls of a turn that are not counted: the first ones find caches and threads as others left them."""


def primitives(rows: int, dim: int) -> dict:
    """Calls of the primitives of a step, by name, on one chunk."""
    prim, form, tau = CompiledPrimitives(), InfonceForm(False, False), Temperature(0.07, None)
    pred, target = (x.detach() for x in inputs(rows, dim))
    scalars = torch.zeros(PLAIN_ROWS, rows, dtype=torch.float64)
    scalars[0] = 1 / rows
    key_scale, rescale = torch.empty(rows), torch.empty(0, 1)
    logits, attention, grad = torch.empty(rows, rows), torch.zeros(rows, dim), torch.empty(rows, dim)
    torch.mm(pred, target.t(), out=logits)
    terms = TermList(tuple(ALL_TERMS), (True,) * len(ALL_TERMS))
    values, gram, metrics = torch.empty(3), torch.empty(3, 3), torch.empty(5)
    weights, none = torch.ones(3), torch.empty(0, dim)
    pairs = Pairs(None, None, None, -1.0)
    return {
        "row_stats": lambda: prim.row_stats(pred, target, scalars, key_scale, form),
        "softmax_rows_": lambda: prim.softmax_rows_(logits, key_scale, scalars, rescale, pairs, 0, tau, logits),
        "row_dots": lambda: prim.row_dots(pred, target, attention, scalars, Attention.UNNORMALISED, form, tau),
        "term_sums": lambda: prim.term_sums(
            scalars, torch.empty(0, dtype=torch.float64), terms, form, dim, tau, values, gram, metrics
        ),
        "row_combine": lambda: prim.row_combine(weights, pred, target, attention, none, scalars, terms, tau, grad),
    }


def parts(rows: int, seconds: float) -> dict[str, float]:
    """Seconds of each part of a step, by name, and of the "step" to which they add up."""
    pred, target = inputs(rows, DIM)
    loss = FusedSeqLoss(**ALL_TERMS, weighting="fixed")
    values, similarities, attention = pred.detach(), torch.empty(rows, rows), torch.empty(rows, DIM)
    number = torch.ones((), requires_grad=True)

    def products():
        torch.mm(values, target.t(), out=similarities)
        torch.mm(similarities, target, out=attention)

    runs = {
        "step": step(loss, pred, target),
        "module": lambda: loss(pred, target),
        "op": lambda: ops.seq_loss(pred, target, loss.options, loss._constants.on(pred.device)[0]),
        "checks": lambda: check_inputs(pred, target, loss.options),
        "products": products,
        "multiplication": lambda: number * 2.0,
        "its step": step(lambda x, _: x * 2.0, number, number),
        **primitives(rows, DIM),
        **{f"{name}, one row": run for name, run in primitives(1, 1).items()},
    }
    taken = {name: statistics.median(t) for name, t in timing.interleaved(runs, seconds, 7, SETTLE).items()}
    engine = taken["its step"] - taken["multiplication"]
    kernel = {name: max(0.0, taken[name] - taken[f"{name}, one row"]) for name in primitives(1, 1)}
    in_forward = taken["products"] + sum(kernel.values()) - kernel["row_combine"]
    return {
        "matrix products": taken["products"],
        **kernel,
        "allocations, dispatch and graph of the op": taken["op"] - in_forward,
        "checks of the arguments": taken["checks"],
        "module and statistics, in Python": taken["module"] - taken["op"] - taken["checks"],
        "PyTorch's backward() of one multiplication": engine,
        "rest of the backward": taken["step"] - taken["module"] - engine - kernel["row_combine"],
        "step": taken["step"],
    }


def after_other_work(rows: int, times: int = 30) -> float:
    """Seconds of a step, the first after 64 MiB have gone through the caches."""
    pred, target = inputs(rows, DIM)
    run, other = step(FusedSeqLoss(**ALL_TERMS, weighting="fixed"), pred, target), torch.ones(2**24)
    found = []
    for _ in range(times):
        other.mul_(1.0)
        found.append(timing.turn(run, 1))
    return statistics.median(found)


def main() -> None:
    """Measure, write, print the table."""
    parser = command.make_parser("bench.profile", __doc__, report.PROFILE, seconds=5.0)
    parser.add_argument("--rows", type=int, nargs="*", default=[32, 128, 256, 1024])
    arguments = command.parse(parser)
    if arguments.smoke:
        arguments.rows, arguments.seconds = [32], 0.2
    result = {
        "machine": report.machine(),
        "load": os.getloadavg()[0],
        "sizes": [
            {"rows": rows, "seconds": parts(rows, arguments.seconds), "after other work": after_other_work(rows)}
            for rows in arguments.rows
        ],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.json, json.dumps(result, indent=1) + "\n")
    print(report.terms.profile_section(result))
    if arguments.json == report.PROFILE:
        report.render()


if __name__ == "__main__":
    main()
