"""Text from a model: prompts are read, then all continue together, one token at a time, from their states.

Memory grows neither with the number of prompts nor with their length. At most `batch` prompts are worked on at a time.
They are read packed, one after another, in pieces of `piece` tokens; each piece goes on from the states of the one
before.

Sizes: B sequences at a time, D documents of a piece, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from rwkv_bone.models import LayerState

BATCH = 32  # sequences at a time; the state of one takes 21 MB at 2.9B, 34 MB at 7B
PIECE = 1024  # prompt tokens read in one call

# `RWKV.forward` with return_state: (logits [B, V], the new state).
StatefulModel = Callable[..., tuple[Tensor, list[LayerState]]]


@torch.no_grad()
def generate(
    model: StatefulModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    stop_id: int | None = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch: int = BATCH,
    piece: int = PIECE,
    device: torch.device | str = "cpu",
    done: Callable[[int], object] = lambda prompts: None,
) -> list[list[int]]:
    """Continue each prompt by at most `max_new` tokens; what is returned holds neither prompt nor `stop_id`.

    model: an `RWKV`, or what passes its arguments on to one. Prompts may have any length but 0; they are never cut.
    temperature 0 takes the most likely token; above it, tokens are drawn from the smallest set whose probability
    reaches `top_p`, the same ones for the same seed. The states of `batch` sequences and one forward pass of `piece`
    tokens must fit into memory. done: called after each batch with the number of its prompts. ValueError
    for an empty prompt, a batch or piece below 1, a negative max_new, a temperature that is no number from 0 on, and a
    top_p outside 0 < top_p <= 1.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: it needs at least one token to continue from")
    if min(batch, piece) < 1:
        raise ValueError(f"batch {batch}, piece {piece}: expected at least 1")
    if max_new < 0:
        raise ValueError(f"max_new {max_new}: expected the largest number of new tokens, 0 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature}: expected 0 (the most likely token) or a positive number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: expected a probability above 0, up to 1 (all tokens)")
    if max_new == 0:
        return [[] for _ in prompts]
    generator = torch.Generator(device).manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        return _choose(logits, temperature, top_p, generator)

    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        answers += _answers(model, some, choose, max_new, stop_id, piece, device)
        done(len(some))
    return answers


def _answers(
    model: StatefulModel,
    prompts: Sequence[Sequence[int]],
    choose: Callable[[Tensor], Tensor],
    max_new: int,
    stop_id: int | None,
    piece: int,
    device: torch.device | str,
) -> list[list[int]]:
    """The answers to one batch of prompts."""
    answers: list[list[int]] = [[] for _ in prompts]
    logits, state = _read(model, prompts, piece, device)
    rows = list(range(len(prompts)))  # the prompt of each row that is still being written
    for left in reversed(range(max_new)):
        tokens = choose(logits)
        going = []
        for i, token in enumerate(tokens.tolist()):  # the one wait for the device
            if token != stop_id:
                answers[rows[i]].append(token)
                going.append(i)
        if not going or not left:
            break
        if len(going) < len(rows):
            keep = torch.tensor(going, device=device)
            rows = [rows[i] for i in going]
            tokens, state = tokens[keep], _rows(state, keep)
        logits, state = model(tokens[:, None], state=state, return_state=True, last_only=True)
    return answers


def _read(
    model: StatefulModel, prompts: Sequence[Sequence[int]], piece: int, device: torch.device | str
) -> tuple[Tensor, list[LayerState]]:
    """Read prompts, packed one after another: (logits [B, V] of what follows each, the state after each)."""
    tokens, ends = list(chain.from_iterable(prompts)), list(accumulate(map(len, prompts)))
    logits: list[Tensor] = []  # of the prompts that have ended so far
    states: list[list[LayerState]] = []
    state: list[LayerState] | None = None  # of the prompt that goes on in the next piece
    for start in range(0, len(tokens), piece):
        ids = torch.tensor([tokens[start : start + piece]], device=device)
        stop = start + ids.shape[1]
        inside = [end - start for end in ends if start < end <= stop]
        bounds = [0, *inside] if stop in ends else [0, *inside, stop - start]
        cu_seqlens = torch.tensor(bounds, device=device)
        out, state = model(ids, state=state, cu_seqlens=cu_seqlens, return_state=True, last_only=True)
        n = len(inside)  # the prompts that end here; one more may go on in the next piece
        logits.append(out[:n].clone())  # a view would keep the rows of every piece in memory
        states.append(_rows(state, slice(n)))
        state = _rows(state, slice(n, None))
    joined = [LayerState(*map(torch.cat, zip(*layer, strict=True))) for layer in zip(*states, strict=True)]
    return torch.cat(logits), joined


def _rows(state: list[LayerState], rows: Tensor | slice) -> list[LayerState]:
    """The states of some of the sequences, a copy in any case: a view would keep the others in memory too."""

    def copy(part: Tensor) -> Tensor:
        return part[rows].clone() if isinstance(rows, slice) else part[rows]

    return [LayerState(*map(copy, layer)) for layer in state]


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Next token of each row: logits [B, V] -> [B]."""
    if temperature <= 0:
        return logits.argmax(dim=-1)
    probability, order = torch.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True)
    before = probability.cumsum(dim=-1) - probability  # of all tokens that are more likely
    drawn = torch.multinomial(probability.masked_fill(before >= top_p, 0.0), 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)
