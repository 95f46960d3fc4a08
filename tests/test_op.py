"""The compiled op as PyTorch sees it: schema, fakes, autograd registration."""

import pytest
import torch
from error_rule import make_rows

from amn_kernels.options import LossOptions
from amn_kernels.weighting import BalancedWeighting

OPCHECK_INPUTS = {
    "float32": lambda: make_rows(33, 7),
    "float64": lambda: make_rows(33, 7, dtype=torch.float64),
    "bfloat16": lambda: make_rows(33, 7, dtype=torch.bfloat16),
    "mixed": lambda: (make_rows(33, 7)[0].bfloat16(), make_rows(33, 7)[1]),
    "permuted": lambda: tuple(x.view(5, 7, 3).permute(2, 0, 1) for x in make_rows(35, 3)),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("inputs", OPCHECK_INPUTS)
def test_op_is_sound(inputs, requires_grad):
    pred, target = OPCHECK_INPUTS[inputs]()
    pred.requires_grad_(requires_grad)
    real = torch.float64 if inputs == "float64" else torch.float32
    weights = torch.tensor([1.0, 0.5, 0.25], dtype=real)
    torch.library.opcheck(
        torch.ops.amn_kernels.seq_loss_fixed.default,
        (pred, target, weights, None, None, None, None, [0, 1, 2], [1], *PLAIN),
    )


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("inputs", OPCHECK_INPUTS)
def test_halves_of_the_op_are_sound(inputs, with_gradient):
    pred, target = OPCHECK_INPUTS[inputs]()
    forward = torch.ops.amn_kernels._seq_loss_forward.default
    arguments = (pred, target, None, None, None, None, None, [0, 1, 2], [1], *PLAIN, int(with_gradient))
    torch.library.opcheck(forward, arguments)
    if with_gradient:
        _, values, _, _, *saved = forward(*arguments)
        tensors = (pred, target, None, None, None, None, *saved)
        for incoming in (None, None, torch.ones_like(values)), (values[0], torch.ones_like(values), None):
            torch.library.opcheck(
                torch.ops.amn_kernels._seq_loss_backward.default,
                (*incoming, *tensors, [0, 1, 2], [1], *PLAIN[:-1], 1),
            )


# Temperature, both, negatives, positives by id, margin, variance target, chunk bytes; and what needs a gradient.
PLAIN = (0.07, False, 0, False, -1.0, -1.0, 1 << 20)
RICH = (0.07, True, 1, True, 0.1, -1.0, 1 << 20)


@pytest.mark.parametrize("choices", [PLAIN, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("needs", [0, 1, 2, 15])
def test_every_input_of_the_op_is_sound(needs, choices):
    pred, target = make_rows(4, 5, 6)
    extra, temperature = make_rows(3, 6, seed=1)[0], torch.tensor(0.3)
    mask, ids = torch.arange(20).view(4, 5) % 7 > 0, torch.arange(20).view(4, 5) % 3
    for i, x in enumerate((pred, target, extra, temperature)):
        x.requires_grad_(bool(needs & (1 << i)))
    tensors = (mask, ids, extra, temperature)
    terms = ([0, 1, 2, 3, 4], [1], *choices)
    torch.library.opcheck(torch.ops.amn_kernels.seq_loss_fixed.default, (pred, target, torch.ones(5), *tensors, *terms))
    detached = [x.detach() for x in (pred, target, *tensors)]
    forward = torch.ops.amn_kernels._seq_loss_forward.default
    pred, target, *tensors = detached
    arguments = (pred, target, torch.ones(5), *tensors, *terms, needs)
    torch.library.opcheck(forward, arguments)
    if needs:
        loss, values, _, _, *saved = forward(*arguments)
        torch.testing.assert_close(loss, values.sum())
        torch.library.opcheck(
            torch.ops.amn_kernels._seq_loss_backward.default,
            (loss, torch.ones(5), torch.ones(5), *detached, *saved, [0, 1, 2, 3, 4], [1], *choices[:-1], needs),
        )


def test_a_gradient_without_a_term_is_laid_out_as_any():
    """Zeros for extra negatives that lie column by column, where infonce is monitored."""
    pred, target = make_rows(5, 7)
    tensors = (pred, target, None, None, make_rows(7, 3)[0].t(), None)
    terms, needs = ([0, 2], [2]), 1 | 4
    *_, rows, attention, columns = torch.ops.amn_kernels._seq_loss_forward(
        pred, target, None, *tensors[2:], *terms, *PLAIN, needs
    )
    backward = torch.ops.amn_kernels._seq_loss_backward.default
    arguments = (None, None, torch.ones(2), *tensors, rows, attention, columns, *terms, *PLAIN[:-1], needs)
    assert [gradient.stride() for gradient in backward(*arguments)] == [(7, 1), (7, 1)]
    torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("op", ["seq_loss_fixed", "seq_loss_balanced"])
@pytest.mark.parametrize("choices", [PLAIN, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("needs", [0, 1, 15])
def test_results_share_no_memory(needs, choices, op):
    """With an argument or each other. opcheck sees that of the halves, but not of what is composed of them."""
    pred, target = make_rows(4, 5, 6)
    extra, temperature = make_rows(3, 6, seed=1)[0], torch.tensor(0.3)
    mask, ids = torch.arange(20).view(4, 5) % 7 > 0, torch.arange(20).view(4, 5) % 3
    for i, x in enumerate((pred, target, extra, temperature)):
        x.requires_grad_(bool(needs & (1 << i)))
    options = LossOptions(mse=1.0, cosine=1.0, infonce=1.0, moment=1.0, variance=1.0, weighting="gradient")
    state = BalancedWeighting(options)
    running = (state.mean, state.updates, state.calls, state.skipped, *state.constants.on(pred.device))
    weights = (torch.ones(5),) if op == "seq_loss_fixed" else (*running, 0, 0.9, 1, False, True)
    arguments = (pred, target, *weights, mask, ids, extra, temperature)
    results = getattr(torch.ops.amn_kernels, op)(*arguments, [0, 1, 2, 3, 4], [1], *choices)
    addresses = [x.untyped_storage().data_ptr() for x in results if x.numel()]
    assert len(addresses) == len(set(addresses))
    assert not set(addresses) & {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, torch.Tensor)}
