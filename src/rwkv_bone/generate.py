"""Text from a model: every prompt is read once, then all continue together, one token at a time, from their states.

Sizes: B sequences still being written, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from rwkv_bone.models import LayerState

PREFILL_TOKENS = 4096  # prompt tokens of one length that are read in one call


@torch.no_grad()
def generate(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    stop_id: int | None = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[list[int]]:
    """Continue each prompt by at most `max_new` tokens; what is returned holds neither prompt nor `stop_id`.

    model: a call `model(ids [B, T], state=..., return_state=True)` -> (logits [B, T, V], state). Prompts may differ in
    length but none may be empty. temperature 0 takes the most likely token; above it, tokens are drawn from the
    smallest set whose probability reaches `top_p`, the same ones for the same seed.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: it needs at least one token to continue from")
    generator = torch.Generator(device).manual_seed(seed)
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new < 1:
        return answers
    logits, state, rows = _prefill(model, prompts, device)
    for left in reversed(range(max_new)):
        tokens = _choose(logits, temperature, top_p, generator)
        going = []
        for i, token in enumerate(tokens.tolist()):
            if token != stop_id:
                answers[rows[i]].append(token)
                going.append(i)
        if not going or not left:
            break
        if len(going) < len(rows):
            keep = torch.tensor(going, device=device)
            rows = [rows[i] for i in going]
            tokens, state = tokens[keep], _map(lambda part, keep=keep: part[keep], state)
        logits, state = model(tokens[:, None], state=state, return_state=True)
        logits = logits[:, -1]
    return answers


def _prefill(model, prompts, device) -> tuple[Tensor, list[LayerState], list[int]]:
    """Read all prompts, those of one length together: (logits [B, V], state, the prompt number of each row)."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    logits, states = [], []
    for length, group in groupby(order, key=lambda i: len(prompts[i])):
        group = list(group)
        size = max(1, PREFILL_TOKENS // length)
        for start in range(0, len(group), size):
            ids = torch.tensor([list(prompts[i]) for i in group[start : start + size]], device=device)
            out, state = model(ids, return_state=True)
            logits.append(out[:, -1])
            states.append(state)
    joined = [LayerState(*map(torch.cat, zip(*layer, strict=True))) for layer in zip(*states, strict=True)]
    return torch.cat(logits), joined, order


def _map(function, state: list[LayerState]) -> list[LayerState]:
    return [LayerState(*map(function, layer)) for layer in state]


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Next token of each row: logits [B, V] -> [B]."""
    if temperature <= 0:
        return logits.argmax(dim=-1)
    probability, order = torch.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True)
    before = probability.cumsum(dim=-1) - probability  # of all tokens that are more likely
    drawn = torch.multinomial(probability.masked_fill(before >= top_p, 0.0), 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)
