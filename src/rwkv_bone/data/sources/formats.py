"""Which format a file has: its content tells, and sometimes its name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rwkv_bone.data.sources.columnar import Columnar
from rwkv_bone.data.sources.delimited import Delimited
from rwkv_bone.data.sources.files import Encoding, ending_of, head_of, is_gzip
from rwkv_bone.data.sources.json_rows import JsonLines, JsonList
from rwkv_bone.data.sources.rows import Rows
from rwkv_bone.errors import UserError

TEXT_ENDINGS = (".txt", ".text", ".md")
JSON_LINES_ENDINGS = (".jsonl", ".ndjson")
FORMATS = "JSON lines, a JSON list, CSV, TSV, Parquet, Arrow, text (.txt), .npy, a .bin/.idx pair or a folder of such"
NUMPY = b"\x93NUMPY"
COLUMNAR = {b"PAR1": "Parquet", b"ARROW1": "Arrow", b"\xff\xff\xff\xff": "Arrow stream"}
# What holds data in a form that is not read, and how to get the data out.
PACKED = {
    b"\x28\xb5\x2f\xfd": "is packed with zstd: unpack it with zstd -d",
    b"BZh": "is packed with bzip2: unpack it with bunzip2",
    b"\xfd7zXZ\0": "is packed with xz: unpack it with xz -d",
    b"PK\x03\x04": "is a zip archive, as .xlsx and .docx are: unpack it, or export it as CSV or text",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive: unpack it",
    b"version https://git-lfs.github.com/spec/": "is a pointer of Git LFS to the data: get it with git lfs pull",
}


@dataclass(frozen=True)
class Options:
    """What the user said about tables: names of columns (--columns), and of fields (--sft_field)."""

    columns: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()


Make = Callable[[Path, str], Rows]  # of a path, and what the user calls it


def format_of(path: Path, options: Options) -> Make | str | None:
    """The maker of the rows of a file; "text" or "numpy" for those; None if it is not recognised.

    UserError for a file that holds data in a form that is not read here.
    """
    head = head_of(path)
    for mark, problem in PACKED.items():
        if head.startswith(mark):
            raise UserError(f"{path} {problem}")
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive: unpack it with tar -xf")
    kind = next((kind for mark, kind in COLUMNAR.items() if head.startswith(mark)), None)
    if (kind or head.startswith(NUMPY)) and is_gzip(path):
        raise UserError(f"{path} is {kind or 'a NumPy array'} packed with gzip: unpack it with gunzip")
    if kind:
        return lambda path, name: Columnar(path, kind, name, options.fields)
    if head.startswith(NUMPY):
        return "numpy"
    ending, text = ending_of(path), _beginning(head)
    if ending in (".csv", ".tsv"):
        return partial(Delimited, columns=options.columns, fields=options.fields)
    if ending in TEXT_ENDINGS and not _is_object(text.split("\n")[0]):
        return "text"
    if text.startswith("[") and ending not in JSON_LINES_ENDINGS:
        return partial(JsonList, columns=options.columns if re.match(r"\[\s*\[", text) else ())
    if text.startswith("{") or ending in (*JSON_LINES_ENDINGS, ".json"):
        return partial(JsonLines, columns=options.columns if text.startswith("[") else ())
    return None


def _beginning(head: bytes) -> str:
    """The text that `head` begins with, without white space before it."""
    encoding = Encoding.of(head)
    return head[len(encoding.mark) :].decode(encoding.codec, "replace").lstrip()


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
