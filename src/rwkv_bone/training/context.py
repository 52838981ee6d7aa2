"""Sequences longer than memory: chunk by chunk, with the exact gradient of the whole.

RWKV hands a fixed-size state from token to token. So a long sequence is run in chunks, of which only the state at each
boundary is kept; backward recomputes one chunk at a time, from the last to the first, and passes the gradient of the
state on. The gradient is that of the unchunked sequence; memory grows by one state per chunk. In a packed row a chunk
may hold several documents; the state that is kept is that of the one document, if any, that goes on in the next chunk.

Sizes: B batch, T tokens, D documents of a packed row.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv_bone.models import LayerState
from rwkv_bone.ops.cross_entropy import IGNORE


def chunked_loss(
    model,
    ids: Tensor,
    labels: Tensor,
    *,
    chunk: int,
    bptt_chunks: int = 0,
    cu_seqlens: Tensor | None = None,
    widest: int = 0,
    **options,
) -> Tensor:
    """The summed loss of `model(ids, labels=labels, cu_seqlens=cu_seqlens)`, with memory for one chunk of tokens.

    ids and labels [B, T], or packed [1, T] with cu_seqlens [D + 1]. bptt_chunks: cut the gradient after every so many
    chunks (0 = never): the truncated form, on purpose. widest: the largest T among the ranks. Padding to it has all of
    them run as many chunks, since at ZeRO stage 3 each chunk gathers parameters from all ranks.
    """
    extra = widest - ids.shape[1]
    if extra > 0:
        ids, labels = F.pad(ids, (0, extra)), F.pad(labels, (0, extra), value=IGNORE)
        cu_seqlens = None if cu_seqlens is None else F.pad(cu_seqlens, (0, 1), value=widest)

    def run(part: Tensor, targets: Tensor, documents: Tensor | None, state: list[LayerState] | None):
        loss, after = model(part, labels=targets, cu_seqlens=documents, state=state, return_state=True, **options)
        if documents is not None:
            after = [LayerState(*(rows[-1:].clone() for rows in layer)) for layer in after]
        return loss, after

    total, state = torch.zeros((), device=ids.device), None
    parts = zip(ids.split(chunk, 1), labels.split(chunk, 1), _documents(ids.shape[1], chunk, cu_seqlens), strict=True)
    for number, (part, targets, (documents, goes_on)) in enumerate(parts):
        if number and not goes_on:
            # No rows rather than None: at ZeRO stage 3 the graph must have the same form on every rank.
            state = [LayerState(*(rows[:0] for rows in layer)) for layer in state]
        if number and bptt_chunks and number % bptt_chunks == 0:
            state = [LayerState(*(rows.detach() for rows in layer)) for layer in state]
        loss, state = checkpoint(run, part, targets, documents, state, use_reentrant=False)
        total = total + loss
    return total


def _documents(T: int, chunk: int, cu_seqlens: Tensor | None) -> Iterator[tuple[Tensor | None, bool]]:
    """Of each chunk its own cu_seqlens, and whether its first token goes on from the chunk before."""
    if cu_seqlens is None:
        yield from ((None, start > 0) for start in range(0, T, chunk))
        return
    bounds = cu_seqlens.tolist()
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        first, last = bisect_right(bounds, start), bisect_left(bounds, end)
        inside = [0, *(bound - start for bound in bounds[first:last]), end - start]
        yield torch.tensor(inside, device=cu_seqlens.device), bounds[first - 1] != start
