"""Rows that are JSON: one object a line, or one list of objects."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rwkv_bone.data.conversations.values import DECODER, json_type
from rwkv_bone.data.sources import files
from rwkv_bone.data.sources.files import lines, opened_text
from rwkv_bone.data.sources.rows import FileRows, Rows, named
from rwkv_bone.errors import UserError

BY_FLAG = "--columns"


class JsonRows(FileRows):
    """columns: the names of the fields of rows that are lists instead of objects."""

    def __init__(self, path: Path, name: str = "", columns: tuple[str, ...] = ()):
        super().__init__(path, name)
        self._columns, self.uses_columns = columns, bool(columns)

    @staticmethod
    def row_of(value: Any, columns: tuple[str, ...], where: str) -> dict:
        if isinstance(value, list):
            if columns:
                return named(value, columns, where, BY_FLAG)
            raise UserError(
                f'{where}: expected a JSON object such as {{"text": ...}}, found a list: name what its parts are with '
                "--columns"
            )
        if columns:
            raise UserError(f"{where}: the first row is a list, whose parts --columns names; found {json_type(value)}")
        return Rows.parse(value, where)


class JsonLines(JsonRows):
    kind, unit = "JSON lines", ":"

    def items(self) -> Iterator[tuple[int, Any, int]]:
        with opened_text(self.path, self._seen) as file:
            for number, line in lines(file):
                if line is None:
                    yield number, UserError(f"{self.places(number)}: longer than {files.LIMIT >> 20} MB"), files.LIMIT
                elif line.strip():
                    yield number, (line, self._columns), len(line)

    @staticmethod
    def parse(raw: tuple[bytes, tuple[str, ...]], where: str) -> dict:
        line, columns = raw
        try:
            # With a byte order mark where files that begin with one were joined.
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            found = f"byte 0x{line[error.start]:02x} at {error.start}"
            raise UserError(f"{where}: not UTF-8 ({found}): save the file as UTF-8") from error
        try:
            value = DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}); expected one JSON object per line") from error
        return JsonRows.row_of(value, columns, where)


class JsonList(JsonRows):
    """One JSON list of objects, of which one is in memory at a time."""

    kind = "JSON list"

    def items(self) -> Iterator[tuple[int, Any, int]]:
        with opened_text(self.path, self._seen) as file:
            reader = _JsonReader(self.name, file)
            reader.expect("[")
            number = 0
            while reader.peek() != "]":
                if number:
                    reader.expect(",")
                number += 1
                value, size = reader.value(number)
                yield number, (value, self._columns), size
            reader.expect("]")
            if reader.peek():
                raise reader.problem("something follows the list")

    @staticmethod
    def parse(raw: tuple[Any, tuple[str, ...]], where: str) -> dict:
        return JsonRows.row_of(*raw, where)


class _JsonReader:
    """Values of a JSON text, read from a file piece by piece."""

    def __init__(self, name: str, file: IO[bytes] | gzip.GzipFile):
        self._name, self._file = name, file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def problem(self, what: str) -> UserError:
        line = self._line + self._text.count("\n", 0, self._at)
        return UserError(f"{self._name}:{line}: not valid JSON: {what}; expected a list of objects, [{{...}}, {{...}}]")

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read()

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self.problem(f"expected {character!r}, found {found!r}" if found else "the file ends within the list")
        self._at += 1

    def value(self, number: int) -> tuple[Any, int]:
        """The next value and its length."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # else the value may continue, as a number can
                    size, self._at = end - self._at, end
                    return value, size
                problem = "the file ends within it"
            except json.JSONDecodeError as error:
                # Wrong, or not yet read to its end.
                problem = f"{error.msg} at character {error.pos - self._at}"
            except (ValueError, RecursionError) as error:
                raise self.problem(f"row {number}: {error}") from error
            if self._ended:
                raise self.problem(f"row {number}: {problem}")
            if len(self._text) - self._at > files.LIMIT:
                raise self.problem(f"row {number}: {problem}, or longer than {files.LIMIT >> 20} MB")
            self._read()

    def _read(self) -> None:
        """Double the text that is not parsed yet, so that even a long value is tried only a few times."""
        data = self._file.read(max(files.CHUNK, len(self._text) - self._at))
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :], 0
        self._ended = not data
        try:
            self._text += self._decode(data, not data)
        except UnicodeDecodeError as error:
            before = error.object[: error.start]
            line = self._line + self._text.count("\n") + before.count(b"\n")
            found = f"byte 0x{error.object[error.start]:02x}"
            raise UserError(f"{self._name}:{line}: not UTF-8 ({found}): save the file as UTF-8") from error
