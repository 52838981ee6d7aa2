"""What every source of rows offers, whatever its format."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rwkv_bone.data.conversations.values import json_type
from rwkv_bone.data.sources.files import Stamp, stamp
from rwkv_bone.errors import UserError


@dataclass(frozen=True)
class Places:
    """Where a row is, for the user, by its number: `places(17)` is "mine.jsonl:17", or "rows.parquet row 17".

    The number of a row in the second and every further file of a source has the file's index in its upper bits.
    """

    prefixes: tuple[str, ...]  # one a file

    FILE_BITS: ClassVar[int] = 40

    def __call__(self, number: int) -> str:
        return f"{self.prefixes[number >> self.FILE_BITS]}{number & (1 << self.FILE_BITS) - 1}"

    @classmethod
    def number(cls, file: int, row: int) -> int:
        return (file << cls.FILE_BITS) + row


class Rows:
    """A source of rows. `items` yields (number, raw, bytes); `parse` turns `raw` into a row, in any process.

    `places(number)` says where a row is; `notes` are lines for the user about what was read, and what was not. `name`
    is what the user calls the source; UserErrors begin with it.
    """

    kind: str  # for the user, such as "JSON lines"
    uses_columns = False  # whether --columns names its fields
    unit = " row "  # between the name and a row's number; ":" where that is a line number

    def __init__(self, path: Path, name: str = ""):
        self.path, self.name = path, name or str(path)
        self.notes: list[str] = []

    @property
    def places(self) -> Places:
        return Places((f"{self.name}{self.unit}",))

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def keep(self, names: Collection[str]) -> None:
        """Read these fields from now on, and those of text; what else a table has is left unconverted."""

    def items(self) -> Iterator[tuple[int, Any, int]]:
        raise NotImplementedError

    def __len__(self) -> int:
        return sum(1 for _ in self.items())

    @staticmethod
    def parse(raw: Any, where: str) -> dict:
        if not isinstance(raw, dict):
            raise UserError(f'{where}: expected a JSON object such as {{"text": ...}}, found {json_type(raw)}')
        return raw


class FileRows(Rows):
    """The rows of one file, which is not to change while it is read."""

    def __init__(self, path: Path, name: str = ""):
        super().__init__(path, name)
        self._seen: Stamp = stamp(path)


def named(cells: list, names: tuple[str, ...], where: str, named_by: str) -> dict:
    """The row whose fields are `cells`, in the order of `names`."""
    if len(cells) != len(names):
        raise UserError(f"{where}: {len(cells)} cells, but {named_by} names {len(names)} columns")
    return dict(zip(names, cells, strict=True))
