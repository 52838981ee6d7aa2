"""What one value of a row is: a text; or a number or a truth value, which is read as it is written."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from rwkv_bone.errors import UserError


class Written(float):
    """A number with a point or an exponent; as text it is what the file says: 1.10 is not 1.1."""

    def __new__(cls, text: str) -> Written:
        number = super().__new__(cls, text)
        number.text = str(text)
        return number

    text: str

    def __str__(self) -> str:
        return self.text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands twice in one object")
    return found


# What sources of JSON parse with. Whole numbers are written in one way only.
DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=Written)


def parse_json(text: str) -> Any:
    """json.loads with numbers as they are written; ValueError also for a key that stands twice in one object."""
    return DECODER.decode(text)


def json_type(value: Any) -> str:
    """What a value is in the words of JSON, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return "not a number (NaN)" if _is_nan(value) else "a number"
    return names.get(type(value), f"a {type(value).__name__}")


def _is_nan(value: float | Decimal) -> bool:
    # Whole numbers may be beyond every float.
    return not isinstance(value, int) and math.isnan(value)


def check_whole(value: Any, what: str) -> None:
    """UserError if a text within a value of JSON, such as a tool, has half of a surrogate pair. what: its name."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} has half of a surrogate pair") from error


def text_of(value: Any, what: str, place: str = "") -> str:
    """The text of a text, a number or a truth value; what: its name, and place: where it is, for the UserError.

    Numbers are as the file writes them. Columns of numbers (Parquet, Arrow) hold values, not characters: these become
    the shortest characters that are read back as the value, with ".0" after a whole one that is no integer.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | Decimal) and not _is_nan(value):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{what} is {json_type(value)}, expected a string{place}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} has half of a surrogate pair at character {error.start}{place}") from error
    return value
