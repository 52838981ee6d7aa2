"""One setting, a field of a dataclass with its help text, and the checks that every dataclass of settings shares."""

from __future__ import annotations

from dataclasses import field, fields
from typing import TYPE_CHECKING, TypeVar

from rwkv_bone.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


def setting(default: T, text: str, choices: tuple[str, ...] | None = None) -> T:
    """A field with its default, the help text of its flag and, if only some values are allowed, these choices."""
    return field(default=default, metadata={"help": text, "choices": choices})


def check_choices(section: DataclassInstance) -> None:
    """UserError for the first setting that has a value, or a list with a value, outside its choices."""
    for spec in fields(section):
        choices = spec.metadata["choices"]
        value = getattr(section, spec.name)
        for item in value if isinstance(value, tuple) else (value,):
            if choices and item not in choices:
                raise UserError(f"--{spec.name} {item}: expected one of {', '.join(choices)}")


def check_given(section: DataclassInstance, *names: str) -> None:
    """UserError for the first of these settings that is empty, with its help text."""
    for spec in fields(section):
        if spec.name in names and not getattr(section, spec.name):
            raise UserError(f"--{spec.name} is missing: expected {spec.metadata['help']}")


def check_at_least(section: DataclassInstance, minimum: float, *names: str) -> None:
    """UserError for the first of these settings that is below `minimum`, or NaN."""
    for name in names:
        value = getattr(section, name)
        if not value >= minimum:
            raise UserError(f"--{name} {value}: expected at least {minimum}")
