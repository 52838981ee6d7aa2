"""What was left out, changed or not used in the rows of a file: counted over all rows, and said once.

A remark is a sentence about rows or turns with a count before it: "443 turns after the last response, left out". The
fields that are not used have a remark each, `unused(name)`, and one line together.
"""

from __future__ import annotations

from collections.abc import Mapping

from rwkv_bone.console import counted

UNUSED = "field not used: "
TURNS = "[]."  # in the name of a turn's field
NAMED = 12  # fields not used that the line names
DIFFERENT = 1000  # remarks that are kept apart: rows may have any number of names


def unused(name: str) -> str:
    """The remark that a field is not used."""
    return UNUSED + name


class Remarks:
    """The remarks of many rows, added up."""

    def __init__(self, counts: Mapping[str, int] | None = None):
        self.counts: dict[str, int] = dict(counts or {})

    def add(self, found: Mapping[str, int]) -> None:
        for remark, count in found.items():
            if remark not in self.counts and len(self.counts) >= DIFFERENT:
                remark = unused("others")
            self.counts[remark] = self.counts.get(remark, 0) + count

    def lines(self) -> list[str]:
        """One line each, without the name of the file; of all fields that are not used one."""
        sentences = {remark: count for remark, count in self.counts.items() if not remark.startswith(UNUSED)}
        lines = [_of(count, *remark.split(" ", 1)) for remark, count in sentences.items()]
        counts = {name[len(UNUSED) :]: count for name, count in self.counts.items() if name.startswith(UNUSED)}
        fields = [f"{name} ({counted(count, 'turn' if TURNS in name else 'row')})" for name, count in counts.items()]
        if fields:
            more = f", and {len(fields) - NAMED:,} more" if len(fields) > NAMED else ""
            lines.append(f"fields not used: {', '.join(fields[:NAMED])}{more}")
        return lines


def _of(count: int, nouns: str, rest: str = "") -> str:
    """`443 turns after ...`, `1 turn after ...`."""
    return f"{counted(count, nouns.removesuffix('s'), nouns)} {rest}".rstrip()
