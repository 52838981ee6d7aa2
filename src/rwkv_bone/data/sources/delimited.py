"""Tables of text: CSV, and TSV, which is cells and tabs and nothing else.

The first line names the columns, unless --columns does or that line looks like a row. What was decided is said.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rwkv_bone.data.sources import files
from rwkv_bone.data.sources.files import ending_of, lines, opened_text
from rwkv_bone.data.sources.json_rows import BY_FLAG
from rwkv_bone.data.sources.rows import FileRows, named
from rwkv_bone.errors import UserError

SAMPLE = 50  # rows looked at to find the separator, and whether the first line is one of them
SEPARATORS = ",;\t"
# A first line with one of these words, in any case, names columns.
USUAL_NAMES = frozenset(
    "text prompt response completion question answer query instruction input output context messages conversations "
    "system history tools id title label category source content target chosen rejected reasoning_content".split()
)
WITHOUT_HEADER = ("prompt", "response")  # of a table of two columns
NAME_LENGTH, NAME_WORDS = 60, 5  # more is no name of a column


class Delimited(FileRows):
    """CSV, or TSV; every value is text. Rows are numbered by their last line.

    A TSV whose first line is in quotation marks is quoted as CSV is, as R writes it; in others they are characters.
    columns: as --columns names them. fields: names that the user gave, which may stand in the first line.
    """

    unit = ":"

    def __init__(self, path: Path, name: str = "", columns: tuple[str, ...] = (), fields: Collection[str] = ()):
        super().__init__(path, name)
        with opened_text(path) as file:
            sample = list(islice(self._texts(file), SAMPLE))
        line = next((text for text in sample if text.strip()), "").rstrip("\r\n")
        self._separator = "\t" if ending_of(path) == ".tsv" else _separator(line, sample)
        first = line.split(self._separator)
        self._quoted = self._separator != "\t" or all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in first)
        self.kind = "TSV" if self._separator == "\t" else "CSV"
        rows = [cells for _, cells in self._records(sample) if cells and not isinstance(cells, UserError)]
        self._columns, self._has_header = columns, not columns
        first = [cell.strip() for cell in rows[0]] if rows else []
        if columns and (tuple(first) == columns or _are_usual(first)):
            self._has_header = True
            self.notes.append(f"{self.name}: its first line names its columns, {', '.join(first)}: --columns does not")
        elif rows and not columns and (reason := _no_header(rows, fields)):
            self._read_without_header(rows[0], reason, fields)
        self.uses_columns = not self._has_header and bool(columns)
        if self._has_header and (unnamed := [str(place) for place, cell in enumerate(first, 1) if not cell]):
            self.notes.append(f"{self.name}: column {', '.join(unnamed)} has no name and is not read")
        if not self._quoted and any(len(cell) > 1 and cell[0] == cell[-1] == '"' for row in rows for cell in row):
            self.notes.append(
                f'{self.name}: cells in quotation marks keep them, as a TSV has no quoting: "a" is three characters'
            )

    def _read_without_header(self, first: Sequence[str], reason: str, fields: Collection[str]) -> None:
        found = ", ".join(repr(cell if len(cell) <= 30 else f"{cell[:30]}...") for cell in first[:4])
        if len(first) != len(WITHOUT_HEADER) or fields:
            raise UserError(
                f"{self.name}: its first line, {found}, is no line of names: {reason}. Write one above it, or name the "
                f"columns with --columns, {len(first)} names"
            )
        self._columns, self._has_header = WITHOUT_HEADER, False
        self.notes.append(
            f"{self.name}: its first line, {found}, is read as a row, since {reason}; the columns are read as "
            f"{' and '.join(WITHOUT_HEADER)} (--columns gives them other names)"
        )

    def items(self) -> Iterator[tuple[int, Any, int]]:
        header, first, named_by = self._columns, None, BY_FLAG
        with opened_text(self.path, self._seen) as file:
            for number, cells in self._records(self._texts(file)):
                if isinstance(cells, UserError):
                    if first is None and self._has_header:
                        raise cells
                    yield number, cells, 0
                elif not cells:
                    continue
                elif first is None and self._has_header:
                    first, named_by = cells, "the header"
                    header = self._header(cells)
                elif cells == first:
                    yield number, UserError(f"{self.places(number)}: the line of the columns' names again"), 0
                else:
                    yield number, (header, cells, named_by), sum(map(len, cells)) + len(cells)

    def _records(self, texts: Iterable[str]) -> Iterator[tuple[int, list[str] | UserError]]:
        """(number of its last line, cells) of each record."""
        if not self._quoted:
            for number, text in enumerate(texts, 1):
                line = text.rstrip("\r\n")
                yield number, line.split(self._separator) if line else []
            return
        csv.field_size_limit(files.LIMIT)
        reader = csv.reader(texts, delimiter=self._separator, strict=True)
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                number = reader.line_num
                yield number, UserError(f"{self.places(number)}: not valid {self.kind} ({error})")
                continue
            if cells is None:
                return
            yield reader.line_num, cells

    def _texts(self, file: Any) -> Iterator[str]:
        for number, line in lines(file):
            if line is None:
                raise UserError(f"{self.places(number)}: longer than {files.LIMIT >> 20} MB")
            # What is not UTF-8 is found again when the row is parsed, and is a fault of that row alone.
            yield line.decode("utf-8", errors="surrogateescape")

    def _header(self, cells: list[str]) -> tuple[str, ...]:
        names = tuple(name.strip() for name in cells)
        given = [name for name in names if name]
        if not given or len(set(given)) < len(given):
            raise UserError(f"{self.name}:1: the first line must name the columns, each once; found: {cells}"[:300])
        return names

    @staticmethod
    def parse(raw: tuple[tuple[str, ...], list[str], str], where: str) -> dict:
        header, cells, named_by = raw
        try:
            "".join(cells).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: not UTF-8: save the file as UTF-8") from error
        row = named(cells, header, where, named_by)
        row.pop("", None)
        return row


def _separator(first: str, sample: list[str]) -> str:
    """That of , ; and tab which cuts every row into the same number of cells, if one does; else the first line's."""

    def cuts(separator: str) -> bool:
        try:
            widths = [len(cells) for cells in csv.reader(sample, delimiter=separator) if cells]
        except csv.Error:
            return False
        # The sample may end within a row.
        widths = widths[:-1] if len(sample) == SAMPLE else widths
        return len(set(widths)) == 1 and widths[0] > 1

    return max([s for s in SEPARATORS if cuts(s)] or SEPARATORS, key=first.count)


def _no_header(rows: list[list[str]], fields: Collection[str]) -> str:
    """Why the first of these rows is none of names; empty if it may be."""
    names = [cell.strip() for cell in rows[0]]
    if set(names) & set(fields) or _are_usual(names):
        return ""
    for place, name in enumerate(names):
        if _is_number(name):
            return f"{name} is a number"
        if len(name) > NAME_LENGTH or "\n" in name or len(name.split()) > NAME_WORDS:
            return "it has a text as long as a sentence"
        if name.endswith(("?", "!", "？", "！", "。")) or (name.endswith(".") and " " in name):
            return f"{name[-1]!r} ends a sentence in it"
        if name and any(len(row) > place and row[place].strip() == name for row in rows[1:] if row != rows[0]):
            return f"{name!r} stands in that column again"
    return ""


def _are_usual(names: list[str]) -> bool:
    return not USUAL_NAMES.isdisjoint(name.lower() for name in names)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
