"""What one value of a row is: a text; or a number or a truth value, which is read as it is written."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from rwkv_bone.errors import UserError


class Number(float):
    """A number of a JSON text that is no whole one, and the characters that it is written with: 52.0, 1.50, 1e3."""

    __slots__ = ("written",)
    written: str

    def __new__(cls, written: str | float) -> Number:
        number = super().__new__(cls, written)
        number.written = str(written)
        return number


# What sources of JSON parse with. Whole numbers are written in one way only.
DECODER = json.JSONDecoder(parse_float=Number)


def parse_json(text: str) -> Any:
    """json.loads with `Number`."""
    return json.loads(text, parse_float=Number)


def json_type(value: Any) -> str:
    """What a value is in the words of JSON, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return "not a number (NaN)" if math.isnan(value) else "a number"
    return names.get(type(value), f"a {type(value).__name__}")


def text_of(value: Any, what: str, place: str = "") -> str:
    """The text of a text, a number or a truth value; what: its name, and place: where it is, for the UserError.

    Numbers are as the file writes them. Columns of numbers (Parquet, Arrow) hold values, not characters: these become
    the shortest characters that are read back as the value, with ".0" after a whole one that is no integer.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Number):
        return value.written
    if isinstance(value, int | float | Decimal) and not math.isnan(value):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{what} is {json_type(value)}, expected a string{place}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} has half of a surrogate pair at character {error.start}{place}") from error
    return value
