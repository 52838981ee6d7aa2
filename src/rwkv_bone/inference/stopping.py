"""What ends an answer, and which text and tokens of it are kept.

What cannot be shown yet is held back: a character that is not whole, and text that may be the beginning of a stop text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rwkv_bone.data.conversations import thinking
from rwkv_bone.data.tokenizer import Tokenizer

# Why an answer ended: a token of Stop.ids, a text of Stop.texts, or max_new.
END, TEXT, LENGTH = "end", "text", "length"


@dataclass(frozen=True)
class Stop:
    """What ends an answer, and is not part of it: one of these tokens, or any of these texts, over whichever tokens.

    No text counts within a think block, which the answer may begin with, or what stands before it (`opening`) may open.
    """

    ids: tuple[int, ...] = (0,)
    texts: tuple[str, ...] = ()
    opening: str = ""

    def __post_init__(self) -> None:
        if not all(self.texts):
            raise ValueError("a stop text is empty: it would end every answer")

    def find(self, answer: str, start: int = 0) -> int:
        """Where the first stop text begins in an answer, from `start` on; -1 if there is none."""
        # The last ">" of what opens or closes a block may be the model's.
        opened = self.opening.rfind(thinking.BEGIN[:-1]) > self.opening.rfind(thinking.END[:-1])
        if opened or answer.lstrip().startswith(thinking.BEGIN):
            end = answer.find(thinking.END)
            if end < 0:
                return -1
            start = max(start, end)
        return min((at for stop in self.texts if (at := answer.find(stop, start)) >= 0), default=-1)

    def held_back(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        longest = max(map(len, self.texts), default=1)
        sizes = range(min(len(text), longest - 1), 0, -1)
        return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self.texts)), 0)


class WholeText:
    """The text of tokens that come one after another, each character once it is whole.

    What it gives, joined, is `tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._before: list[int] = []  # the tokens before `_ids`: some tokenizers write the first token differently
        self._ids: list[int] = []  # since the last place where a token ended with a whole character
        self._given = 0  # characters of `_ids` that were given

    @property
    def whole(self) -> bool:
        """Whether the last token ended with a whole character."""
        return not self._ids

    def add(self, token: int) -> str:
        """What this token adds to the text, as far as it is whole."""
        self._ids.append(token)
        text = self._text()
        # What is incomplete so far is decoded as U+FFFD.
        ready = text.rstrip("\N{REPLACEMENT CHARACTER}")
        new, self._given = ready[self._given :], len(ready)
        if ready == text:
            self._before, self._ids, self._given = self._ids, [], 0
        return new

    def end(self) -> str:
        """What is left: characters that stay incomplete, as U+FFFD."""
        return self._text()[self._given :] if self._ids else ""

    def _text(self) -> str:
        return self._decode(self._before + self._ids)[len(self._decode(self._before)) :]


class _Mark(NamedTuple):
    """A place between two tokens that is also one between two characters."""

    characters: int
    tokens: int


class Writing:
    """An answer under way: tokens go in, and the text that is certain comes out.

    ids: all tokens. text: what came out. stopped: whether a stop text has ended it. sure: so many of the first tokens
    are kept whatever comes, since their text has come out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Stop):
        self.ids: list[int] = []
        self.text, self.stopped, self.sure = "", False, 0
        self._tokenizer, self._stop = tokenizer, stop
        self._characters, self._held = WholeText(tokenizer), ""
        self._marks = [_Mark(0, 0)]  # from `sure` on

    def add(self, token: int) -> str:
        """The text that is certain now, which may be none. With `stopped`, the answer has ended with it."""
        self.ids.append(token)
        self._held += self._characters.add(token)
        if self._characters.whole:
            self._marks.append(_Mark(len(self.text) + len(self._held), len(self.ids)))
        at = self._stop.find(self.text + self._held, len(self.text))
        self.stopped = at >= 0
        return self._give(at - len(self.text) if self.stopped else len(self._held) - self._stop.held_back(self._held))

    def end(self, cut: bool = False) -> str:
        """The text that was held back, where no stop text came. cut: the last character may lack its end: it goes."""
        if not cut:
            self._held += self._characters.end()
        return self._give(len(self._held))

    def kept(self) -> list[int]:
        """The tokens of exactly `text`: a token that reaches beyond it is replaced by those of its part."""
        mark = self._marks[0]
        return self.ids[: mark.tokens] + self._tokenizer.encode(self.text[mark.characters :])

    def _give(self, size: int) -> str:
        given, self._held = self._held[:size], self._held[size:]
        self.text += given
        last = max(i for i, mark in enumerate(self._marks) if mark.characters <= len(self.text))
        self._marks, self.sure = self._marks[last:], self._marks[last].tokens
        return given
