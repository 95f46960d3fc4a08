"""Rows and gradients of 16 bits on the CPU: converted as they are read and written, as PyTorch does it."""

import pytest
import torch
from error_rule import TERMS, make_rows, relative_error, seq_loss

FORMS = {
    "plain": ((65, 7), {}),
    "more than a chunk": ((1100, 7), {}),
    "both": ((65, 70), {"direction": "both"}),
    "mask": ((65, 70), {"mask": torch.arange(65) % 3 != 0}),
    "step": ((5, 13, 70), {"negatives": "step"}),
    "columns": ((65, 7), {"moment": 0.5, "variance": 0.5}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_as_the_same_numbers_in_float32_and_rounded_once(dtype, target_dtype, form):
    """In float64 where one of them is so."""
    shape, options = FORMS[form]
    pred, target = make_rows(*shape)
    pred, target = pred.to(dtype), target.to(target_dtype)
    if "mask" in options:
        pred[0] = torch.nan  # of a masked row nothing is read
    options = {**TERMS["all"], "backend": "cpu", **options}
    got = seq_loss(pred, target, incoming=1024.0, **options)
    real = torch.promote_types(target_dtype, torch.float32)
    wanted = seq_loss(pred.to(real), target.to(real), incoming=1024.0, **options)
    assert torch.equal(got.loss, wanted.loss)
    assert torch.equal(got.grad, wanted.grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_strided_rows(dtype):
    """Columns of a wider tensor, every second element, and a transposed one."""
    pred, target = make_rows(65, 14, dtype=dtype)
    for view in (lambda x: x[:, 3:10], lambda x: x[:, ::2], lambda x: x.t()):
        got = seq_loss(view(pred), view(target), backend="cpu", **TERMS["all"])
        wanted = seq_loss(view(pred).contiguous(), view(target).contiguous(), backend="cpu", **TERMS["all"])
        assert torch.equal(got.loss, wanted.loss)
        assert torch.equal(got.grad, wanted.grad)


@pytest.mark.parametrize("terms", ["all", "infonce", "columns"])
@pytest.mark.parametrize("of", ["pred", "target"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [8, 1030])  # fewer than a row is long; such a last chunk
def test_sliding_windows_over_a_series(rows, dtype, of, terms):
    """Rows that overlap, one element from the next, beside others of each dtype: what is widened is a matrix again."""
    series = torch.randn(2000).cumsum(0).to(dtype)
    windows = series.unfold(0, 16, 1)[:rows]
    options = {"columns": {"mse": 0.0, "moment": 1.0, "variance": 1.0}, **TERMS}[terms]
    for other in (torch.bfloat16, torch.float32, torch.float64):
        pred, target = make_rows(rows, 16, dtype=other)
        got, wanted = (
            seq_loss(**{"pred": pred, "target": target, of: x}, backend="cpu", **options)
            for x in (windows, windows.contiguous())
        )
        assert relative_error(got.loss, wanted.loss) <= 1e-6  # sums of a matrix product may be ordered by layout
        assert relative_error(got.grad, wanted.grad) <= max(1e-6, torch.finfo(got.grad.dtype).eps)


CONVERSIONS = """
import torch
from amn_kernels import functional, ops

def gradient(pred, target):
    # 2/(nD) d times nD/2: d itself, rounded to the dtype of pred.
    pred = pred.detach().requires_grad_()
    loss, _ = functional.seq_loss(pred, target, weighting="fixed", backend="cpu")
    return torch.autograd.grad(loss, pred, torch.tensor(pred.numel() / 2.0))[0]

def assert_same(got, wanted):
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)

bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(256, 256)
generator = torch.Generator().manual_seed(0)
random = torch.randint(-(2**31), 2**31, (1024, 1024), generator=generator, dtype=torch.int64).to(torch.int32)
# Numbers around what a half can hold, in which every case of rounding is common.
scaled = torch.randn(1024, 1024, generator=generator) * torch.exp2(torch.arange(-30.0, 34.0, 0.0625)).unsqueeze(1)
ties = (torch.arange(2**20, dtype=torch.int32) * 2**12).view(torch.float32).view(1024, 1024)
for dtype in (torch.float16, torch.bfloat16):
    every = bits.view(dtype)  # zeros, subnormal numbers, infinities and NaN among them
    known = every.isfinite()  # 0 times infinity is in the gradient, so infinity is looked for in the loss
    assert_same(gradient(torch.zeros(256, 256), every)[known], -every.float()[known])
    assert gradient(torch.zeros(256, 256), every)[every.isnan()].isnan().all()
    for infinity in (torch.inf, -torch.inf):
        row = torch.tensor([[infinity]], dtype=dtype)
        assert functional.seq_loss(row, torch.ones(1, 1), weighting="fixed", backend="cpu")[0] == torch.inf
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        got = gradient(every, torch.zeros(256, 256, dtype=dtype))
        torch.set_flush_denormal(False)
        if dtype == torch.float16 or not flush:  # those of bfloat16 are so in float32 as well
            assert_same(got[known], every[known])
    for numbers in (random.view(torch.float32), scaled, ties):
        numbers = torch.where(numbers.isfinite(), numbers, 1.0)
        assert_same(gradient(torch.zeros(1024, 1024, dtype=dtype), numbers), (-numbers).to(dtype))
    nans = torch.where(random % 2**23 == 0, random | 1, random) | 0x7F800000  # with every sign and payload
    assert gradient(torch.zeros(1024, 1024, dtype=dtype), nans.view(torch.float32)).isnan().all()
    assert gradient(torch.zeros(1, 1, dtype=dtype), torch.tensor([[-1]], dtype=torch.int32).view(torch.float32)).isnan()
print(ops.cpu_isa())
"""


def test_every_number_is_converted_as_pytorch_does(run_on_isa):
    run_on_isa(CONVERSIONS)
