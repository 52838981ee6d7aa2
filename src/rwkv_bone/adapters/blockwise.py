"""Views and sums over blocks of r columns, and work done a few tokens at a time, shared by the adapters.

Sizes: T rows (tokens, or the outputs of a weight), n columns, r block size. When r does not divide n, the last block is
cut short, which is the same as padding the columns with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.compiler import is_compiling

SMALLEST_CHUNK_CPU = 64 * 2560  # elements: fewer, and calls cost more than the arithmetic in them
SMALLEST_CHUNK_GPU = 2048 * 2560


def blocks(x: Tensor, r: int) -> Tensor:
    """x [T, n] seen as [n/r, T, r]: a view, writable in place. r must divide n."""
    return x.unflatten(1, (x.shape[1] // r, r)).transpose(0, 1)


def fold(x: Tensor, r: int) -> Tensor:
    """Sum of the blocks: x [T, n] -> [T, r]. Half precision is summed in fp32 and rounded once for all whole blocks."""
    whole = x.shape[1] // r * r
    total = x[:, :whole].unflatten(1, (whole // r, r)).sum(dim=1)
    if whole < x.shape[1]:
        total[:, : x.shape[1] - whole] += x[:, whole:]
    return total


def tile_add_(x: Tensor, side: Tensor) -> Tensor:
    """Add side [T, r] to every block of x [T, n], in place: the transpose of `fold`."""
    r = side.shape[1]
    whole = x.shape[1] // r * r
    x[:, :whole].unflatten(1, (whole // r, r)).add_(side[:, None])
    if whole < x.shape[1]:
        x[:, whole:] += side[:, : x.shape[1] - whole]
    return x


def token_chunks(x: Tensor, count: int) -> Iterator[slice]:
    """At most `count` ranges that cover the rows of x [T, n], fewer where they would be too small for the device."""
    rows, width = x.shape
    smallest = SMALLEST_CHUNK_CPU if x.device.type == "cpu" else SMALLEST_CHUNK_GPU
    step = max(-(-rows // count), smallest // width, 1)
    return (slice(start, start + step) for start in range(0, rows, step))


def token_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b [m, n] in at least fp32, of a [T, m] and b [T, n]."""
    return _whole_product(a, b) if is_compiling() else _chunked_product(a, b)


def _chunked_product(a: Tensor, b: Tensor) -> Tensor:
    total = _empty_product(a, b).zero_()
    # A product of bf16 matrices is bf16; sums of a few of them in fp32 keep what one product would round away.
    for rows in token_chunks(a if a.shape[1] > b.shape[1] else b, 8):
        total += a[rows].t() @ b[rows]
    return total


# For torch.compile one step: traced, the loop would be unrolled, and the graph made anew for every number of tokens.
_whole_product = torch.library.custom_op("rwkv_bone::token_product", _chunked_product, mutates_args=())


@_whole_product.register_fake
def _empty_product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[1], b.shape[1], dtype=torch.promote_types(a.dtype, torch.float32))
