"""Text from a model: prompts are read, then all continue together, one token at a time, from their states.

Memory grows neither with the number of prompts nor with their length. At most `batch` prompts are worked on at a time.
They are read packed, one after another, in pieces of `piece` tokens; each piece goes on from the states of the one
before. What the prompts of a batch begin with in common, such as worked examples, is read once, and so are equal
prompts: this changes the rounding of sums and nothing else. On a CPU a token of each sequence then goes through the
model in one call (`compiled.py`).

Sizes: B sequences at a time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rwkv_bone.data.tokenizer import Tokenizer
from rwkv_bone.inference.compiled import CompiledModel, compiled, flat_states
from rwkv_bone.inference.decoder import PIECE, State
from rwkv_bone.inference.packed import StatefulModel, beginning, joined, pieces, rows, states_after
from rwkv_bone.inference.sampling import Samplers, Sampling
from rwkv_bone.inference.stopping import END, LENGTH, TEXT, Stop, Writing
from rwkv_bone.models import RWKV, LayerState

BATCH = 32  # sequences at a time; the state of one takes 21 MB at 2.9B, 34 MB at 7B
SHORTEST = 16  # tokens of a common beginning that are worth a pass of their own


class Known(NamedTuple):
    """What all of some prompts begin with, and the state after it, of one row."""

    tokens: tuple[int, ...]
    state: State


def shared_beginning(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What prompts begin with in common, without the last token of any: none where reading it once gains nothing."""
    shared = beginning([prompt[:-1] for prompt in prompts]) if len(prompts) > 1 else ()
    return tuple(shared) if len(shared) >= SHORTEST else ()


@torch.no_grad()
def read_beginning(
    model: StatefulModel, prompts: Sequence[Sequence[int]], *, piece: int = PIECE, device: torch.device | str = "cpu"
) -> Known | None:
    """What these prompts begin with, read for several calls of `generate`; None where that gains nothing."""
    tokens = shared_beginning(prompts)
    return Known(tokens, *states_after(model, [tokens], [None], piece, device)) if tokens else None


@torch.no_grad()
def generate(
    model: StatefulModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int | Sequence[int],
    stop_id: int | None = 0,
    stop_texts: Sequence[str] = (),
    opening: str = "",
    tokenizer: Tokenizer | None = None,
    batch: int = BATCH,
    piece: int = PIECE,
    device: torch.device | str = "cpu",
    known: Known | None = None,
    done: Callable[[int], object] = lambda prompts: None,
    ended: Callable[[str], object] = lambda why: None,
    seed: int | Sequence[int] = 0,
    **sampling: Any,
) -> list[list[int]]:
    """Continue each prompt; what is returned holds neither prompt nor `stop_id`, nor a stop text and what follows it.

    model: an `RWKV`, or what passes its arguments on to one. Prompts may have any length but 0; they are never cut.
    max_new: the largest number of new tokens, of all prompts or of each. stop_texts: they end an answer wherever they
    stand in its text, and need the tokenizer; opening: see `Stop`. The states of `batch` sequences and one forward pass
    of `piece` tokens must fit into memory. known: what every prompt begins with, already read. done: called after each
    batch with the number of its prompts. ended: called for each answer, in order, with why it ended: `stopping.END`,
    TEXT or LENGTH. seed: of all prompts, which then draw different numbers, or of each. sampling: the other fields of
    `Sampling`; without them the most likely token is taken. What a prompt draws does not depend on the other prompts.

    ValueError for an empty prompt, one that does not begin as `known` and go on, a batch or piece below 1, a number of
    seeds or of max_new that is not that of the prompts, and for what `Sampling` and `Stop` refuse.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: it needs at least one token to continue from")
    begun = known.tokens if known else ()
    if not all(len(prompt) > len(begun) and tuple(prompt[: len(begun)]) == begun for prompt in prompts):
        raise ValueError(f"known: expected every prompt to begin with its {len(begun)} tokens, and to go on")
    if min(batch, piece) < 1:
        raise ValueError(f"batch {batch}, piece {piece}: expected at least 1")
    if stop_texts and tokenizer is None:
        raise ValueError("stop_texts need the tokenizer")
    most = [max_new] * len(prompts) if isinstance(max_new, int) else list(max_new)
    seeds = [f"{seed} {i}" for i in range(len(prompts))] if isinstance(seed, int) else list(map(str, seed))
    for name, values in (("max_new", most), ("seed", seeds)):
        if len(values) != len(prompts):
            raise ValueError(f"{name}: expected one for each of the {len(prompts)} prompts, found {len(values)}")
    how = Sampling(max_new=min(most, default=0), **sampling)  # which checks each
    stop = Stop(() if stop_id is None else (stop_id,), tuple(stop_texts), opening)

    one_call = compiled(model) if isinstance(model, RWKV) and max(most, default=0) > 1 else None
    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        some = slice(start, start + batch)
        written = [_Written(limit, tokenizer if stop_texts else None, stop) for limit in most[some]]
        if any(most[some]):
            rests = [prompt[len(begun) :] for prompt in prompts[some]]
            logits, state = _read(model, rests, known.state if known else None, piece, device)
            going = _Together(model, state, device) if one_call is None else _InOneCall(one_call, state)
            del state  # in one call its copy is what changes
            _answer(going, logits, written, Samplers(how, seeds[some]), device)
            del going, logits  # before the next prompts are read
        for answer in written:
            answers.append(answer.kept())
            ended(answer.ended)
        done(len(prompts[some]))
    return answers


class _Written:
    """One answer: token by token, until a token or text ends it or `limit` tokens are there."""

    def __init__(self, limit: int, tokenizer: Tokenizer | None, stop: Stop):
        self._limit, self._stop = limit, stop
        self._ids: list[int] = []
        self.ended = LENGTH
        self._writing = tokenizer and Writing(tokenizer, stop)

    def goes_on(self, token: int) -> bool:
        """Take a token; whether there is another one to come."""
        if len(self._ids) >= self._limit:
            return False
        if token in self._stop.ids:
            self.ended = END
            return False
        self._ids.append(token)
        if self._writing:
            self._writing.add(token)
            if self._writing.stopped:
                self.ended = TEXT
                return False
        return len(self._ids) < self._limit

    def kept(self) -> list[int]:
        return self._writing.kept() if self._writing and self._writing.stopped else self._ids


class _Going(Protocol):
    """The sequences that are under way, and their states."""

    def keep(self, rows: list[int]) -> None:
        """Go on with these alone."""

    def read(self, tokens: Tensor, ids: list[int]) -> Tensor:
        """Logits [B, V] of what follows the next token of each, given twice: [B] on the device, and as a list."""


class _Together(_Going):
    """By the model's own forward."""

    def __init__(self, model: StatefulModel, state: State, device: torch.device | str):
        self._model, self._state, self._device = model, state, device

    def keep(self, rows: list[int]) -> None:
        self._state = _rows(self._state, torch.tensor(rows, device=self._device))

    def read(self, tokens: Tensor, ids: list[int]) -> Tensor:
        logits, self._state = self._model(tokens[:, None], state=self._state, return_state=True, last_only=True)
        return logits


class _InOneCall(_Going):
    """By the compiled model, which changes the states where they are."""

    def __init__(self, model: CompiledModel, state: State):
        self._model, self._states = model, flat_states(state)

    def keep(self, rows: list[int]) -> None:
        self._states = [self._states[row] for row in rows]

    def read(self, tokens: Tensor, ids: list[int]) -> Tensor:
        return self._model.advance(ids, self._states)


def _answer(
    sequences: _Going,
    logits: Tensor,
    answers: Sequence[_Written],
    choose: Samplers,
    device: torch.device | str,
) -> None:
    """Write the answers to one batch of prompts, whose last tokens gave these logits."""
    while True:
        tokens = choose(logits)
        ids = tokens.tolist()  # the one wait for the device
        going = [row for row, token in enumerate(ids) if answers[row].goes_on(token)]
        if not going:
            break
        if len(going) < len(answers):
            answers, ids = [answers[row] for row in going], [ids[row] for row in going]
            tokens = tokens[torch.tensor(going, device=device)]
            choose.keep(going)
            sequences.keep(going)
        logits = sequences.read(tokens, ids)


def _read(
    model: StatefulModel, prompts: Sequence[Sequence[int]], start: State | None, piece: int, device: torch.device | str
) -> tuple[Tensor, State]:
    """Read prompts from `start` on: (logits [B, V] of what follows each, the state after each)."""
    places = {text: place for place, text in enumerate(dict.fromkeys(map(tuple, prompts)))}  # of different prompts
    shared = shared_beginning(list(places))
    if shared:
        [start] = states_after(model, [shared], [start], piece, device)
    texts, made = [text[len(shared) :] for text in places], list[Tensor]()
    logits: list[Tensor] = []
    states: list[State] = []
    for ended, after in pieces(model, texts, [start] * len(texts), piece, device, made.append, last_only=True):
        logits.append(made.pop()[:ended].clone())  # a view would keep the rows of every piece in memory
        states.append(rows(after, slice(ended)))
        del after
    state = joined(states)
    if len(places) == len(prompts):
        return torch.cat(logits), state
    of = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=device)
    return torch.cat(logits)[of], _rows(state, of)


def _rows(state: State, some: Tensor) -> State:
    """The states of some of the sequences, a copy."""
    return [LayerState(*(part[some] for part in layer)) for layer in state]
