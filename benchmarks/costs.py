"""Bytes and operations of the WKV kernels for one token of one head, counted from what each kernel loads and stores.

    python benchmarks/costs.py               the table, at head size 64 in bf16
    python benchmarks/costs.py --head 128    at another head size

The least that any form moves, the `floor`, is every input read once in each direction, and every result written once.
A time of the floor is that many bytes at the speed of a copy. The counts are those of long sequences: the states at
both ends of a sequence are not in them. What all heads or tokens share (u, w0, WKV-5's w) counts as nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

SEGMENT = 64  # tokens between the states that the sequential kernels keep
BLOCK = 16  # side of the blocks of which a triangle is made


class Problem(NamedTuple):
    """What a count depends on: head size, bytes of an element of r and of w, tokens of a chunk."""

    N: int
    element: int
    decay: int
    L: int


class Kernel(NamedTuple):
    """One kernel: the UNITS that it reads and writes, and its products.

    `squares` are products of N x N a token; `triangles` those of a token with the tokens before it in its chunk, of
    which the blocks of BLOCK x BLOCK above the diagonal are left out; `blocks` those with BLOCK tokens, besides.
    """

    name: str
    reads: dict[str, int]
    writes: dict[str, int]
    squares: int
    triangles: int = 0
    blocks: int = 0


# Bytes per token and head; the hand-over of a chunked form has twice a bf16 number in the accurate mode.
UNITS: dict[str, Callable[[Problem, int], float]] = {
    "x": lambda p, handed: p.N * p.element,  # a row of r, y, dr ...
    "w": lambda p, handed: p.N * p.decay,
    "float": lambda p, handed: p.N * 4,  # a row in float32
    "segment": lambda p, handed: p.N * p.N * 4 / SEGMENT,  # a float32 state a segment
    "handed": lambda p, handed: p.N * handed,  # a row of W, b~ or Q
    "state": lambda p, handed: p.N * p.N * handed / p.L,  # a state a chunk: KV, S or dS
    "whole": lambda p, handed: p.N * 4 / p.L,  # a number of each channel a chunk: its decay, or a sum
}

# (operator, form) -> kernels, of forward and of backward. Sources: cuda/wkv7.cuh and cuda/wkv6.cuh, whose blocks of
# backward_decay find v and dy in the cache after the first; cuda/wkv7_chunked.cuh; cuda/wkv6_chunked.cuh, whose levels
# within BLOCK tokens make the blocks, and whose sums over tokens are six more of them at L = 32.
SEQUENTIAL_6 = (
    [Kernel("forward", {"x": 3, "w": 1}, {"x": 1, "segment": 1}, 3)],
    [
        Kernel("values", {"x": 4, "w": 1}, {"x": 1, "segment": 1}, 3),
        Kernel("keys", {"x": 3, "w": 1, "segment": 1}, {"x": 1}, 3),
        Kernel("receptance", {"x": 3, "w": 1, "segment": 1}, {"x": 1}, 3),
        Kernel("decay", {"x": 4, "w": 1, "segment": 2}, {"w": 1}, 7),
    ],
)
CHUNKED_6 = (
    [
        Kernel("prepare", {"x": 2, "w": 1}, {"state": 1, "whole": 1}, 1),
        Kernel("scan", {"state": 1, "whole": 1}, {"state": 1}, 0),
        Kernel("outputs", {"x": 3, "w": 1, "state": 1}, {"x": 1}, 1, 2, 3),
    ],
    [
        Kernel("prepare_backward", {"x": 2, "w": 1}, {"state": 1, "whole": 1}, 1),
        Kernel("scan_backward", {"state": 1, "whole": 1}, {"state": 1}, 0),
        Kernel("gradients", {"x": 4, "w": 1, "state": 2}, {"x": 3, "w": 1, "whole": 1}, 3, 5, 11),
        Kernel("sums", {"whole": 1}, {}, 0),
    ],
)


def with_one_decay(kernels: tuple[list[Kernel], ...]) -> tuple[list[Kernel], ...]:
    """WKV-5's of WKV-6's: w and dw are those of a head, and dw is one more sum over the tokens."""

    def changed(kernel: Kernel) -> Kernel:
        reads, writes = ({unit: n for unit, n in units.items() if unit != "w"} for units in kernel[1:3])
        for name, units in (("gradients", writes), ("sums", reads)):
            if kernel.name == name:
                units["whole"] = 2
        return kernel._replace(reads=reads, writes=writes)

    return tuple([changed(kernel) for kernel in direction] for direction in kernels)


KERNELS = {
    ("wkv7", "floor"): (
        [Kernel("forward", {"x": 5, "w": 1}, {"x": 1}, 0)],
        [Kernel("backward", {"x": 6, "w": 1}, {"x": 5, "w": 1}, 0)],
    ),
    ("wkv7", "exact"): (
        [Kernel("forward", {"x": 5, "w": 1}, {"x": 1, "float": 1}, 5)],
        [
            Kernel("rows", {"x": 5, "w": 1}, {"x": 1, "float": 1}, 5),
            Kernel("keys", {"x": 6, "w": 1, "float": 2}, {"x": 2, "float": 1, "segment": 1}, 5),
            Kernel("decay", {"x": 6, "w": 1, "float": 3, "segment": 1}, {"x": 2, "w": 1}, 5),
        ],
    ),
    ("wkv7", "chunked"): (
        [
            Kernel("prepare", {"x": 5, "w": 1}, {"handed": 3, "state": 1, "x": 1, "whole": 1}, 2, 10),
            Kernel("scan", {"handed": 2, "state": 1, "whole": 1}, {"state": 1}, 2),
            Kernel("outputs", {"handed": 1, "state": 1, "x": 1}, {"x": 1}, 1),
        ],
        [
            Kernel("prepare_backward", {"x": 3, "w": 1}, {"handed": 3, "whole": 1}, 0, 4),
            Kernel("scan_backward", {"handed": 3, "x": 1, "whole": 1}, {"state": 1}, 3),
            Kernel("gradients", {"x": 6, "w": 1, "state": 2}, {"x": 5, "w": 1}, 7, 22),
        ],
    ),
    ("wkv6", "floor"): (
        [Kernel("forward", {"x": 3, "w": 1}, {"x": 1}, 0)],
        [Kernel("backward", {"x": 4, "w": 1}, {"x": 3, "w": 1}, 0)],
    ),
    ("wkv6", "exact"): SEQUENTIAL_6,
    ("wkv5", "floor"): (
        [Kernel("forward", {"x": 3}, {"x": 1}, 0)],
        [Kernel("backward", {"x": 4}, {"x": 3}, 0)],
    ),
    ("wkv5", "exact"): with_one_decay(SEQUENTIAL_6),
    ("wkv6", "chunked"): CHUNKED_6,
    ("wkv5", "chunked"): with_one_decay(CHUNKED_6),
}


class Cost(NamedTuple):
    """Bytes read and written, and operations, of one token of one head; of tensor cores where there are triangles."""

    bytes: float
    operations: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.operations + other.operations)


def kernel_cost(kernel: Kernel, problem: Problem, accurate: bool = False) -> Cost:
    handed = 4 if accurate else 2
    moved = [count * UNITS[unit](problem, handed) for side in kernel[1:3] for unit, count in side.items()]
    products = 2 * problem.N**2 * kernel.squares + problem.N * (problem.L + BLOCK) * kernel.triangles
    products += 2 * problem.N * BLOCK * kernel.blocks
    return Cost(sum(moved), products * (3 if accurate else 1))


def cost(operator: str, form: str, N: int, element: int, decay: int) -> tuple[Cost, Cost] | None:
    """(forward, backward) of "floor", "exact", "chunked32", "chunked64" or "accurate16"; None if nobody counted it.

    element and decay: bytes of an element of r and of w.
    """
    mode, digits = form.rstrip("0123456789"), form.lstrip("abcdefghijklmnopqrstuvwxyz")
    kernels = KERNELS.get((operator, "chunked" if mode == "accurate" else mode))
    if kernels is None:
        return None
    problem = Problem(N, element, decay, int(digits or 0))
    sums = (
        sum((kernel_cost(kernel, problem, mode == "accurate") for kernel in direction), Cost(0, 0))
        for direction in kernels
    )
    return tuple(sums)


FORMS = ("floor", "exact", "chunked32", "chunked64", "accurate16")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=int, default=64, help="head size")
    N = parser.parse_args().head
    print(f"{'head size ' + str(N):24} {'bytes':>24} {'thousands of operations':>30}")
    print(f"{'':24} {'forward':>8}{'backward':>9}{'both':>7} {'forward':>12}{'backward':>9}{'both':>9}")
    for operator in ("wkv7", "wkv6", "wkv5"):
        for form in FORMS:
            for what, decay in (("w fp32", 4), ("w bf16", 2)):
                found = cost(operator, form, N, 2, decay)
                if found and (operator, decay) != ("wkv5", 2):
                    forward, backward = found
                    both = forward + backward
                    sizes = f"{forward.bytes:8.0f}{backward.bytes:9.0f}{both.bytes:7.0f}"
                    work = [f"{x.operations / 1e3:.0f}" for x in (forward, backward, both)]
                    print(f"{operator + ' ' + form + ', ' + what:24} {sizes} {work[0]:>12}{work[1]:>9}{work[2]:>9}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
