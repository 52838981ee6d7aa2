"""Arithmetic on blocks of r columns, and on a few rows at a time, shared by the adapters.

Sizes: T rows (tokens, or the outputs of a weight), n columns, r block size. When r does not divide n, the last block is
shorter, as if the columns were padded with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.compiler import is_compiling

SMALLEST_CHUNK_CPU = 64 * 2560  # elements; with fewer, calling an operator costs more than its arithmetic
SMALLEST_CHUNK_GPU = 2048 * 2560
# Whether a product of bf16 matrices can be had in fp32, which PyTorch has on CUDA since 2.8.
HAS_OUT_DTYPE = torch.version.cuda is not None and hasattr(torch.ops.aten.mm, "dtype")


def block_view(x: Tensor, r: int) -> Tensor:
    """x [T, n] seen as [n/r, T, r]: a view, writable in place. r must divide n."""
    return x.unflatten(1, (x.shape[1] // r, r)).transpose(0, 1)


def fold(x: Tensor, r: int) -> Tensor:
    """Sum of the blocks: x [T, n] -> [T, r]. Half precision is summed in fp32 and rounded once for all full blocks."""
    full = x.shape[1] // r * r  # columns of full blocks
    total = x[:, :full].unflatten(1, (full // r, r)).sum(dim=1)
    if full < x.shape[1]:
        total[:, : x.shape[1] - full] += x[:, full:]
    return total


def tile_add_(x: Tensor, tile: Tensor) -> Tensor:
    """Add tile [T, r] to every block of x [T, n], in place: the transpose of `fold`."""
    r = tile.shape[1]
    full = x.shape[1] // r * r
    x[:, :full].unflatten(1, (full // r, r)).add_(tile[:, None])
    if full < x.shape[1]:
        x[:, full:] += tile[:, : x.shape[1] - full]
    return x


def token_chunks(x: Tensor, count: int) -> Iterator[slice]:
    """At most `count` ranges of rows that cover x [T, n]; fewer where they would be too small for the device."""
    rows, width = x.shape
    smallest = SMALLEST_CHUNK_CPU if x.device.type == "cpu" else SMALLEST_CHUNK_GPU
    step = max(-(-rows // count), smallest // width, 1)
    return (slice(start, start + step) for start in range(0, rows, step))


def token_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b [m, n] in at least fp32, of a [T, m] and b [T, n]."""
    return _product_op(a, b) if is_compiling() else _product(a, b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if _empty_product(a, b).dtype == a.dtype:
        return a.t() @ b
    if a.is_cuda and HAS_OUT_DTYPE:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    total = _empty_product(a, b).zero_()
    # A product of bf16 matrices is rounded to bf16 here. A few partial products, added in fp32, lose less where what is
    # summed has a part in common: 1.5e-3 instead of 1.7e-3 on 4,096 tokens of text, for 1 % of a step.
    for rows in token_chunks(a if a.shape[1] > b.shape[1] else b, 8):
        total += a[rows].t() @ b[rows]
    return total


# One operator for torch.compile. It would unroll the loop, and compile again for every other number of tokens.
_product_op = torch.library.custom_op("rwkv_bone::token_product", _product, mutates_args=())


@_product_op.register_fake
def _empty_product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[1], b.shape[1], dtype=torch.promote_types(a.dtype, torch.float32))
