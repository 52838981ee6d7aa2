"""What the specifications of the chunked kernels share: where roundings fall, and which token sits in which chunk.

Sizes: B batch, T tokens, H heads, N head size, D documents, L tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

OPERANDS = ("bf16", "bf16x3", "fp32")


def nearest_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


@dataclass(frozen=True)
class Rounding:
    """The arithmetic of a tensor core: operands in a narrow format, sums and everything else in `dtype`.

    operand "bf16": one product of bfloat16 operands. "bf16x3": every operand is the sum of a high and a low bfloat16
    part, and the product of the two low parts is left out. "fp32": operands stay what they are.
    """

    operand: str = "bf16"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.operand not in OPERANDS:
            raise ValueError(f"operand {self.operand!r}: one of {', '.join(OPERANDS)}")

    def parts(self, x: Tensor) -> list[Tensor]:
        if self.operand == "fp32":
            return [x]
        high = nearest_bf16(x)
        return [high] if self.operand == "bf16" else [high, nearest_bf16(x - high)]

    def round(self, x: Tensor) -> Tensor:
        """x as an operand holds it, and as memory holds it from one kernel to the next. Twice is the same as once."""
        return torch.stack(self.parts(x)).sum(0)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right, both rounded as operands, the sums not rounded."""
        (left_high, *left_low), (right_high, *right_low) = self.parts(left), self.parts(right)
        out = left_high @ right_high
        for low in right_low:
            out = out + left_high @ low
        for low in left_low:
            out = out + low @ right_high
        return out


class Chunks:
    """Cuts sequences into chunks of L tokens and numbers them on from one sequence to the next: each has a slot.

    Without documents, sequence s is row s of the batch and starts at slot s * ceil(T / L). Document s starts at slot
    offsets[s] // L + s, which leaves some slots unused and needs nobody to look at all lengths. The last chunk of a
    sequence may be partly empty.

    first, count: the first slot of each sequence, and its number of chunks. slots: how many there are in all.
    used [slots], inside [slots, L]: whether a slot, and a place in it, holds anything.
    """

    def __init__(self, B: int, T: int, L: int, cu_seqlens: Tensor | None = None) -> None:
        self.shape, self.L = (B, T), L
        if cu_seqlens is None:
            begins, lengths = [s * T for s in range(B)], [T] * B
            self.first = [s * -(-T // L) for s in range(B)]
            self.slots = B * -(-T // L)
        else:
            begins, lengths = cu_seqlens[:-1].tolist(), cu_seqlens.diff().tolist()
            self.first = [begin // L + s for s, begin in enumerate(begins)]
            self.slots = T // L + len(begins)
        self.count = [-(-length // L) for length in lengths]
        # Token B * T does not exist: it stands for an empty place.
        self.token = torch.full((self.slots, L), B * T)
        for first, begin, length in zip(self.first, begins, lengths, strict=True):
            self.token[first:].view(-1)[:length] = torch.arange(begin, begin + length)
        self.inside = self.token < B * T
        self.used = self.inside.any(1)

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, H, N] -> [slots, H, L, N], zeros in empty places."""
        flat = torch.cat([x.flatten(0, 1), x.new_zeros(1, *x.shape[2:])])
        return flat[self.token].transpose(1, 2)

    def scatter(self, x: Tensor) -> Tensor:
        """[slots, H, L, N] -> [B, T, H, N]."""
        B, T = self.shape
        out = x.new_empty(B * T, x.shape[1], x.shape[3])
        out[self.token[self.inside]] = x.transpose(1, 2)[self.inside]
        return out.unflatten(0, (B, T))

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunk after chunk, all sequences at once: (the sequences that have one more, their slots)."""
        first, count = torch.tensor(self.first), torch.tensor(self.count)
        for c in range(max(self.count)):
            active = torch.nonzero(count > c).flatten()
            yield active, first[active] + c
