"""Prompts from a file or a pipe: a text, one prompt a line, or rows as training data has them.

A row keeps its fields. It needs no response: one that it has is not read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rwkv_bone.data.conversations.conversation import Turn, conversation, layout_of
from rwkv_bone.data.conversations.layouts import MESSAGES, PAIRS
from rwkv_bone.data.conversations.turns import ROLE_KEYS, ROLES
from rwkv_bone.data.conversations.values import json_type, parse_json
from rwkv_bone.data.sources.open import Rows, Text, open_source
from rwkv_bone.errors import JSON_ERRORS, UserError

STDIN = "-"
PIECE = 1 << 16  # bytes read at a time
PLACEHOLDER = "?"  # a response, where a layout needs one


@dataclass(frozen=True)
class Prompt:
    """What a line or a row asks."""

    where: str  # for messages, such as questions.jsonl:17
    row: dict[str, Any] | None  # None: a line of text
    text: str = ""  # of such a line

    @property
    def fields(self) -> dict[str, Any]:
        return {"prompt": self.text} if self.row is None else self.row


def read_prompts(name: str, batch: int, bad: Callable[[UserError], None]) -> Iterator[list[Prompt]]:
    """Prompts, at most `batch` at a time, from a file or standard input (`-`).

    What has come through a pipe is given without waiting for more. bad: called for a row that cannot be read.
    """
    if name == STDIN:
        yield from _batches(_of_lines(_piped(), "standard input:", bad), batch)
        return
    source = open_source(name)
    if isinstance(source, Rows):
        places, parse = source.places, source.parse

        def rows() -> Iterator[Prompt | None]:
            for number, raw, _ in source.items():
                where = places(number)
                try:
                    if isinstance(raw, UserError):
                        raise raw
                    yield Prompt(where, parse(raw, where))
                except UserError as error:
                    bad(error)

        yield from _batches(rows(), batch)
    elif isinstance(source, Text) and len(source.paths) == 1:
        with open(source.paths[0], "rb") as file:
            yield from _batches(_of_lines(file, f"{name}:", bad), batch)
    else:
        raise UserError(f"--prompts {name}: {source.kind}; expected a text with one prompt a line, or rows")


def _batches(prompts: Iterator[Prompt | None], batch: int) -> Iterator[list[Prompt]]:
    """Lists of prompts; None among them says that the next one may take a while to come."""
    group: list[Prompt] = []
    for prompt in prompts:
        if prompt is not None:
            group.append(prompt)
        if group and (prompt is None or len(group) == batch):
            yield group
            group = []
    if group:
        yield group


def _piped() -> Iterator[bytes | None]:
    """The lines of standard input as they come; None where no further one is there yet."""
    rest, descriptor = b"", sys.stdin.fileno()
    while piece := os.read(descriptor, PIECE):
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
        if len(piece) < PIECE:
            yield None
    if rest:
        yield rest


def _of_lines(lines: Any, place: str, bad: Callable[[UserError], None]) -> Iterator[Prompt | None]:
    """A prompt for each line that is not blank: JSON rows if the first is an object, else texts."""
    rows: bool | None = None
    number = 0
    for line in lines:
        if line is None:
            yield None
            continue
        number += 1
        where = f"{place}{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            bad(UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1})"))
            continue
        if not text.strip():
            continue
        if rows is None:
            rows = _is_object(text)
        if not rows:
            yield Prompt(where, None, text)
            continue
        try:
            row = parse_json(text)
        except JSON_ERRORS as error:
            bad(UserError(f"{where}: not JSON ({error})"))
            continue
        if isinstance(row, dict):
            yield Prompt(where, row)
        else:
            bad(UserError(f"{where}: expected a JSON object, found {json_type(row)}"))


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except JSON_ERRORS:
        return False


def text_of(
    prompt: Prompt, template: Any, first: Callable[[str], str], sft_field: tuple[str, ...], system: str = ""
) -> tuple[str, bool]:
    """What the model reads for a prompt: as the template of training writes it; a document's text as it is.

    Second, whether there was a place for a system text: not in a document, nor beside a row's own. first: of a message
    alone. UserError, beginning with the row's place, for what cannot be read.
    """
    if prompt.row is None:
        return first(prompt.text), True
    row = _with_response(prompt.row, sft_field)
    talk = conversation(row, layout_of(row, sft_field, "auto", prompt.where), prompt.where)
    if talk.document is not None:
        return talk.document, False
    own = talk.turns[0].role == "system"
    if system and not own:
        talk = replace(talk, turns=(Turn("system", system), *talk.turns))
    return template.prompt(talk), not own


def _with_response(row: dict[str, Any], sft_field: tuple[str, ...]) -> dict[str, Any]:
    """The row with a response where it has none, since layouts are those of training data."""
    lower = {name.lower(): name for name in row}
    for name in sft_field if len(sft_field) == 1 else [lower[known] for known in MESSAGES if known in lower]:
        turns = row.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            return {**row, name: _answered(turns)}
    if len(sft_field) == 2:
        name = sft_field[1]
        return row if name in row or {"+", "."} & set(name) else {**row, name: PLACEHOLDER}
    if sft_field or "text" in lower:
        return row
    for prompts, responses in PAIRS:
        if any(name in lower for name in prompts):
            has = [lower[name] for name in responses if name in lower]
            if not has:
                return {**row, responses[0]: PLACEHOLDER}
            # An empty one is as good as none.
            return {**row, **{name: PLACEHOLDER for name in has if row[name] in (None, "")}}
    return row


def _answered(turns: list[Any]) -> list[Any]:
    """The turns up to the last question, and a response."""
    last = turns[-1]
    key = next((key for key in ROLE_KEYS if key in last), None)
    if key is None:  # user and assistant take turns
        text = "message" if "message" in last else next(iter(last), "message")
        return turns if len(turns) % 2 == 0 else [*turns, {text: PLACEHOLDER}]
    if ROLES.get(str(last[key]).lower()) == "assistant":
        return turns
    reply = {"role": "assistant", "content": PLACEHOLDER} if key == "role" else {"from": "gpt", "value": PLACEHOLDER}
    return [*turns, reply]
