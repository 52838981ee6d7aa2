"""Where data comes from. A file's content, and sometimes its name, tells its format.

    rows      JSON lines, a JSON list, CSV, TSV, Parquet, Arrow; a folder of such, here or on the Hub
    texts     files of text, each of which is one document
    tokens    ids made beforehand: a .bin/.idx pair, a NumPy array, a bare array of uint16

Rows and texts are streamed, tokens are memory-mapped: no file is ever in memory as a whole. The UserError for a row
that cannot be used begins with the row's place, the one for a file with its path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rwkv_bone.data.sources.binidx import find_pair
from rwkv_bone.data.sources.delimited import Delimited
from rwkv_bone.data.sources.files import head_of, is_gzip
from rwkv_bone.data.sources.folders import open_folder
from rwkv_bone.data.sources.formats import FORMATS, NUMPY, Options, format_of
from rwkv_bone.data.sources.hub_cards import CardRows, has_configurations
from rwkv_bone.data.sources.json_rows import JsonLines
from rwkv_bone.data.sources.rows import Rows
from rwkv_bone.data.sources.text_files import Text
from rwkv_bone.data.sources.token_files import Tokens, of_numpy, of_pair, of_uint16
from rwkv_bone.errors import UserError

MADE_BEFOREHAND = ("binidx", "tokens")  # values of --data_type


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
    if not name.strip():
        raise UserError("the name of a file is empty: expected a file, a folder, or a name of the Hugging Face Hub")
    path, options = Path(name), Options(columns, fields)
    pair = find_pair(path)
    folder = _folder(name, path, pair, data_type)
    if folder:
        if has_configurations(folder) and data_type != "text":
            return CardRows(path, name, folder, split=split, cache_dir=cache_dir, held_out=held_out)
        return open_folder(
            path, name, folder, text=data_type == "text", split=split, held_out=held_out, options=options
        )
    if data_type == "binidx" or (data_type == "auto" and pair):
        return of_pair(pair or path)
    _check_file(name, path)
    if data_type == "text":
        return Text(path)
    if data_type == "tokens":
        if is_gzip(path):
            raise UserError(f"{name} is packed with gzip: unpack it with gunzip, since tokens are mapped into memory")
        return of_numpy(path) if head_of(path).startswith(NUMPY) else of_uint16(path)
    found = format_of(path, options)
    if data_type in ("jsonl", "sft", "table") and (found is None or isinstance(found, str)):
        if data_type == "table":
            return Delimited(path, name, columns, fields)
        return JsonLines(path, name)
    if found == "text":
        return Text(path)
    if found == "numpy":
        return of_numpy(path)
    if found is None or isinstance(found, str):
        head = head_of(path)
        begins = f"it begins with {head[:20]!r}" if head else "it is empty"
        raise UserError(f"{name}: not recognised ({begins}); expected {FORMATS}, or give --data_type")
    return found(path, name)


def _folder(name: str, path: Path, pair: Path | None, data_type: str) -> Path | None:
    """The folder of data that `name` means, here or downloaded from the Hub; None for a file."""
    if not (path.exists() or pair) and data_type in ("auto", "sft", "hf"):
        # Late, since nothing else here needs what the package of checkpoints brings along.
        from rwkv_bone.checkpoints.hub import local_data

        found = local_data(name)
        return Path(found) if found != name else None
    if path.is_dir() and data_type not in MADE_BEFOREHAND:
        if pair and data_type == "auto":
            raise UserError(
                f"{name} is a folder, and {name}.bin and .idx are a pair: give {name}.bin or --data_type hf"
            )
        return path
    if data_type == "hf" and path.is_file():
        raise UserError(f"{name} is a file: --data_type hf reads a folder, or owner/name of a dataset of the Hub")
    return None


def _check_file(name: str, path: Path) -> None:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is no ordinary file" if path.exists() else "does not exist"
        raise UserError(
            f"{name} {found}: --data_file and --eval_data take {FORMATS}; or owner/name of a dataset on the "
            "Hugging Face Hub"
        )


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
