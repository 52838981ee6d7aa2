"""Files as bytes, lines and UTF-8, whatever their packing, encoding and line ends."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rwkv_bone.errors import UserError

LIMIT = 1 << 26  # bytes of one row (64 MB): more is a file of another format, or one without line ends
HEAD = 1 << 16  # bytes looked at to find the format
CHUNK = 1 << 20
# UTF-32 first: in little-endian order its mark begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
GZIP = b"\x1f\x8b"
Stamp = tuple[int, int, int]  # size, time of the last change, number of the file: another one is another content


def stamp(path: Path) -> Stamp:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return status.st_size, status.st_mtime_ns, status.st_ino


def check_unchanged(path: Path, seen: Stamp) -> None:
    """UserError if the file is another one than it was."""
    if stamp(path) != seen:
        raise UserError(f"{path} was changed while it was being read: run this again when nothing writes to it")


@contextmanager
def opened(path: Path, seen: Stamp | None = None) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The bytes of a file, unpacked if it is gzip. UserError if they are not those of the file that was `seen`."""
    try:
        seen = seen or stamp(path)
        with gzip.open(path, "rb") if is_gzip(path) else open(path, "rb") as file:
            yield file
            check_unchanged(path, seen)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be unpacked: truncated or damaged ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == GZIP


def ending_of(path: Path) -> str:
    """The ending of a file's name, in lower case and without .gz: ".jsonl" of Rows.JSONL.gz."""
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return plain.suffix.lower()


def head_of(path: Path) -> bytes:
    """The first HEAD bytes of a file, unpacked if it is gzip."""
    with opened(path) as file:
        return file.read(HEAD)


@dataclass(frozen=True)
class Encoding:
    """How the bytes of a text are to be read."""

    codec: str
    mark: bytes = b""  # the byte order mark that the file begins with

    @classmethod
    def of(cls, head: bytes) -> Encoding:
        """That of a file that begins with `head`: by its byte order mark, or by what makes sense."""
        for mark, codec in BYTE_ORDER_MARKS.items():
            if head.startswith(mark):
                return cls(codec, mark)
        if b"\0" in head or not _decodes(head, "utf-8"):
            for codec in ("utf-16-le", "utf-16-be"):
                text = _decodes(head, codec)
                if text and "\0" not in text and re.search(r'[\n\r\t ,"，。、]', text):
                    return cls(codec)
        return cls("utf-8")

    def __str__(self) -> str:
        return self.codec.removesuffix("-le").removesuffix("-be").upper()

    def decoder(self) -> codecs.IncrementalDecoder:
        return codecs.getincrementaldecoder(self.codec)()

    def problem(self, path: Path, error: UnicodeDecodeError, lines: int) -> UserError:
        """Of a file that was decoded up to the end of line `lines`, and then met `error`."""
        line = lines + 1 + error.object[: error.start].decode(self.codec, "ignore").count("\n")
        return UserError(f"{path}: not {self}, in line {line}: save the file as UTF-8")


def _decodes(head: bytes, codec: str) -> str:
    """The text of `head`, whose last character may be cut; empty if it is none."""
    try:
        return codecs.getincrementaldecoder(codec)().decode(head)
    except UnicodeDecodeError:
        return ""


@contextmanager
def opened_text(path: Path, seen: Stamp | None = None) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The text of a file as UTF-8 without a byte order mark. A lone carriage return ends a line if no line feed does.

    Bytes that are not UTF-8 are left to the reader; what is not valid in another encoding is a UserError.
    """
    with opened(path, seen) as file:
        head = file.read(HEAD)
        encoding, text = Encoding.of(head), head
        if encoding.codec != "utf-8":
            text = _decodes(head, encoding.codec).encode()
        returns = b"\r" in text[:-1] and b"\n" not in text
        file.seek(len(encoding.mark))
        if encoding.codec == "utf-8" and not returns:
            yield file
        else:
            yield io.BufferedReader(_AsUtf8(path, file, encoding, returns), CHUNK)


class _AsUtf8(io.RawIOBase):
    """A file of another encoding, or with other line ends, read as UTF-8 with line feeds."""

    def __init__(self, path: Path, file: IO[bytes] | gzip.GzipFile, encoding: Encoding, returns: bool):
        self._path, self._file, self._encoding, self._returns = path, file, encoding, returns
        self._decode = None if encoding.codec == "utf-8" else encoding.decoder().decode
        self._rest, self._lines = b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            data = self._file.read(CHUNK)
            self._rest = self._translated(data)
            if not data:
                break
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def _translated(self, data: bytes) -> bytes:
        if self._decode:
            try:
                data = self._decode(data, not data).encode()
            except UnicodeDecodeError as error:
                raise self._encoding.problem(self._path, error, self._lines) from error
        if self._returns:
            data = data.replace(b"\r", b"\n")
        self._lines += data.count(b"\n")
        return data


def lines(file: IO[bytes] | gzip.GzipFile) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line), without the content of lines beyond LIMIT."""
    number = 0
    while line := file.readline(LIMIT + 1):
        number += 1
        too_long = len(line) > LIMIT
        while too_long and line and not line.endswith(b"\n"):
            line = file.readline(LIMIT)
        yield number, None if too_long else line
