"""Sequences longer than memory: chunk by chunk, with the exact gradient of the whole.

RWKV hands a fixed-size state from token to token. So a long sequence is run in chunks, of which only the state at each
boundary is kept; backward recomputes one chunk at a time, from the last to the first, and passes the gradient of the
state on. The gradient is that of the unchunked sequence; memory grows by one state per chunk. In a packed row a chunk
may hold several documents; the state that is kept is that of the one document, if any, that goes on in the next chunk.

Sizes: B batch, T tokens, D documents of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv_bone.models import LayerState
from rwkv_bone.ops.cross_entropy import IGNORED_LABEL, labelled


def chunked_loss(
    model,
    ids: Tensor,
    labels: Tensor,
    *,
    chunk: int,
    bptt_chunks: int = 0,
    cu_seqlens: Tensor | None = None,
    label_rows: Tensor | None = None,
    widest: int = 0,
    **options,
) -> Tensor:
    """The summed loss of `model(ids, labels=labels, cu_seqlens=cu_seqlens)`, with memory for one chunk of tokens.

    ids and labels [B, T], or packed [1, T] with cu_seqlens [D + 1]. bptt_chunks: cut the gradient after every so many
    chunks (0 = never): the truncated form, on purpose. label_rows: where labels.flatten() is not -100, found here if
    the caller does not know. Chunks are cut by the values of cu_seqlens and label_rows: give both in the CPU's memory,
    then nothing waits for a GPU. widest: the largest T among the ranks. Padding to it has all of them run as many
    chunks, since at ZeRO stage 3 each chunk gathers parameters from all ranks.
    """
    label_rows = labelled(labels.flatten()) if label_rows is None else label_rows
    extra, before = widest - ids.shape[1], ids.shape[1]
    if extra > 0:
        ids, labels = F.pad(ids, (0, extra)), F.pad(labels, (0, extra), value=IGNORED_LABEL)
        cu_seqlens = None if cu_seqlens is None else F.pad(cu_seqlens, (0, 1), value=widest)
    T = ids.shape[1]
    where = to_device(_label_rows(values(label_rows), before, T, chunk), ids.device)
    starts = range(0, T, chunk)
    if cu_seqlens is None:
        documents, goes_on = [None] * len(starts), [True] * len(starts)
    else:
        bounds = values(cu_seqlens)
        documents = to_device(_documents(bounds, T, chunk), ids.device)
        goes_on = ~np.isin(starts, bounds)

    def run(part, targets, where, documents, state: list[LayerState] | None):
        how = {"labels": targets, "label_rows": where, "cu_seqlens": documents}
        loss, after = model(part, **how, state=state, return_state=True, **options)
        if documents is not None:
            after = [LayerState(*(rows[-1:].clone() for rows in layer)) for layer in after]
        return loss, after

    total, state = torch.zeros((), device=ids.device), None
    parts = zip(ids.split(chunk, 1), labels.split(chunk, 1), where, documents, strict=True)
    for number, part in enumerate(parts):
        if number and not goes_on[number]:
            # No rows rather than None: at ZeRO stage 3 the graph must have the same form on every rank.
            state = [LayerState(*(rows[:0] for rows in layer)) for layer in state]
        if number and bptt_chunks and number % bptt_chunks == 0:
            state = [LayerState(*(rows.detach() for rows in layer)) for layer in state]
        loss, state = checkpoint(run, *part, state, use_reentrant=False)
        total = total + loss
    return total


def values(x: Tensor) -> np.ndarray:
    """What a tensor holds; a GPU is waited for."""
    return (x.cpu() if x.is_cuda else x).numpy()


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> Sequence[Tensor]:
    """Several arrays of integers on `device`, in one copy that nothing waits for."""
    joined = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        joined = joined.pin_memory()
    return joined.to(device, non_blocking=True).split([len(array) for array in arrays])


def _label_rows(rows: np.ndarray, before: int, T: int, chunk: int) -> list[np.ndarray]:
    """Of each chunk of [B, T] the labelled rows in its own flattened labels.

    rows: those of the whole, in flattened labels [B, before], of which positions from `before` to T were added.
    """
    row, position = np.divmod(rows, before)
    number, inside = np.divmod(position, chunk)
    starts = np.arange(0, T, chunk)
    local = row * np.minimum(chunk, T - starts)[number] + inside
    order = np.argsort(number, kind="stable")
    return np.split(local[order], np.searchsorted(number[order], np.arange(1, len(starts))))


def _documents(bounds: np.ndarray, T: int, chunk: int) -> list[np.ndarray]:
    """The cu_seqlens of each chunk: its own start and end, and the documents' bounds between them."""
    edges = [(start, min(start + chunk, T)) for start in range(0, T, chunk)]
    inside = [bounds[np.searchsorted(bounds, start, "right") : np.searchsorted(bounds, end)] for start, end in edges]
    return [np.array([start, *between, end]) - start for (start, end), between in zip(edges, inside, strict=True)]
