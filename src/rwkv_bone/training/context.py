"""Sequences longer than memory: chunk by chunk, with the exact gradient of the whole.

RWKV hands a state of fixed size from token to token. So a long sequence is run in chunks, and only the state at each
boundary between chunks is kept. Backward recomputes one chunk at a time, from the last to the first, and passes the
gradient of the state on. The gradient is that of the unchunked sequence; memory grows by one state per chunk. In a
packed row a chunk may hold several documents. Only the last of them can go on in the next chunk: its state is kept.

Sizes: B batch, T tokens, D documents of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv_bone import allocator
from rwkv_bone.models import LayerState
from rwkv_bone.ops.cross_entropy import IGNORED_LABEL, labelled


def chunked_loss(
    model: Callable[..., tuple[Tensor, list[LayerState]]],
    ids: Tensor,
    labels: Tensor,
    *,
    chunk: int,
    bptt_chunks: int = 0,
    cu_seqlens: Tensor | None = None,
    label_rows: Tensor | None = None,
    widest: int = 0,
    **options: object,
) -> Tensor:
    """The summed loss of `model(ids, labels=labels, cu_seqlens=cu_seqlens)`, with memory for one chunk of tokens.

    ids and labels [B, T], or packed [1, T] with cu_seqlens [D + 1]; options go to the model as well. With
    per_token=True among them it is the loss of each labelled position, [R] in the order of label_rows.
    chunk: tokens of a chunk. bptt_chunks: the gradient is cut after this many chunks, as in truncated backpropagation
    through time (0 = never).
    label_rows: the positions in labels.flatten() that are not -100 (None = they are looked up). How the chunks are cut
    depends on the values of cu_seqlens and label_rows: if both are in the CPU's memory, nothing waits for a GPU.
    widest: the largest T of all ranks. Each rank pads to it, so that all run the same number of chunks: at ZeRO stage
    3 each chunk gathers parameters from all ranks.
    """
    label_rows = labelled(labels.flatten()) if label_rows is None else label_rows
    unpadded, extra = ids.shape[1], widest - ids.shape[1]
    if extra > 0:
        ids, labels = F.pad(ids, (0, extra)), F.pad(labels, (0, extra), value=IGNORED_LABEL)
        cu_seqlens = None if cu_seqlens is None else F.pad(cu_seqlens, (0, 1), value=widest)
    T = ids.shape[1]
    *where, places = to_device(_label_rows(values(label_rows), unpadded, T, chunk), ids.device)
    starts = range(0, T, chunk)
    documents: Sequence[Tensor | None] = [None] * len(starts)
    goes_on = [True] * len(starts)  # whether a document of the chunk before goes on in this one
    if cu_seqlens is not None:
        bounds = values(cu_seqlens)
        documents = to_device(_documents(bounds, T, chunk), ids.device)
        goes_on = [start not in bounds for start in starts]

    def run(
        part: Tensor, targets: Tensor, where: Tensor, documents: Tensor | None, state: list[LayerState] | None
    ) -> tuple[Tensor, list[LayerState]]:
        if not part.is_cuda:
            allocator.trim()
        how = {"labels": targets, "label_rows": where, "cu_seqlens": documents}
        loss, after = model(part, **how, state=state, return_state=True, **options)
        if documents is not None:
            after = [LayerState(*(rows[-1:].clone() for rows in layer)) for layer in after]
        return loss, after

    losses: list[Tensor] = []  # one a chunk
    state: list[LayerState] | None = None
    parts = zip(ids.split(chunk, 1), labels.split(chunk, 1), where, documents, strict=True)
    for number, part in enumerate(parts):
        if state is not None and not goes_on[number]:
            # A state without rows and not None: at ZeRO stage 3 the graph must have the same form on every rank.
            state = [LayerState(*(rows[:0] for rows in layer)) for layer in state]
        if state is not None and bptt_chunks and number % bptt_chunks == 0:
            state = [LayerState(*(rows.detach() for rows in layer)) for layer in state]
        loss, state = checkpoint(run, *part, state, use_reentrant=False)
        losses.append(loss)
    if options.get("per_token"):
        return torch.cat(losses)[places]  # with several rows, each chunk has labels of each
    return sum(losses, torch.zeros((), device=ids.device))


def values(x: Tensor) -> np.ndarray:
    """The values of a tensor; this waits for a GPU if the tensor is there."""
    return (x.cpu() if x.is_cuda else x).numpy()


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> Sequence[Tensor]:
    """Copy several arrays of integers to `device`, all in one copy, for which nothing waits."""
    joined = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        joined = joined.pin_memory()
    return joined.to(device, non_blocking=True).split([len(array) for array in arrays])


def _label_rows(rows: np.ndarray, unpadded: int, T: int, chunk: int) -> list[np.ndarray]:
    """For each chunk, the positions of its labels within the flattened labels of that chunk alone.

    rows: positions of all labels within the flattened labels [B, unpadded], before padding to [B, T]. At the end of the
    list: where in the chunks' labels, one chunk after another, each of `rows` is.
    """
    row, position = np.divmod(rows, unpadded)
    number, inside = np.divmod(position, chunk)
    starts = np.arange(0, T, chunk)
    local = row * np.minimum(chunk, T - starts)[number] + inside
    order = np.argsort(number, kind="stable")
    chunks = np.split(local[order], np.searchsorted(number[order], np.arange(1, len(starts))))
    return [*chunks, np.argsort(order)]


def _documents(bounds: np.ndarray, T: int, chunk: int) -> list[np.ndarray]:
    """For each chunk, its cu_seqlens: its own start and end, and the bounds of documents between them.

    bounds: cu_seqlens of the whole row.
    """
    edges = [(start, min(start + chunk, T)) for start in range(0, T, chunk)]
    inside = [bounds[np.searchsorted(bounds, start, "right") : np.searchsorted(bounds, end)] for start, end in edges]
    return [np.array([start, *between, end]) - start for (start, end), between in zip(edges, inside, strict=True)]
