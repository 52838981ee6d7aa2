"""The think block at the beginning of a response: <think>...</think>, or what stands before a lone </think>."""

from __future__ import annotations

import re
from typing import NamedTuple

from rwkv_bone.errors import UserError

BEGIN, END = "<think>", "</think>"


class Thought(NamedTuple):
    """A response, taken apart."""

    thinking: str
    text: str  # what follows the block, without the blank lines before it
    found: bool  # whether there was a block; it may be empty
    lone: bool = False  # whether the block had no beginning: the prompt holds it


def split_thinking(text: str, where: str, place: str) -> Thought:
    """The thinking and the visible text of a response. Blocks one after another are one; a later one stays text."""
    if BEGIN not in text and END not in text:
        return Thought("", text, False)
    inside, rest, lone = [], text, False
    while rest.lstrip().startswith(BEGIN):
        block, end, rest = rest.lstrip().removeprefix(BEGIN).partition(END)
        if not end:
            raise UserError(
                f"{where}: a response begins with {BEGIN} and has no {END}{place}: finish it or remove the row"
            )
        inside.append(block)
    if not inside:
        block, end, after = text.partition(END)
        if not end or BEGIN in block:
            return Thought("", text, False)
        inside, rest, lone = [block], after, True
    thinking = "\n\n".join(filter(None, (block.replace("\r\n", "\n").strip() for block in inside)))
    # A visible text may begin with a line that is indented.
    return Thought(
        thinking, re.sub(r"\A\s*\n", "", rest) if "\n" in rest[: _blank(rest)] else rest.lstrip(), True, lone
    )


def _blank(text: str) -> int:
    """The number of blank characters that a text begins with."""
    return len(text) - len(text.lstrip())
