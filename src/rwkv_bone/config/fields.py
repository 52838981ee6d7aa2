"""One setting, a field of a dataclass with its help text and bounds, and the checks that all such dataclasses share."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import Field, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, TypeVar

from rwkv_bone.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


class Bounds(NamedTuple):
    """The numbers that a setting may have. at_least, at_most: themselves allowed; above, below: not."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    warn_above: float | None = None  # allowed, with a warning

    def fault(self, value: float) -> str:
        """What was expected instead of the value, in words; nothing if it is within the bounds."""
        # A whole number may be beyond every float.
        if isinstance(value, float) and not math.isfinite(value):
            return "expected a finite number"
        if self.at_least is not None and value < self.at_least:
            return f"expected at least {plain(self.at_least)}"
        if self.above is not None and value <= self.above:
            return f"expected more than {plain(self.above)}"
        if self.at_most is not None and value > self.at_most:
            return f"expected at most {plain(self.at_most)}"
        if self.below is not None and value >= self.below:
            return f"expected less than {plain(self.below)}"
        return ""

    def __str__(self) -> str:
        """The bounds that are no matter of course, for --help: `1 to 65536`; nothing if there is only `at least 0`."""
        if self.above is not None:
            return f"more than {plain(self.above)}" + (f", at most {plain(self.at_most)}" if self.at_most else "")
        low = plain(self.at_least or 0)
        if self.at_most is not None:
            return f"{low} to {plain(self.at_most)}"
        if self.below is not None:
            return f"{low} to below {plain(self.below)}"
        return f"at least {low}" if self.at_least else ""


def setting(
    default: T,
    text: str,
    choices: tuple[str, ...] | None = None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    warn_above: float | None = None,
    repeats: bool = False,
    auto: int | None = None,
) -> T:
    """A field with its default, the help text of its flag and what its values may be.

    choices: the only values, or words of a list. The numbers are `Bounds`. repeats: a word of a list may occur twice.
    auto: the number that stands for the word auto, whatever the bounds; command lines and files hold the word.
    """
    bounds = Bounds(at_least, at_most, above, below, warn_above)
    metadata = {"help": text, "choices": choices, "bounds": bounds, "repeats": repeats, "auto": auto}
    return field(default=default, metadata=metadata)


def check_values(section: DataclassInstance) -> None:
    """UserError for the first setting whose value is outside its choices or bounds, or a list with a word twice."""
    for spec in fields(section):
        check_value(spec, getattr(section, spec.name))


def check_value(spec: Field[Any], value: Any) -> None:
    """`check_values` for one setting."""
    choices, words = spec.metadata["choices"], value if isinstance(value, tuple) else (value,)
    for word in words:
        if choices and word not in choices:
            expected = ", ".join(choice or "nothing" for choice in choices)
            raise UserError(f"--{spec.name} {word}: expected one of {expected}")
        if isinstance(value, tuple) and not spec.metadata["repeats"] and value.count(word) > 1:
            raise UserError(f"--{spec.name} names {word} {value.count(word)} times: name it once")
    if spec.metadata["auto"] is not None and value == spec.metadata["auto"]:
        return
    if type(value) in (int, float) and (fault := spec.metadata["bounds"].fault(value)):
        raise UserError(f"--{spec.name} {plain(value)}: {fault}")


def check_given(section: DataclassInstance, *names: str) -> None:
    """UserError for the first of these settings that is empty, with its help text."""
    for spec in fields(section):
        if spec.name in names and not getattr(section, spec.name):
            raise UserError(f"--{spec.name} is missing: expected {spec.metadata['help']}")


def doubtful(section: DataclassInstance) -> Iterator[str]:
    """A sentence on each number that is allowed and hardly meant."""
    for spec in fields(section):
        limit, value = spec.metadata["bounds"].warn_above, getattr(section, spec.name)
        if limit is not None and value > limit:
            yield f"--{spec.name} {plain(value)} is unusually large: values above {plain(limit)} hardly ever work"


def is_switch(spec: Field[Any]) -> bool:
    """Whether 0 and 1 are two of a setting's choices: they may then be written as those of a boolean."""
    return {"0", "1"} <= set(spec.metadata["choices"] or ())


def worded(spec: Field[Any], value: Any) -> Any:
    """A setting's value as files hold it: the word auto instead of the number that stands for it."""
    return "auto" if spec.metadata["auto"] is not None and value == spec.metadata["auto"] else value


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of JSON is a number that a float can hold, which its whole numbers need not be."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def plain(value: float) -> str:
    """A number as one types it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
