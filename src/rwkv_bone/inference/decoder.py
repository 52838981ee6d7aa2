"""A model read token by token: the fast path of generation for one sequence.

What the model knows of a text is a state of constant size, however long the text is. A state is never changed: each
call returns a new one, so an earlier one can be kept to go back to, and one state may be continued in several ways.

Sizes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_bone.inference.compiled import compiled
from rwkv_bone.models import RWKV, LayerState

PIECE = 1024  # prompt tokens read in one call

State = list[LayerState]


class Decoder:
    """Reads tokens into a state, and gives the logits of what follows.

    model: it must not change afterwards. device: the model's. piece: tokens read in one forward pass, whose memory must
    fit. On a CPU a single token goes through the model in one call (`compiled.py`), in float32 whatever the model's
    dtype is, and may then differ from `RWKV.forward` by that one's rounding. Adapters stay beside their weights there,
    and quantised projections as they are; only Bat's update is folded into copies of the weights. Where that call is
    not possible (see `compiled`), the model's own forward does the same.
    """

    def __init__(self, model: RWKV, device: torch.device | str = "cpu", piece: int = PIECE):
        if piece < 1:
            raise ValueError(f"piece {piece}: expected at least 1")
        self.model, self.device, self.piece = model, torch.device(device), piece
        self.vocab_size = model.arch.vocab_size
        self._compiled = compiled(model)

    @torch.no_grad()
    def read(self, ids: Sequence[int], state: State | None = None) -> tuple[Tensor, State]:
        """(logits [V] of what follows, the state after) `ids`, read from `state` on (None = start of a document).

        ids: at least one, of any number; memory does not grow with it. ValueError for none, or for one outside the
        vocabulary.
        """
        if not ids:
            raise ValueError("no token to read: expected at least one")
        if not (0 <= min(ids) and max(ids) < self.vocab_size):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(f"token {wrong}: expected 0 to {self.vocab_size - 1}, the model's vocabulary")
        if len(ids) == 1 and self._compiled is not None:
            return self._compiled.step(ids[0], state)
        *before, last = range(0, len(ids), self.piece)
        for start in before:
            state = self._forward(ids[start : start + self.piece], state)[1]
        return self._forward(ids[last:], state)

    def step(self, token: int, state: State | None) -> tuple[Tensor, State]:
        """`read` of one token."""
        return self.read((token,), state)

    def _forward(self, ids: Sequence[int], state: State | None) -> tuple[Tensor, State]:
        tokens = torch.tensor([ids], device=self.device)
        logits, state = self.model(tokens, state=state, return_state=True, last_only=True)
        return logits[0], state
