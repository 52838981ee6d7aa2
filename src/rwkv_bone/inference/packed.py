"""Texts read packed, one after another, in pieces that go on from the states of the ones before.

So their length is not limited, and memory holds the states of the texts and what the model makes of one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from rwkv_bone.inference.decoder import State
from rwkv_bone.models import LayerState

# `RWKV.forward` with return_state: (logits, the new state).
StatefulModel = Callable[..., tuple[Tensor, State]]


def beginning(texts: Sequence[Sequence[int]]) -> Sequence[int]:
    """What all texts begin with."""
    first, last = min(map(list, texts)), max(map(list, texts))  # whatever lies between these begins as both do
    same = (number for number, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(same, len(first))]


def pieces(
    model: StatefulModel,
    texts: Sequence[Sequence[int]],
    starts: Sequence[State | None],
    piece: int,
    device: torch.device | str,
    take: Callable[[Tensor], None],
    **how: Any,
) -> Iterator[tuple[int, State]]:
    """Read texts, packed, from `starts` on: (how many texts end in it, the states) of each piece.

    No text is empty, and no start but None comes after None. The states have one row for each text of the piece; one
    more than those that end in it is there where a text goes on in the next piece. take: called with the logits of each
    piece, which nothing holds afterwards. how: for the model's forward.
    """
    tokens, ends = list(chain.from_iterable(texts)), list(accumulate(map(len, texts)))
    begins = [0, *ends]
    carried: list[State] = []  # of the text that goes on, one or none
    for start in range(0, len(tokens), piece):
        ids = torch.tensor([tokens[start : start + piece]], device=device)
        stop = start + ids.shape[1]
        inside = [end - start for end in ends if start < end <= stop]
        bounds = [0, *inside] if stop in ends else [0, *inside, stop - start]
        new = [state for begin, state in zip(begins, starts, strict=False) if start <= begin < stop]
        before = [*carried, *(state for state in new if state is not None)]
        logits, after = model(
            ids,
            state=joined(before) if before else None,
            cu_seqlens=torch.tensor(bounds, device=device),
            return_state=True,
            **how,
        )
        take(logits)
        del logits  # before the next ones are made
        yield len(inside), after
        carried = [] if stop in ends else [rows(after, slice(len(inside), None))]
        del after  # before the next one is made


def states_after(
    model: StatefulModel,
    texts: Sequence[Sequence[int]],
    starts: Sequence[State | None],
    piece: int,
    device: torch.device | str,
) -> list[State]:
    """The state after each text, of one row, read from `starts` on as `pieces` does."""
    states: list[State] = []
    for ended, after in pieces(model, texts, starts, piece, device, lambda logits: None, last_only=True):
        states += (rows(after, slice(row, row + 1)) for row in range(ended))
    return states


def joined(states: Sequence[State]) -> State:
    """The rows of all, one after another."""
    return [LayerState(*map(torch.cat, zip(*layer, strict=True))) for layer in zip(*states, strict=True)]


def rows(state: State, some: slice) -> State:
    """The states of some texts, a copy: a view would keep the others in memory too."""
    return [LayerState(*(part[some].clone() for part in layer)) for layer in state]
