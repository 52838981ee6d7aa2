"""Views and sums over blocks of r columns, shared by Bone and Bat.

Sizes: T rows (tokens, or the outputs of a weight), n columns, r block size. When r does not divide n, the last block is
cut short, which is the same as padding the columns with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

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
