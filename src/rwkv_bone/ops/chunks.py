"""How tokens are cut into chunks for the chunked forms, and how states pass from chunk to chunk.

Without documents, B sequences are cut side by side and step i of a walk takes chunk i of each. Packed documents are cut
each from its own start, and all their chunks stand in one row: a walk takes them one after another, each from its
document's state. Where a document begins in the row is known on the device only, so the row has room for
T // L + D chunks, which is always enough; what is left over is padding, too. Nothing waits for the device.

Sizes: B batch, T tokens, H heads, N head size, n chunks, L tokens of a chunk, D documents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Chunks:
    """The cut of [B, T, H, N], and of documents [1, T, H, N] with their offsets `cu_seqlens` [D + 1].

    `count` is n, the number of steps of a walk.
    """

    def __init__(self, shape: torch.Size, length: int, cu_seqlens: Tensor | None = None):
        _, self.tokens, *_ = shape
        self.length = length
        self.packed = cu_seqlens is not None
        if cu_seqlens is None:
            self.count = -(-self.tokens // length)
            return
        documents, device = len(cu_seqlens) - 1, cu_seqlens.device
        self.count = self.tokens // length + documents
        begins, ends = cu_seqlens[:-1], cu_seqlens[1:]
        # Rounded down, plus one for each document before: no two documents share a chunk.
        first = cu_seqlens // length + torch.arange(documents + 1, device=device)
        self.last_chunks = first[1:] - 1  # [D]
        self.document = torch.searchsorted(first, torch.arange(self.count, device=device), right=True) - 1  # [n]
        shift = first[:-1] * length - begins  # from a token's number to its place among the chunks
        rows = torch.arange(self.count * length, device=device).view(-1, length) - shift[self.document, None]
        outside = rows >= ends[self.document, None]
        self.rows = rows.masked_fill(outside, self.tokens).flatten()  # the token of every place; T: none
        tokens = torch.arange(self.tokens, device=device)
        self.places = tokens + shift[torch.searchsorted(cu_seqlens, tokens, right=True) - 1]  # the place of every token

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, N] -> [B, H, n, L, N], padded with zeros."""
        B, T, H, N = x.shape
        if self.packed:
            x = F.pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, self.rows)
        else:
            x = F.pad(x, (0, 0, 0, 0, 0, -T % self.length))
        return x.to(dtype).view(B, self.count, self.length, H, N).permute(0, 3, 1, 2, 4)

    def join(self, x: Tensor) -> Tensor:
        """[B, H, n, L, N] -> [B, T, H, N]."""
        B, H, _, _, N = x.shape
        x = x.permute(0, 2, 3, 1, 4).reshape(B, -1, H, N)
        return x.index_select(1, self.places) if self.packed else x[:, : self.tokens]

    def take(self, states: Tensor, i: int) -> Tensor:
        """Of the states of all sequences [B or D, H, N, N], what step i works on: [B, H, N, N]."""
        return states.index_select(0, self.document[i : i + 1]) if self.packed else states

    def put(self, states: Tensor, i: int, changed: Tensor) -> Tensor:
        """All states after step i made `changed` of those it took. `states` may be overwritten."""
        return states.index_copy_(0, self.document[i : i + 1], changed) if self.packed else changed

    def walk(
        self, states: Tensor, step: Callable[[int, Tensor], Tensor], *, backwards: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Chunk after chunk, `step(i, state)` makes the next state out of what step i works on [B, H, N, N].

        Returns what each step worked on [B, H, n, N, N], and the states of all sequences after the last step.
        """
        taken, states = [states] * self.count, states.clone()
        for i in range(self.count)[:: -1 if backwards else 1]:
            taken[i] = self.take(states, i)
            states = self.put(states, i, step(i, taken[i]))
        return torch.stack(taken, dim=2), states

    def ends(self, starts: Tensor, last: Tensor) -> Tensor:
        """From the states at the chunks' starts [B, H, n, N, N] and the last ones, those at the chunks' ends."""
        if not self.packed:
            return torch.cat([starts[:, :, 1:], last[:, :, None]], dim=2)
        return starts.roll(-1, dims=2).index_copy_(2, self.last_chunks, last.transpose(0, 1)[None])
