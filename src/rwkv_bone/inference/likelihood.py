"""Exact log-likelihoods: how probable a model finds a continuation after a context, or a whole text.

A pair is read as two texts: the trunk, its context without the last token, and the branch, that last token and the
continuation without its own last one. So exactly the positions of branches go through the head, and pairs with the
same context, such as the choices of a question, share its trunk, which is read once. What the trunks of a batch begin
with in common, such as the examples before every question, is read once as well.

Texts are packed, one after another, and read in pieces that go on from the states of the ones before. So their length
is not limited, and memory holds the states of `batch` texts and the logits of one piece.

Sizes: T tokens of a piece, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_bone.errors import UserError
from rwkv_bone.inference.decoder import PIECE, State
from rwkv_bone.inference.generate import BATCH
from rwkv_bone.inference.packed import beginning, pieces, states_after
from rwkv_bone.models import RWKV
from rwkv_bone.ops.cross_entropy import rows_at_a_time, softmax_gradient_

Pair = tuple[Sequence[int], Sequence[int]]


class Likelihood(NamedTuple):
    """total: the log-probability of a continuation, in nats, at most 0. tokens: how many it has. greedy: whether each
    of them is the most likely one (of equal ones the first), as greedy generation would write it."""

    total: float
    tokens: int
    greedy: bool


class _Trunk(NamedTuple):
    """Neighbouring pairs with the same context: what all of them read first, and their numbers."""

    context: list[int]
    pairs: list[int]


@torch.no_grad()
def log_likelihoods(
    model: RWKV,
    pairs: Sequence[Pair],
    *,
    piece: int = PIECE,
    batch: int = BATCH,
    device: torch.device | str = "cpu",
    done: Callable[[int], object] = lambda pairs: None,
) -> list[Likelihood]:
    """log P(continuation | context) for each pair (context, continuation) of token ids, in their order.

    A context has at least one token: what comes before a document is the end-of-document token. An empty continuation
    has the total 0. Logits are of the model's dtype, and everything after them is computed in float32 and summed in
    float64. What a pair gets does not depend on the others but for the rounding of the model. batch: pairs at a time.
    piece: tokens read in one forward pass. device: the model's. done: called after each batch with its number of pairs.

    ValueError for an empty context, a token outside the vocabulary, and a batch or piece below 1; UserError where the
    model's numbers are not finite.
    """
    if min(batch, piece) < 1:
        raise ValueError(f"batch {batch}, piece {piece}: expected at least 1")
    for number, pair in enumerate(pairs):
        _check(number, *pair, model.arch.vocab_size)
    found = {number: Likelihood(0.0, 0, True) for number, (_, continuation) in enumerate(pairs) if not continuation}
    for trunks in _batches(pairs, batch):
        states = _states(model, [trunk.context[:-1] for trunk in trunks], piece, device)
        branches = [
            (number, state)
            for trunk, state in zip(trunks, states, strict=True)
            for number in trunk.pairs
            if number not in found
        ]
        # A branch from a state comes before those that start afresh: `RWKV.forward` takes states in this order.
        branches.sort(key=lambda branch: branch[1] is None)
        for start in range(0, len(branches), batch):
            numbers, starts = zip(*branches[start : start + batch], strict=True)
            read = _score(model, [pairs[number] for number in numbers], starts, piece, device)
            found.update(zip(numbers, read, strict=True))
        done(sum(len(trunk.pairs) for trunk in trunks))
    for number in range(len(pairs)):
        if not math.isfinite(total := found[number].total):
            raise UserError(
                f"pair {number} has the log-likelihood {total}: the model gives numbers that are not finite; try "
                "--precision fp32, and check the files of model and adapter"
            )
    return [found[number] for number in range(len(pairs))]


def rolling(model: RWKV, texts: Sequence[Sequence[int]], *, eod: int = 0, **how: Any) -> list[Likelihood]:
    """log P(text) for each text of token ids, read whole as a document: from the end-of-document token `eod` on.

    how: as `log_likelihoods` takes it.
    """
    return log_likelihoods(model, [((eod,), text) for text in texts], **how)


def _check(number: int, context: Sequence[int], continuation: Sequence[int], vocabulary: int) -> None:
    if not context:
        raise ValueError(f"pair {number}: its context is empty: expected at least one token, such as end-of-document")
    for token in chain(context, continuation):
        if not 0 <= token < vocabulary:
            raise ValueError(f"pair {number}: token {token}: expected 0 to {vocabulary - 1}, the model's vocabulary")


def _batches(pairs: Sequence[Pair], batch: int) -> Iterator[list[_Trunk]]:
    """Trunks with together at most `batch` pairs; one that has more pairs comes alone."""
    trunks: list[_Trunk] = []
    for context, group in groupby(range(len(pairs)), key=lambda number: list(pairs[number][0])):
        trunk = _Trunk(context, list(group))
        if trunks and sum(len(t.pairs) for t in trunks) + len(trunk.pairs) > batch:
            yield trunks
            trunks = []
        trunks.append(trunk)
    if trunks:
        yield trunks


def _states(model: RWKV, texts: Sequence[Sequence[int]], piece: int, device: torch.device | str) -> list[State | None]:
    """The state after each text, of one row; None after an empty one: the start of a document."""
    shared = beginning(texts) if len(texts) > 1 else []
    root: State | None = None
    if shared:
        [root] = states_after(model, [shared], [None], piece, device)
    rests = [text[len(shared) :] for text in texts]
    longer = [number for number, rest in enumerate(rests) if rest]
    states: list[State | None] = [root] * len(texts)
    read = states_after(model, [rests[number] for number in longer], [root] * len(longer), piece, device)
    for number, state in zip(longer, read, strict=True):
        states[number] = state
    return states


def _score(
    model: RWKV, pairs: Sequence[Pair], starts: Sequence[State | None], piece: int, device: torch.device | str
) -> Iterator[Likelihood]:
    """The likelihoods of pairs whose trunks have been read into `starts`. No continuation is empty."""
    branches = [[context[-1], *continuation[:-1]] for context, continuation in pairs]
    targets = torch.tensor([token for _, continuation in pairs for token in continuation], device=device)
    piece = min(piece, rows_at_a_time(model.arch.vocab_size, torch.device(device).type, trained=False))
    labels = iter(targets.split(piece))
    losses: list[Tensor] = []  # of each piece [T]
    likeliest: list[Tensor] = []

    def measure(logits: Tensor) -> None:  # [1, T, V]
        label = next(labels)
        likeliest.append(logits[0].argmax(dim=1) == label)
        losses.append(softmax_gradient_(logits[0], label, gradient=False))

    for _ in pieces(model, branches, starts, piece, device, measure):
        pass
    lengths = [len(branch) for branch in branches]
    # The one wait for the device.
    nats, greedy = torch.cat(losses).cpu().double().split(lengths), torch.cat(likeliest).cpu().split(lengths)
    for loss, right in zip(nats, greedy, strict=True):
        yield Likelihood(-loss.sum().item(), len(loss), bool(right.all()))
