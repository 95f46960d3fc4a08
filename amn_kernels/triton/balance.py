"""Kernel of the primitive balance: weights from λ and running means; python_ref/balance.py is its definition."""

import triton
import triton.language as tl

from amn_kernels.reference import balance as reference
from amn_kernels.triton.scalars import SIZES

SPIKE, SPIKE_AFTER = tl.constexpr(float(reference.SPIKE)), tl.constexpr(reference.SPIKE_AFTER)
LEAST = tl.constexpr(reference.LEAST)


@triton.jit
def corrected(mean, updates, log_decay):
    """The bias-corrected running mean; in float64, as for a decay near 1 the difference cancels."""
    decayed = tl.exp(tl.maximum(updates, 1).to(tl.float64) * log_decay)
    return (mean / (1 - decayed)).to(tl.float32)


@triton.jit
def at_anchor(x, term, anchor):
    """The anchor's entry of [BLOCK]."""
    return tl.sum(tl.where(term == anchor, x, 0), axis=0)


@triton.jit
def balanced_weights(
    observed, mean, updates, calls, skipped, lambdas, most, weights, decay, log_decay, update_every, m, step,
    anchor: tl.constexpr, BY_VALUE: tl.constexpr, UPDATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates the state and fills the weights; the arguments are those of `balance_kernel`."""
    term = tl.arange(0, BLOCK)
    inside = term < m
    average, seen = tl.load(mean + term, mask=inside, other=0.0), tl.load(updates + term, mask=inside, other=0)
    weight = tl.load(lambdas + term, mask=inside, other=0.0)
    current = average * 0
    if observed is not None:
        current = tl.load(observed + term * step, mask=inside, other=0.0).to(tl.float32)
        if UPDATE:
            number = tl.load(calls)
            due = (number % update_every == 0) & inside & (weight > 0)
            usable = (current < float("inf")) & (current > 0)
            limit = tl.where(seen >= SPIKE_AFTER, SPIKE * corrected(average, seen, log_decay), float("inf"))
            change = (1 - decay).to(tl.float32) * (tl.minimum(current, limit) - average)
            take = due & usable
            average += tl.where(take, change, 0.0)
            seen += take.to(tl.int64)
            missed = tl.load(skipped + term, mask=inside, other=0) + (due & ~usable).to(tl.int64)
            tl.store(mean + term, average, mask=inside)
            tl.store(updates + term, seen, mask=inside)
            tl.store(skipped + term, missed, mask=inside)
            tl.store(calls, number + 1)
    known = corrected(average, seen, log_decay)
    if BY_VALUE:
        ratio = at_anchor(known, term, anchor) / known
    else:
        # A NaN loses the comparison.
        ratio = tl.sqrt(at_anchor(known, term, anchor)) / tl.sqrt(tl.where(current > known, current, known))
    ratio = tl.minimum(tl.maximum(ratio, LEAST), tl.load(most + term, mask=inside, other=1.0))
    has_state = (seen > 0) & (at_anchor(seen, term, anchor) > 0) & (term != anchor)
    ratio = tl.where(has_state, ratio, 1.0)
    tl.store(weights + term, (weight * ratio).to(weights.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def balance_kernel(
    observed,  # values [m], or the Gram matrix [m, m], or None
    mean,  # [m] float32, in place, as the next three
    updates,  # [m] int64
    calls,  # [] int64
    skipped,  # [m] int64
    lambdas,  # [m] float64
    most,  # [m] float32
    weights,  # [m], out
    decay: tl.float64, log_decay: tl.float64, update_every, m, step, anchor: tl.constexpr, BY_VALUE: tl.constexpr,
    UPDATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for all terms."""
    balanced_weights(
        observed, mean, updates, calls, skipped, lambdas, most, weights, decay, log_decay, update_every, m, step,
        anchor, BY_VALUE, UPDATE, BLOCK,
    )  # fmt: skip
