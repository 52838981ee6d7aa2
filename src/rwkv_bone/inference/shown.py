"""What of an answer is shown, and as what: thinking, or the answer itself."""

from __future__ import annotations

from rwkv_bone.data.conversations.thinking import BEGIN, END

THOUGHT, ANSWER = "thinking", "answer"
Piece = tuple[str, str]  # (THOUGHT or ANSWER, text)


class Shown:
    """Takes an answer apart while it is written: `add` gives what is certain of it.

    opening: what the template writes before an answer, which may open a think block (g1-think) or an empty one (g1).
    strips: white space around the answer belongs to the template.
    """

    def __init__(self, opening: str = "", strips: bool = True):
        self._strips = strips
        self._text = ""  # not given yet
        self._thinks = opening.rfind(BEGIN[:-1]) > opening.rfind(END[:-1])
        # Templates for G1 stop before the ">" of a tag, which the model writes.
        self._open_tag = opening.endswith((BEGIN[:-1], END[:-1]))
        self._begins = True  # nothing but white space of this part was seen

    def add(self, text: str) -> list[Piece]:
        self._text += text
        return self._take(final=False)

    def end(self) -> list[Piece]:
        """What was held back."""
        return self._take(final=True)

    def _take(self, final: bool) -> list[Piece]:
        found: list[Piece] = []
        if self._open_tag and self._text:
            self._text, self._open_tag = self._text.removeprefix(">"), False
        while self._text:
            before = self._text
            if self._thinks:
                found += self._thinking(final)
            else:
                found += self._answer(final)
            if self._text == before:
                break
        return [(kind, text) for kind, text in found if text]

    def _thinking(self, final: bool) -> list[Piece]:
        inside, end, rest = self._text.partition(END)
        if end:
            found = [(THOUGHT, self._stripped(inside))]
            self._text, self._thinks, self._begins = rest, False, True
            return found
        held = 0 if final else _beginning_of(END, self._text)
        given, self._text = self._text[: len(self._text) - held], self._text[len(self._text) - held :]
        return [(THOUGHT, self._stripped(given))]

    def _answer(self, final: bool) -> list[Piece]:
        if not self._begins:
            given, self._text = self._text, ""
            return [(ANSWER, given)]
        body = self._text.lstrip()
        if body.startswith(BEGIN):
            self._text, self._thinks = body.removeprefix(BEGIN), True
            return []
        if not final and BEGIN.startswith(body):
            return []
        given, self._text = self._text, ""
        return [(ANSWER, self._stripped(given))]

    def _stripped(self, text: str) -> str:
        """Without the white space that the part begins with."""
        if self._begins:
            text = text.lstrip() if self._strips or self._thinks else text
            self._begins = not text.strip()
        return text


def taken_apart(text: str, opening: str = "", strips: bool = True) -> tuple[str, str]:
    """(thinking, answer) of a whole answer."""
    shown = Shown(opening, strips)
    parts = {THOUGHT: "", ANSWER: ""}
    for kind, piece in [*shown.add(text), *shown.end()]:
        parts[kind] += piece
    answer = parts[ANSWER].rstrip() if strips else parts[ANSWER]
    return parts[THOUGHT].strip(), answer


def _beginning_of(tag: str, text: str) -> int:
    """How many characters at the end of a text may be the beginning of a tag."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-n:])), 0)
