"""Sequences longer than memory: chunk by chunk, with the exact gradient of the whole.

RWKV hands a fixed-size state from token to token. So a long sequence is run in chunks, of which only the state at each
boundary is kept; backward recomputes one chunk at a time, from the last to the first, and passes the gradient of the
state on. The gradient is that of the unchunked sequence; memory grows by one state per chunk.

Sizes: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv_bone.models import LayerState


def chunked_loss(model, ids: Tensor, labels: Tensor, *, chunk: int, bptt_chunks: int = 0, **options) -> Tensor:
    """The summed loss of `model(ids, labels=labels)`, ids and labels [B, T], with memory for one chunk of tokens.

    bptt_chunks: cut the gradient after every so many chunks (0 = never): the truncated form, on purpose.
    """

    def run(part: Tensor, targets: Tensor, state: list[LayerState] | None) -> tuple[Tensor, list[LayerState]]:
        return model(part, labels=targets, state=state, return_state=True, **options)

    total, state = torch.zeros((), device=ids.device), None
    for number, (part, targets) in enumerate(zip(ids.split(chunk, 1), labels.split(chunk, 1), strict=True)):
        if state is not None and bptt_chunks and number % bptt_chunks == 0:
            state = [LayerState(*(tensor.detach() for tensor in layer)) for layer in state]
        loss, state = checkpoint(run, part, targets, state, use_reentrant=False)
        total = total + loss
    return total
