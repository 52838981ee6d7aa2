"""JSONL: one JSON object per line, read as a stream. Whatever is wrong is reported with its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rwkv_bone.errors import UserError

# Prompt and response under the names in common use.
USUAL_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("input", "output"),
)


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of every line that is not blank."""
    number = 0
    empty = True
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    empty = False
                    yield number, _parse(line, f"{path}:{number}", first=number == 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if empty:
        raise UserError(f"{path}: no rows (the file has {number} lines, all blank); expected one JSON object per line")


def _parse(line: bytes, where: str, first: bool) -> dict:
    try:
        # Some editors on Windows begin a file with a byte order mark.
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at {error.start}"
        raise UserError(f"{where}: not UTF-8 ({found}): save the file as UTF-8") from error
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); expected one JSON object per line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object such as {{\"text\": ...}}, found {_json_type(row)}")
    return row


def _json_type(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def read_field(row: dict, name: str, where: str, *, may_be_empty: bool = False) -> str:
    """The text of one field of a row."""
    if name not in row:
        found = ", ".join(row) or "none"
        raise UserError(f"{where}: no field {name!r}; found: {found}. Name prompt and response with --sft_field")
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} is {_json_type(value)}, expected a string")
    if not value.strip() and not may_be_empty:
        raise UserError(f"{where}: field {name!r} is empty: fill it or remove the line")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {name!r} has half of a surrogate pair at character {error.start}") from error
    return value


def detect_fields(path: Path, data_type: str, sft_field: tuple[str, ...]) -> tuple[str, ...]:
    """The fields to read: ("text",), or the names of prompt and response. Taken from the first row unless given."""
    if sft_field:
        return sft_field
    if data_type == "jsonl":
        return ("text",)
    number, row = next(read_rows(path))
    candidates = [pair for pair in USUAL_PAIRS if set(pair) <= set(row)]
    if data_type == "auto" and "text" in row:
        candidates.insert(0, ("text",))
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(row) or "none"
    if not candidates:
        raise UserError(
            f"{path}:{number}: neither 'text' nor a usual pair such as prompt and response; fields found: {found}. "
            "Name prompt and response with --sft_field"
        )
    choices = " or ".join("+".join(names) for names in candidates)
    raise UserError(
        f"{path}:{number}: the fields could be {choices} (found: {found}). "
        "Choose with --sft_field PROMPT RESPONSE, or --data_type jsonl for 'text'"
    )
