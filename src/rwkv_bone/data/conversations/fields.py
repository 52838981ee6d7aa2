"""The fields of one row by name, and which of them were not read.

A name is that of a field, or a dotted path into objects and lists, such as `answers.text.0`. A field whose own name
has the dot, or the plus of `joined`, comes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rwkv_bone.data.conversations.values import json_type, text_of
from rwkv_bone.errors import UserError

JOINED_BY = "\n"


class Fields:
    """A row while it is read. Errors begin with `where` and advise `flag`, the setting that names fields."""

    def __init__(self, row: Mapping[str, Any], where: str, flag: str):
        self.row, self.where, self.flag = row, where, flag
        self._read: set[tuple[str, ...]] = set()
        self._lower = {key.lower(): [key] for key in row}
        if len(self._lower) < len(row):
            self._lower = {name: [key for key in row if key.lower() == name] for name in self._lower}
        self.missing: list[str] = []  # see `text`

    def usual(self, names: tuple[str, ...]) -> list[str]:
        """The fields of the row with these usual names, which are lower case, in any case; in the order of `names`."""
        if self._lower.keys().isdisjoint(names):
            return []
        return [key for name in names for key in self._lower.get(name, ()) if (key,) not in self._read]

    def get(self, name: str) -> Any:
        """The value of a field, which counts as read. UserError if there is none."""
        steps, value = find(self.row, name) or (None, None)
        if steps is None:
            found = ", ".join(map(str, self.row)) or "none"
            raise UserError(f"{self.where}: no field {name!r}; found: {found}. Name the fields with {self.flag}")
        self._read.add(steps)
        return value

    def text(self, name: str) -> str:
        """The text of a field, or of several, `a+b`, with a line break between those that are not empty.

        Of several all but one may be missing or null; `missing` names these. UserError if it is no text.
        """
        names = parts(self.row, name)
        if len(names) == 1:
            return self._text_of(name)
        there = [part for part in names if (found := find(self.row, part)) and found[1] is not None]
        self.missing += [part for part in names if part not in there]
        return JOINED_BY.join(filter(str.strip, map(self._text_of, there or names[:1])))

    def filled(self, name: str) -> str:
        text = self.text(name)
        if not text.strip():
            raise UserError(f"{self.where}: field {name!r} is empty: fill it or remove the row")
        return text

    def optional(self, *names: str) -> str:
        """The text of the first of these usual names that is not null or empty."""
        full = [key for key in self.usual(names) if self.row[key] not in (None, "", [], {})]
        return next((text for key in full if (text := self.text(key)).strip()), "")

    def optional_text(self, *names: str) -> str:
        """The first of these usual names that is a text and not empty. Another thing there is another kind of field."""
        full = [key for key in self.usual(names) if isinstance(self.row[key], str) and self.row[key].strip()]
        return self.text(full[0]) if full else ""

    def unread(self) -> Iterator[str]:
        """The names of the fields that say something and were not read, inside of objects too."""
        return _unread(self.row, self._read, "")

    def _text_of(self, name: str) -> str:
        value = self.get(name)
        if isinstance(value, dict | list) and value:
            inside = next(iter(value)) if isinstance(value, dict) else 0
            raise UserError(
                f"{self.where}: field {name!r} is {json_type(value)}, expected a string: name one inside it with "
                f"{self.flag}, such as {name}.{inside}"
            )
        return value if isinstance(value, str) and value.isascii() else text_of(value, f"{self.where}: field {name!r}")


def parts(row: Mapping[str, Any], name: str) -> list[str]:
    """The names in `a+b`; only itself where the row has a field of that name."""
    if name in row or "+" not in name:
        return [name]
    names = name.split("+")
    return names if all(names) else [name]


def find(row: Mapping[str, Any], name: str) -> tuple[tuple[str, ...], Any] | None:
    """(the steps to a field, its value), or None. A field called `a.b` comes before the field `b` of `a`."""
    if name in row:
        return (name,), row[name]
    for dot in (at for at in range(len(name) - 1, 0, -1) if name[at] == "."):
        head, rest = name[:dot], name[dot + 1 :]
        inner = row.get(head)
        if isinstance(inner, list):
            inner = {str(i): value for i, value in enumerate(inner)}
        if isinstance(inner, Mapping) and (found := find(inner, rest)):
            return (head, *found[0]), found[1]
    return None


def says(value: Any) -> bool:
    """Whether a value holds text, or may: a text, a list or an object that is not empty."""
    return isinstance(value, str | list | dict) and bool(value.strip() if isinstance(value, str) else value)


def _unread(row: Mapping[str, Any], read: set[tuple[str, ...]], before: str) -> Iterator[str]:
    for key, value in row.items():
        if (key,) in read or not says(value):
            continue
        inside = {steps[1:] for steps in read if steps[0] == key} if isinstance(value, dict | list) else set()
        if inside and isinstance(value, list):
            value = {str(i): item for i, item in enumerate(value)}
        if inside:
            yield from _unread(value, inside, f"{before}{key}.")
        else:
            yield f"{before}{key}"
