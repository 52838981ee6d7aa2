"""A projection without bias, y = x W^T, and its fast form for a single row, which is what generation computes.

A product with one row takes as long as reading W takes, and cuda/cpu/gemv.cpp takes that long: PyTorch's own, made for
many rows, takes two to three times as long on a processor.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from rwkv_bone.ops import native
from rwkv_bone.ops.build import BuildError


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., n], weight [m, n] of any dtype -> x weight^T [..., m] in x's dtype."""
    weight = weight.to(x.dtype)
    if x.numel() == x.shape[-1] and not torch.is_grad_enabled() and _gemv_takes(x, weight):
        return _gemv(x, weight)
    return F.linear(x, weight)


def _gemv_takes(x: Tensor, weight: Tensor) -> bool:
    if is_compiling() or not x.is_cpu or x.dtype not in native.DTYPES or not weight.is_contiguous():
        return False
    return _gemv_works()


def _gemv(x: Tensor, weight: Tensor) -> Tensor:
    """x of n numbers, weight [m, n] -> [..., m]."""
    m, n = weight.shape
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], m)
    library = native.library("gemv")
    sizes = (native.DTYPES[x.dtype], ctypes.c_int64(m), ctypes.c_int64(n))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, x, y)]
    if code := library.gemv(*sizes, *pointers, torch.get_num_threads()):
        words = library.gemv_error(code).decode()
        raise RuntimeError(f"the product of a {m} by {n} matrix and a row failed: {words}")
    return y


@functools.cache
def _gemv_works() -> bool:
    """Whether it can be built, and agrees with PyTorch. Without it one row takes longer, and gives the same."""
    matrix = torch.sin(torch.arange(5.0 * 165)).view(5, 165)
    try:
        found = _gemv(matrix[0], matrix)
    except BuildError:
        return False
    return torch.allclose(found, matrix @ matrix[0], atol=1e-4)
