"""Where data comes from: one class per format. A file's content, and sometimes its name, tells the format.

    rows      JSON lines, a JSON list, CSV, Parquet, Arrow, a folder of the `datasets` library, here or on the Hub
    a text    UTF-8 or UTF-16: the whole file is one document
    tokens    ids made beforehand: a .bin/.idx pair, a NumPy array, a bare array of uint16

Rows and texts are streamed, tokens are memory-mapped: no file is ever in memory as a whole. The UserError for a row
that cannot be used begins with the row's place, the one for a file with its path.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from rwkv_bone.data.binidx import find_pair, part_of, read_pair
from rwkv_bone.data.conversation import json_type
from rwkv_bone.errors import UserError

LIMIT = 1 << 26  # bytes of one row (64 MB): more is a file of another format, or one without line ends
HEAD = 1 << 16  # bytes looked at to find the format
CHUNK = 1 << 20
TABLE_ROWS = 1000  # rows of a table converted at a time
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
TEXT_ENDINGS = (".txt", ".text", ".md")
FORMATS = "JSON lines, a JSON list, CSV, Parquet, Arrow, text (.txt), .npy, a .bin/.idx pair or a datasets folder"


@dataclass(frozen=True)
class Places:
    """Where a row is, for the user, by its number: `places(17)` is "mine.jsonl:17", or "rows.parquet row 17".

    A row of a source of several files has the file's index above its own number's FILE_BITS bits.
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

    `places(number)` says where a row is; `notes` are lines for the user about what was read, and what was not.
    """

    kind: str  # for the user, such as "JSON lines"
    unit = " row "  # between the path and a row's number; ":" where that is a line number

    def __init__(self, path: Path):
        self.path = path
        self.notes: list[str] = []

    @property
    def places(self) -> Places:
        return Places((f"{self.path}{self.unit}",))

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


class JsonLines(Rows):
    kind, unit = "JSON lines", ":"

    def items(self) -> Iterator[tuple[int, Any, int]]:
        number = 0
        with opened(self.path) as file:
            for number, line in _lines(file):
                if line is None:
                    yield number, UserError(f"{self.places(number)}: longer than {LIMIT >> 20} MB"), LIMIT
                elif line.strip():
                    yield number, (line, number == 1), len(line)

    @staticmethod
    def parse(raw: tuple[bytes, bool], where: str) -> dict:
        line, first = raw
        try:
            # Some editors on Windows begin a file with a byte order mark.
            text = line.decode("utf-8-sig" if first else "utf-8")
        except UnicodeDecodeError as error:
            found = f"byte 0x{line[error.start]:02x} at {error.start}"
            raise UserError(f"{where}: not UTF-8 ({found}): save the file as UTF-8") from error
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}); expected one JSON object per line") from error
        return Rows.parse(row, where)


class JsonList(Rows):
    """One JSON list of objects, of which one is in memory at a time."""

    kind = "JSON list"

    def items(self) -> Iterator[tuple[int, Any, int]]:
        with opened(self.path) as file:
            reader = _JsonReader(self.path, file)
            reader.expect("[")
            number = 0
            while reader.peek() != "]":
                if number:
                    reader.expect(",")
                number += 1
                value, size = reader.value(number)
                yield number, value, size
            reader.expect("]")
            if reader.peek():
                raise reader.problem("something follows the list")


class _JsonReader:
    """Values of a JSON text, read from a file piece by piece."""

    def __init__(self, path: Path, file: IO[bytes] | gzip.GzipFile):
        self._path, self._file = path, file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def problem(self, what: str) -> UserError:
        line = self._line + self._text.count("\n", 0, self._at)
        return UserError(f"{self._path}:{line}: not valid JSON: {what}; expected a list of objects, [{{...}}, {{...}}]")

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
                value, end = self._parse(self._text, self._at)
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
            if len(self._text) - self._at > LIMIT:
                raise self.problem(f"row {number}: {problem}, or longer than {LIMIT >> 20} MB")
            self._read()

    def _read(self) -> None:
        """Double the text that is not parsed yet, so that even a long value is tried only a few times."""
        data = self._file.read(max(CHUNK, len(self._text) - self._at))
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :], 0
        self._ended = not data
        try:
            self._text += self._decode(data, not data)
        except UnicodeDecodeError as error:
            before = error.object[: error.start]
            line = self._line + self._text.count("\n") + before.count(b"\n")
            found = f"byte 0x{error.object[error.start]:02x}"
            raise UserError(f"{self._path}:{line}: not UTF-8 ({found}): save the file as UTF-8") from error


class Csv(Rows):
    """Comma, semicolon or tab separated, with a header; every value is text. Rows are numbered by their last line."""

    kind, unit = "CSV", ":"

    def items(self) -> Iterator[tuple[int, Any, int]]:
        csv.field_size_limit(LIMIT)
        with opened(self.path) as file:
            lines = _lines(file)
            header_line = next(lines, (1, b""))[1] or b""
            delimiter = max(",;\t", key=header_line.decode("utf-8", errors="replace").count)
            reader = csv.reader(self._texts(header_line, lines), delimiter=delimiter, strict=True)
            header = None
            while True:
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    problem = UserError(f"{self.places(reader.line_num)}: not valid CSV ({error})")
                    if header is None:
                        raise problem from error
                    yield reader.line_num, problem, 0
                    continue
                if cells is None:
                    return
                if header is None:
                    header = self._header(cells)
                elif cells:
                    yield reader.line_num, (header, cells), sum(map(len, cells)) + len(cells)

    def _texts(self, header_line: bytes, lines: Iterable[tuple[int, bytes | None]]) -> Iterator[str]:
        yield header_line.decode("utf-8-sig", errors="surrogateescape")
        for number, line in lines:
            if line is None:
                raise UserError(f"{self.places(number)}: longer than {LIMIT >> 20} MB")
            yield line.decode("utf-8", errors="surrogateescape")

    def _header(self, names: list[str]) -> list[str]:
        names = [name.strip() for name in names]
        if not all(names) or len(set(names)) < len(names):
            raise UserError(f"{self.path}:1: the first line must name the columns, each once; found: {names}"[:300])
        return names

    @staticmethod
    def parse(raw: tuple[list[str], list[str]], where: str) -> dict:
        header, cells = raw
        if len(cells) != len(header):
            raise UserError(f"{where}: {len(cells)} cells, but the header names {len(header)} columns")
        try:
            "".join(cells).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: not UTF-8: save the file as UTF-8") from error
        return dict(zip(header, cells, strict=True))


class Table(Rows):
    """A Parquet or Arrow file, read by pyarrow."""

    def __init__(self, path: Path, kind: str):
        super().__init__(path)
        self.kind = kind

    def _batches(self) -> Iterator:
        try:
            # pyarrow carries no types.
            import pyarrow  # type: ignore[import-untyped]
            from pyarrow import ipc, parquet
        except ImportError as error:
            raise UserError(f"{self.path}: {self.kind} needs a package: pip install pyarrow") from error
        try:
            if self.kind == "Parquet":
                yield from parquet.ParquetFile(self.path).iter_batches(TABLE_ROWS)
                return
            with pyarrow.memory_map(str(self.path)) as file:
                if self.kind == "Arrow":
                    reader = ipc.open_file(file)
                    yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
                else:
                    yield from ipc.open_stream(file)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"{self.path}: cannot be read as {self.kind}: truncated or damaged ({reason})") from error

    def items(self) -> Iterator[tuple[int, Any, int]]:
        number = 0
        for batch in self._batches():
            for start in range(0, len(batch), TABLE_ROWS):
                part = batch.slice(start, TABLE_ROWS)
                try:
                    rows = part.to_pylist()
                except ValueError as error:  # text that is not UTF-8
                    message = f"{self.path}: rows {number + 1} to {number + len(part)}: {error}"
                    raise UserError(message) from error
                for row in rows:
                    number += 1
                    yield number, row, part.nbytes // len(part)

    def __len__(self) -> int:
        return sum(len(batch) for batch in self._batches())


class HfRows(Rows):
    """A split of a dataset of the `datasets` library, in a folder; `name` is what the user calls it."""

    def __init__(self, name: str, split: str, cache_dir: str, held_out: bool, folder: str = ""):
        super().__init__(Path(name))
        self._folder = Path(folder or name)
        self._dataset, self.split = _load_hf(name, str(self._folder), split, cache_dir, held_out)
        self.kind = f"datasets, split {self.split}"

    @property
    def files(self) -> list[Path]:
        if self._folder.is_dir():
            return sorted(path for path in self._folder.rglob("*") if path.is_file())
        return [Path(file["filename"]) for file in self._dataset.cache_files]

    def items(self) -> Iterator[tuple[int, Any, int]]:
        size = (self._dataset.data.nbytes or 0) // max(len(self._dataset), 1)
        number = 0
        for batch in self._dataset.iter(TABLE_ROWS):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield number, dict(zip(batch, values, strict=True)), size

    def __len__(self) -> int:
        return len(self._dataset)


def _load_hf(name: str, source: str, split: str, cache_dir: str, held_out: bool) -> tuple[Any, str]:
    """(Dataset, name of its split). Held-out data prefers the splits made for it."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name}: datasets folders and hub ids need a package: pip install datasets") from error
    folder = Path(source)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(source)
            if isinstance(found, datasets.Dataset):
                return found, split or "all"
        else:
            found = datasets.load_dataset(source, cache_dir=f"{cache_dir}/datasets" if cache_dir else None)
    except Exception as error:  # the library raises whatever its readers and its network client do
        reason = str(error).split("\n")[0]
        raise UserError(f"{name}: the datasets library cannot read it ({type(error).__name__}: {reason})") from error
    order = ("test", "validation", "train") if held_out else ("train",)
    chosen = split or next((usual for usual in order if usual in found), None) or next(iter(found))
    if chosen not in found:
        raise UserError(f"--sft_split {split}: {name} has the splits {', '.join(found)}")
    return found[chosen], chosen


class Text:
    """A text file, which is one document."""

    def __init__(self, path: Path):
        self.path, self.paths = path, [path]
        self.notes: list[str] = []
        with opened(path) as file:
            self.encoding = _text_encoding(file.read(HEAD))
        self.kind = f"{'UTF-16' if self.encoding.startswith('utf-16') else 'UTF-8'} text, one document"

    @property
    def files(self) -> list[Path]:
        return self.paths

    @property
    def places(self) -> Places:
        """Of the documents, each of which is number 1 of its file."""
        return Places(tuple(f"{path}, document " for path in self.paths))

    def pieces(self, path: Path) -> Iterator[str]:
        """The text in pieces. Each ends with a line, and the next begins with no white space: no token is cut."""
        decode = codecs.getincrementaldecoder(self.encoding)().decode
        text, line = "", 1
        with opened(path) as file:
            while True:
                data = file.read(CHUNK)
                try:
                    text += decode(data, not data)
                except UnicodeDecodeError as error:
                    line += text.count("\n") + error.object[: error.start].count(b"\n")
                    name = self.encoding.removesuffix("-sig").upper()
                    raise UserError(f"{path}: not {name}, in line {line}: save the file as UTF-8") from error
                if not data:
                    break
                end = _line_start(text)
                if end:
                    yield text[:end]
                    line += text.count("\n", 0, end)
                    text = text[end:]
                elif len(text) > LIMIT:
                    raise UserError(f"{path}:{line}: a line longer than {LIMIT >> 20} MB")
        if text:
            yield text


def _text_encoding(head: bytes) -> str:
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        if b"\0" not in head:
            return "utf-8"
    except UnicodeDecodeError:
        pass
    # Without a byte order mark: UTF-16 if the text makes sense as such.
    try:
        text = head[: len(head) // 2 * 2].decode("utf-16-le")
    except UnicodeDecodeError as error:
        text = head[: error.start].decode("utf-16-le") if error.start > len(head) - 4 else ""
    return "utf-16-le" if text and "\0" not in text and re.search(r"[\n ，。、]", text) else "utf-8"


def _line_start(text: str) -> int:
    """The last position at which a line begins with something visible; 0 if there is none but the first."""
    end = len(text) - 1
    while (end := text.rfind("\n", 0, end)) >= 0:
        if not text[end + 1].isspace():
            return end + 1
    return 0


@dataclass(frozen=True)
class Tokens:
    """Documents of token ids."""

    path: Path
    kind: str
    places: Places
    files: list[Path]
    tokens: np.ndarray  # integers [N], memory-mapped
    lengths: np.ndarray | None  # int64 [documents]; None: a document ends with each end-of-document id


def _pair(pair: Path) -> Tokens:
    tokens, lengths = read_pair(pair)
    files = [part_of(pair, ending) for ending in (".bin", ".idx")]
    return Tokens(pair, f"binidx, {tokens.dtype}", Places((f"{pair}.bin document ",)), files, tokens, lengths)


def _numpy(path: Path) -> Tokens:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises whatever its reader of headers meets
        raise UserError(f"{path}: not a NumPy array that can be mapped: truncated or damaged ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim not in (1, 2) or not array.size:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise UserError(f"{path}: expected token ids, integers [tokens] or [documents, tokens]; found {found}")
    lengths = np.full(len(array), array.shape[1]) if array.ndim == 2 else None
    rows = "a document each row" if array.ndim == 2 else "a document up to each end-of-document id"
    kind = f"NumPy array, {array.dtype}, {rows}"
    return Tokens(path, kind, Places((f"{path} document ",)), [path], array.reshape(-1), lengths)


def _uint16(path: Path) -> Tokens:
    size = path.stat().st_size
    if not size or size % 2:
        raise UserError(f"{path}: {size:,} bytes are no array of uint16 tokens")
    kind = "bare array of uint16, a document up to each end-of-document id"
    return Tokens(path, kind, Places((f"{path} document ",)), [path], np.memmap(path, dtype="<u2", mode="r"), None)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The bytes of a file, unpacked if it is gzip."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be unpacked: truncated or damaged ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _lines(file: IO[bytes] | gzip.GzipFile) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line), without the content of lines beyond LIMIT."""
    number = 0
    while line := file.readline(LIMIT + 1):
        number += 1
        too_long = len(line) > LIMIT
        while too_long and line and not line.endswith(b"\n"):
            line = file.readline(LIMIT)
        yield number, None if too_long else line


def open_source(
    name: str,
    data_type: str = "auto",
    *,
    split: str = "",
    cache_dir: str = "",
    held_out: bool = False,
    columns: tuple[str, ...] = (),
    fields: tuple[str, ...] = (),
) -> Rows | Text | Tokens:
    """The source that a path (or hub id) and --data_type name. `split` is the name before the [ of --sft_split.

    columns: names of the columns of a table without a header (--columns); () = the first line may name them.
    fields: the names in --sft_field; a first line with one of them is a header.
    """
    path = Path(name)
    pair = find_pair(path)
    if not (path.exists() or pair) and data_type in ("auto", "sft", "hf"):
        # Late, since nothing else here needs what the package of checkpoints brings along.
        from rwkv_bone.checkpoints.hub import local_data

        folder = local_data(name)
        if folder != name:
            return HfRows(name, split, cache_dir, held_out, folder)
    if data_type == "hf" or (data_type in ("auto", "sft") and path.is_dir() and pair is None):
        if path.is_file():
            raise UserError(f"{name} is a file: --data_type hf reads a folder of the datasets library, or owner/name")
        return HfRows(name, split, cache_dir, held_out)
    if data_type == "binidx" or (data_type == "auto" and pair):
        return _pair(pair or path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"{name} {found}: --data_file and --eval_data take {FORMATS}; or owner/name of a dataset on the "
            "Hugging Face Hub"
        )
    with opened(path) as file:
        head = file.read(HEAD)
    if data_type == "text":
        return Text(path)
    if data_type == "tokens":
        return _numpy(path) if head.startswith(b"\x93NUMPY") else _uint16(path)
    make = _format_of(path, head)
    if data_type in ("jsonl", "sft", "table") and make in (None, Text, _numpy):
        make = Csv if data_type == "table" else JsonLines
    if make is None:
        begins = f"it begins with {head[:20]!r}" if head else "it is empty"
        raise UserError(f"{name}: not recognised ({begins}); expected {FORMATS}, or give --data_type")
    return make(path)


def _format_of(path: Path, head: bytes) -> Callable[[Path], Rows | Text | Tokens] | None:
    if head.startswith(b"PAR1"):
        return lambda path: Table(path, "Parquet")
    if head.startswith(b"ARROW1"):
        return lambda path: Table(path, "Arrow")
    if head.startswith(b"\xff\xff\xff\xff"):
        return lambda path: Table(path, "Arrow stream")
    if head.startswith(b"\x93NUMPY"):
        return _numpy
    ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if ending in (".csv", ".tsv"):
        return Csv
    if ending in TEXT_ENDINGS:
        return JsonLines if _is_object(head.split(b"\n")[0]) else Text
    first = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first == b"[" and ending != ".jsonl":
        return JsonList
    if first == b"{" or ending in (".jsonl", ".json"):
        return JsonLines
    return None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


@dataclass(frozen=True)
class Split:
    """--sft_split: a split's name and a slice of its rows, in Hugging Face's notation: train[:1000], [5%:10%]."""

    name: str
    start: str
    stop: str

    @classmethod
    def parse(cls, text: str) -> Split:
        found = re.fullmatch(r"(?P<name>[\w.-]*)(\[(?P<start>(-?\d+%?)?):(?P<stop>(-?\d+%?)?)\])?", text.strip())
        if not found:
            raise UserError(
                f"--sft_split {text}: expected a split, a slice or both, such as train, train[:1000] or [5%:10%]"
            )
        bounds = [found["start"] or "", found["stop"] or ""]
        if any(bound.endswith("%") and not -100 <= int(bound[:-1]) <= 100 for bound in bounds):
            raise UserError(f"--sft_split {text}: percentages go from -100 to 100")
        return cls(found["name"], *bounds)

    def bounds(self, count: Callable[[], int]) -> tuple[int, int | None]:
        """(first row, end or None), from 0; `count` gives the number of rows, and is only called if it is needed."""
        if not any(bound.startswith("-") or bound.endswith("%") for bound in (self.start, self.stop)):
            return int(self.start or 0), int(self.stop) if self.stop else None
        rows = count()
        first, end = (_position(bound, rows) for bound in (self.start, self.stop))
        return first or 0, end

    def items(self, source: Rows) -> Iterator[tuple[int, Any, int]]:
        first, end = self.bounds(source.__len__)
        return islice(source.items(), first, end)


def _position(bound: str, rows: int) -> int | None:
    if not bound:
        return None
    position = round(int(bound[:-1]) * rows / 100) if bound.endswith("%") else int(bound)
    return max(position + rows, 0) if position < 0 else position
