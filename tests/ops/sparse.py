"""Tensors larger than memory, of which a test touches a little: pages exist once they are written."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

MAP_NORESERVE = 0x4000  # Linux; the mmap module of Python 3.10 does not name it


def sparse(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[count] zeros."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)


def in_last_head(tensor: Tensor, B: int, H: int) -> tuple[Tensor, Tensor]:
    """A tensor of B sequences and H heads, and the view of the last head of the last one, which holds `tensor`.

    `tensor` has one sequence and one head: [1, T, 1, N], a state [1, 1, N, N], or what heads share [1, 1, N], [1, N].
    """
    last = slice(-1, None)
    if tensor.dim() == 4 and tensor.shape[1] > 1:
        shape, index = (B, tensor.shape[1], H, tensor.shape[3]), (last, slice(None), last)
    elif tensor.dim() == 2:
        shape, index = (H, tensor.shape[1]), (last,)
    else:
        shape, index = (B, H, *tensor.shape[2:]), (last, last)
    whole = sparse(math.prod(shape), tensor.dtype).view(shape)
    whole[index].copy_(tensor)
    return whole, whole[index]
