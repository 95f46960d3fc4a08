"""The matrix products of the algorithm: the vendor's, with half precision in and float32 out."""

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def multiply(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out = a b, or out += a b, of batches [G, M, K] and [G, K, N], in the dtype of `out`.

    On CUDA two operands of one half precision go in as they are and the sums are float32; all else is widened first.
    """
    kinds = {} if a.dtype == b.dtype == out.dtype else {"out_dtype": out.dtype}
    if kinds and (a.is_cpu or a.dtype != b.dtype or a.dtype not in _HALF):
        a, b, kinds = a.to(out.dtype), b.to(out.dtype), {}
    if accumulate:
        torch.baddbmm(out, a, b, **kinds, out=out)
    else:
        torch.bmm(a, b, **kinds, out=out)


def weight_dtype(queries: Tensor, keys: Tensor, real: torch.dtype) -> torch.dtype:
    """The dtype of softmax weights that are multiplied with keys, or with queries.

    bfloat16 has the range of float32, and nobody wants more of its digits where both are bfloat16. In float16 a weight
    1/N is subnormal from 16,384 keys on and loses digits, so there the product is one of float32: slower, but nothing
    is lost, nor is it where TF32 is allowed (torch.backends.cuda.matmul), which has the digits of float16 and the range
    of float32.
    """
    return torch.bfloat16 if queries.dtype == keys.dtype == torch.bfloat16 else real
