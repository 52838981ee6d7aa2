"""A conversation with one model: turns, and a state of constant size that has read them.

The state is kept from turn to turn, so that nothing is read twice; those of earlier turns are kept on the CPU, for
`undo`. A template that cannot write several turns (raw) begins each message anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_bone import checkpoints
from rwkv_bone.checkpoints.atomic import atomic_path
from rwkv_bone.console import counted, with_bar
from rwkv_bone.errors import JSON_ERRORS, UserError
from rwkv_bone.inference.decoder import PIECE, State
from rwkv_bone.inference.sampling import Sampler, Sampling
from rwkv_bone.inference.stopping import Stop
from rwkv_bone.inference.stream import Answer, stream
from rwkv_bone.inference.voice import Voice
from rwkv_bone.models import LayerState

FORMAT = "rwkv-bone conversation 1"


@dataclass(frozen=True)
class Turn:
    """A message and its answer, as the model wrote it; `before` is the state that had read all before it, if kept."""

    message: str
    answer: str
    before: State | None = None
    kept: bool = False  # whether `before` can be gone back to; at the beginning it is None


class Session:
    """One model's conversation. undo: number of turns whose states are kept. stops: instead of the template's."""

    def __init__(self, voice: Voice, sampling: Sampling, system: str = "", undo: int = 20, stops: tuple[str, ...] = ()):
        self.voice, self.system, self.undo_limit, self.stops = voice, system, undo, stops
        self.turns: list[Turn] = []
        self.state: State | None = None
        self._file: Path | None = None  # where this conversation was saved last, or is from
        self.sampling = sampling

    @property
    def sampling(self) -> Sampling:
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._sampler = Sampler(sampling, self.voice.model.arch.vocab_size)

    def prompt(self, message: str) -> list[int]:
        """The ids to read for this message, from the state on. UserError for text that cannot be read."""
        voice = self.voice
        if self.state is None:
            ids = voice.encode(voice.wording.first(message, self.system))
        else:
            closing, text = voice.wording.next(message)
            written = self.turns[-1].answer if self.turns else ""
            # An answer that was ended early may have begun to close itself.
            begun = next((n for n in range(len(closing), 0, -1) if written.endswith(closing[:n])), 0)
            ids = [*voice.encode(closing[begun:]), *voice.encode(text)]
        # A model needs one token to start from. What comes before a document is the end of another.
        return ids or [voice.tokenizer.eod]

    def answer(self, message: str) -> Reply:
        """The answer to a message: iterate over it, then `Reply.keep` it."""
        voice = self.voice
        if not voice.wording.several:
            self.state = None
        self._sampler.forget()
        ids, state = self.prompt(message), self.state
        # All but the last piece is read here, with a bar where it takes long.
        pieces = range(0, len(ids) - PIECE, PIECE)
        for start in with_bar(pieces, len(pieces), f"reading {counted(len(ids), 'token')}"):
            _, state = voice.decoder.read(ids[start : start + PIECE], state)
        rest = ids[len(pieces) * PIECE :]
        stop = Stop((voice.tokenizer.eod,), self.stops or voice.wording.stops, voice.wording.opening)
        return Reply(self, message, stream(voice.decoder, voice.tokenizer, rest, state, self._sampler, stop))

    def undo(self) -> Turn:
        """Take the last turn back, with its message and answer. UserError if there is none whose state is kept."""
        if not self.turns:
            raise UserError("there is no turn to take back")
        turn = self.turns[-1]
        if not turn.kept:
            raise UserError(
                "the state before this turn is not kept: the turn was loaded, or more than --undo "
                f"{self.undo_limit} turns came after; /reset begins anew"
            )
        self.state = on_device(turn.before, self.voice.device)
        self.turns.pop()
        return turn

    def reset(self) -> None:
        self.turns, self.state, self._file = [], None, None

    def save(self, path: Path) -> None:
        """Write state and turns, whole or not at all. UserError where there is any other file than its own."""
        if self.state is None:
            raise UserError("there is nothing to save: no message was answered yet")
        metadata = {
            "format": FORMAT,
            "voice": self.voice.fingerprint,
            "system": self.system,
            "turns": [{"message": turn.message, "answer": turn.answer} for turn in self.turns],
        }
        own = self._file is not None and path.resolve() == self._file
        if path.exists() and not (own and _is_ours(path)):
            what = "is another conversation" if _is_ours(path) else "is no conversation"
            raise UserError(f"{path} exists and {what}: it is kept, give another name")
        with atomic_path(path, overwrite=own) as temporary:
            checkpoints.save_tensors(temporary, _tensors(self.state), metadata)
        self._file = path.resolve()

    def load(self, path: Path) -> None:
        """Go on with what `save` wrote. UserError, and nothing changed, unless it is of this very model."""
        if path.exists() and not _is_ours(path):
            raise UserError(f"{path} is not a conversation that /save wrote")
        tensors = checkpoints.read_state(path)
        turns, system = self._read_metadata(path)
        # Checked against a state of this model, as it is after one token.
        like = self.voice.decoder.read([self.voice.tokenizer.eod])[1]
        checkpoints.match_keys(_tensors(like), tensors, path)
        state = [
            LayerState(*(tensors[f"blocks.{layer}.{name}"].clone() for name in LayerState._fields))
            for layer in range(len(like))
        ]
        self.state = on_device(state, self.voice.device)
        self.turns, self.system, self._file = turns, system, path.resolve()

    def _read_metadata(self, path: Path) -> tuple[list[Turn], str]:
        text = checkpoints.read_record(path, checkpoints.METADATA_RECORD)
        try:
            metadata: Any = json.loads(text or "{}")
            turns = [Turn(turn["message"], turn["answer"]) for turn in metadata["turns"]]
            system, voice = metadata["system"], metadata["voice"]
        except (AttributeError, KeyError, TypeError, *JSON_ERRORS) as error:
            raise UserError(f"{path}: what it says about its conversation is damaged ({error!r})") from None
        if not all(isinstance(text, str) for turn in turns for text in (turn.message, turn.answer, system)):
            raise UserError(f"{path}: what it says about its conversation is damaged (a text is none)")
        if voice != self.voice.fingerprint:
            raise UserError(
                f"{path} is a conversation with another model, adapter, --quant, --tokenizer or --template: give the "
                "ones that it was saved with"
            )
        return turns, system


class Reply:
    """An answer on its way. Iterate over it for its text; a `with` block keeps what was written, however it ends."""

    def __init__(self, session: Session, message: str, answer: Answer):
        self._session, self.message, self._answer = session, message, answer
        self._before = session.state

    def __iter__(self) -> Iterator[str]:
        return self._answer

    def __next__(self) -> str:
        return next(self._answer)

    @property
    def text(self) -> str:
        return self._answer.text

    @property
    def tokens(self) -> int:
        return self._answer.tokens

    @property
    def ended(self) -> str | None:
        """Why it ended, as `stream.Answer` says; None while it goes on."""
        return self._answer.ended

    def keep(self) -> bool:
        """End it, and make it a turn of the conversation. False if the message was not read to its end."""
        session, answer = self._session, self._answer
        answer.close()
        if answer.ended == "unread":
            return False
        session.state = answer.state
        limit = session.undo_limit
        if limit:
            session.turns.append(Turn(self.message, answer.text, on_device(self._before, "cpu"), True))
        else:
            session.turns.append(Turn(self.message, answer.text))
        forgotten = len(session.turns) - 1 - limit
        if forgotten >= 0:
            session.turns[forgotten] = replace(session.turns[forgotten], before=None, kept=False)
        return True


def _tensors(state: State) -> dict[str, Tensor]:
    """A state under the keys that it has in a file."""
    return {
        f"blocks.{layer}.{name}": part for layer, parts in enumerate(state) for name, part in parts._asdict().items()
    }


def _is_ours(path: Path) -> bool:
    """Whether a file is a conversation, and not a model, for instance."""
    try:
        metadata = json.loads(checkpoints.read_record(path, checkpoints.METADATA_RECORD) or "{}")
    except (OSError, *JSON_ERRORS):  # a UserError is a ValueError
        return False
    return isinstance(metadata, dict) and metadata.get("format") == FORMAT


def on_device(state: State | None, device: str) -> State | None:
    """The same state on another device. States are never changed, so it need not be a copy."""
    if state is None:
        return None
    return [LayerState(*(part.to(device) for part in layer)) for layer in state]
