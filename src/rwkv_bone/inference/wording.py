"""How a message becomes the text that a model reads, and where its answer ends: asked of the template of training.

A template writes a whole conversation. What it writes around the turns does not depend on what they say, so short
made-up conversations tell it: what stands before the first message, what between an answer and the next message.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from rwkv_bone.data.conversations.conversation import Conversation, Turn
from rwkv_bone.data.templates.builtin import RawTemplate, WorldTemplate
from rwkv_bone.data.templates.segments import Segment, Template
from rwkv_bone.data.tokenizer import END_MARK, Tokenizer, encode_marked
from rwkv_bone.errors import UserError

# Answers in made-up conversations: no text looks like these.
EARLIER, LATER = "\ufdd4earlier\ufdd5", "\ufdd4later\ufdd5"
PROBES = ("one", "Another.")


@dataclass(frozen=True)
class Wording:
    """A template at work in a conversation."""

    template: Template
    tokenizer: Tokenizer

    @property
    def several(self) -> bool:
        """Whether it can write several turns. One that cannot (raw) begins every message anew."""
        return not isinstance(self.template, RawTemplate)

    def first(self, message: str, system: str = "") -> str:
        """What is read for the first message. UserError where the template has no place for a system turn."""
        return self._around(self._turns(message, system), LATER)[0]

    def next(self, message: str) -> tuple[str, str]:
        """What is read for a later message: (what closes the answer before, what stands before the next answer).

        They are tokenised apart, as in training.
        """
        turns = [*self._turns(PROBES[0]), Turn("assistant", EARLIER), *self._turns(message)]
        segments = self.template.render(self._talk(turns))
        first = next(i for i, segment in enumerate(segments) if EARLIER in segment.text)
        last = next(i for i, segment in enumerate(segments) if LATER in segment.text)
        closing = segments[first].text.partition(EARLIER)[2]
        return closing, "".join(segment.text for segment in segments[first + 1 : last])

    @cached_property
    def opening(self) -> str:
        """What stands between every message and its answer, such as "\\n\\nAssistant: <think"."""
        backwards = [self.first(probe)[::-1] for probe in PROBES]
        return os.path.commonprefix(backwards)[::-1] if self.several else ""

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer, besides the end of the document.

        That is what the template writes after an answer, such as "<|im_end|>" or a blank line. A blank line counts
        alone in the templates that have none inside an answer; in others, with what the next turn begins with.
        """
        if not self.several:
            return ()
        closings = [self.next(probe) for probe in PROBES]
        closing, after = closings[0][0], os.path.commonprefix([prompt for _, prompt in closings])
        last = self._around(self._turns(PROBES[0]), LATER)[1]
        found = [text.strip() for text in (closing, last) if text.strip()]
        if not found and isinstance(self.template, WorldTemplate):
            found = [closing]
        elif not found and after.strip():
            found = [closing + after.rstrip()]
        # The end of the document is a token, which is looked for as such.
        found = [text.partition(END_MARK)[0] for text in found]
        return tuple(dict.fromkeys(text for text in found if text and self.encode(text) != [self.tokenizer.eod]))

    def encode(self, text: str) -> list[int]:
        return encode_marked(self.tokenizer, text)

    def _turns(self, message: str, system: str = "") -> list[Turn]:
        return [*([Turn("system", system)] if system else []), Turn("user", message)]

    def _talk(self, turns: list[Turn]) -> Conversation:
        return Conversation("the conversation", (*turns, Turn("assistant", LATER)))

    def _around(self, turns: list[Turn], answer: str) -> tuple[str, str]:
        """(the text before the response that holds this answer, what follows the answer in it)."""
        segments: list[Segment] = self.template.render(self._talk(turns))
        before = "".join(s.text for s in takewhile(lambda segment: answer not in segment.text, segments))
        after = next(segment.text for segment in segments if answer in segment.text).partition(answer)[2]
        return before, after

    def check_system(self, system: str) -> None:
        """UserError, with a remedy, where the template cannot write this system turn."""
        if system:
            try:
                self.first(PROBES[0], system)
            except UserError as error:
                why = f" ({error})" if self.several else ""
                raise UserError(
                    f"--template {self.template.name} cannot write a system turn: leave it out, or choose --template "
                    f"world, g1, alpaca or a file that has one{why}"
                ) from None
