"""Whether a file still holds what was written: its checksums are compared, and its parts must fit together.

A .pth file is a zip of uncompressed records with a CRC-32 each; files of torch.save have them, too. A .safetensors file
has checksums if it is one of ours (`stream.py`); those of others, and torch's old format, have none.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_bone.checkpoints.stream import CHECKSUMS, DTYPE_NAMES
from rwkv_bone.errors import JSON_ERRORS, UserError

log = logging.getLogger("rwkv_bone")

BUFFER = 1 << 22  # bytes that a thread reads at once
THREADS = min(8, os.cpu_count() or 1)
LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
# Bytes of an element in each of torch's storage classes.
ITEM_SIZES = {storage.__name__: dtype.itemsize for dtype, (storage, _) in DTYPE_NAMES.items()}
ITEM_SIZES |= {"LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1}
ITEM_SIZES |= {"BoolStorage": 1, "UntypedStorage": 1}
_verified: set[tuple[int, ...]] = set()  # the files found good in this process, in the state that they had then


class Piece(NamedTuple):
    """A run of bytes of a file, and the CRC-32 that it should have."""

    name: str
    start: int
    size: int
    checksum: int


def is_safetensors(path: Path) -> bool:
    """Whether a file is of that format: by its suffix, or by its first bytes, the length of a header in braces."""
    if path.suffix in (".safetensors", ".st"):
        return True
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < LONGEST_HEADER


def verify_file(path: Path) -> None:
    """UserError, naming the tensor, if a checksum does not match or records are not as long as their tensors.

    Each byte is read once, by several threads, and only once in a process as long as the file does not change.
    """
    status = path.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if identity in _verified:
        return
    if is_safetensors(path):
        verify_pieces(path, tensor_pieces(path))
    elif zipfile.is_zipfile(path):
        _verify_zip(path)
    _verified.add(identity)


def tensor_checksums(path: Path) -> dict[str, int]:
    """The CRC-32 of each tensor's bytes as a file of ours states it. `verify_file` says whether the bytes have it."""
    if is_safetensors(path):
        return {piece.name: piece.checksum for piece in tensor_pieces(path)}
    records = zip_records(path)
    root = _root(records)
    entries = _tensors_in(read_piece(path, records[f"{root}/data.pkl"]))
    return {key: records[f"{root}/data/{entry.record}"].checksum for key, entry in entries.items()}


def _root(records: Iterable[str]) -> str:
    """The folder that all records of a .pth file are in."""
    return next(iter(records), "").split("/")[0]


def _verify_zip(path: Path) -> None:
    records = zip_records(path)
    root = _root(records)
    index = records.pop(f"{root}/data.pkl", None)
    if index is None:
        raise damaged(path, "it has no data.pkl, which lists its tensors")
    checked = [index, *records.values()]
    if not any(record.checksum for record in checked):
        log.warning("%s was saved without checksums: damage in it cannot be found", path)
        checked = []
    verify_pieces(path, checked[:1])
    entries = _tensors_in(read_piece(path, index))
    names = {f"{root}/data/{entry.record}": key for key, entry in entries.items()}
    for key, entry in entries.items():
        record = records.get(f"{root}/data/{entry.record}")
        if record is None or record.size != entry.size:
            found = "no record" if record is None else f"a record of {record.size:,} bytes"
            raise damaged(path, f"{key} has {found}, expected {entry.size:,} bytes")
    verify_pieces(path, [record._replace(name=names.get(record.name, record.name)) for record in checked[1:]])


def zip_records(path: Path) -> dict[str, Piece]:
    """The records of a zip under their names, in its order.

    UserError unless the directory at its end agrees with the header before each record: readers differ in which they
    believe.
    """
    records: dict[str, Piece] = {}
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for info in archive.infolist():
                file.seek(info.header_offset)
                signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
                name = file.read(name_length).decode("utf-8" if info.flag_bits & 0x800 else "cp437")
                start = info.header_offset + 30 + name_length + extra_length
                if info.compress_type or info.compress_size != info.file_size or info.flag_bits & 1:
                    raise damaged(path, f"record {info.filename!r} is compressed, which no checkpoint is")
                if signature != b"PK\3\4" or name != info.orig_filename or start + info.file_size > archive.start_dir:
                    raise damaged(path, f"its directory does not agree with record {info.filename!r}")
                if name in records:
                    raise damaged(path, f"record {name!r} is there twice")
                records[name] = Piece(name, start, info.file_size, info.CRC)
    except UserError:
        raise
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        raise damaged(path, f"the directory at its end is not in order ({error})") from error
    return records


def safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], bytes]:
    """The header of a .safetensors file, and its text."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            text = file.read(min(length, LONGEST_HEADER))
        header = json.loads(text)
        if len(text) != length or not all(isinstance(entry, dict) for entry in header.values()):
            raise ValueError(f"it is {len(text):,} bytes long, {length:,} were expected")
    except (AttributeError, struct.error, *JSON_ERRORS) as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint: its header is not that of a .safetensors file ({error}); the "
            "file may be cut short, damaged or of another kind"
        ) from error
    return header, text


def tensor_pieces(path: Path) -> list[Piece]:
    """The tensors of a .safetensors file with their checksums; UserError if its header is damaged. [] without any."""
    header, text = safetensors_header(path)
    metadata = header.pop("__metadata__", {})
    sums = metadata.get(CHECKSUMS)
    if sums is None:
        for name, value in metadata.items():
            if _are_checksums(value, len(header)):
                raise damaged(path, f"the checksums in its header are called {name!r}, expected {CHECKSUMS!r}")
        return []
    if not isinstance(sums, str) or not re.fullmatch(r"[0-9a-f]{8}( [0-9a-f]{8})*", sums):
        raise damaged(path, "the checksums in its header are not in order")
    first, *others = (int(word, 16) for word in sums.split())
    blank = text.replace(sums.encode(), re.sub("[0-9a-f]", "0", sums).encode())
    if zlib.crc32(blank) != first or len(others) != len(header):
        raise damaged(
            path,
            "its header, which describes the tensors, does not have the checksum it was written with (a program that "
            f"changes the file must leave out {CHECKSUMS} of its metadata)",
        )
    data, pieces = 8 + len(text), []
    for (key, entry), checksum in zip(header.items(), others, strict=True):
        start, end = entry["data_offsets"]
        pieces.append(Piece(key, data + start, end - start, checksum))
    return pieces


def _are_checksums(text: Any, tensors: int) -> bool:
    """Whether a text is, up to a few characters, what `stream.py` writes: a checksum of 8 hexadecimal digits for the
    header and for each tensor.
    """
    if not isinstance(text, str) or len(text) != 9 * (tensors + 1) - 1:
        return False
    return sum(found in ("0123456789abcdef", " ")[i % 9 == 8] for i, found in enumerate(text)) > 0.9 * len(text)


def verify_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """UserError naming the first piece whose bytes do not have its checksum."""
    pieces = list(pieces)
    with ThreadPoolExecutor(THREADS) as pool:
        for piece, found in zip(pieces, pool.map(functools.partial(_checksum, path), pieces), strict=True):
            if found != piece.checksum:
                pool.shutdown(wait=False, cancel_futures=True)
                raise damaged(path, f"{piece.name} does not have the checksum that it was written with")


def _checksum(path: Path, piece: Piece) -> int:
    """The CRC-32 of a piece's bytes. Read and not mapped, so that a disk that fails gives an error and no signal."""
    buffer, value, left = memoryview(bytearray(min(BUFFER, piece.size))), 0, piece.size
    with open(path, "rb", buffering=0) as file:
        file.seek(piece.start)
        while left and (count := file.readinto(buffer[: min(left, BUFFER)])):
            value, left = zlib.crc32(buffer[:count], value), left - count
    return value if not left else -1


def read_piece(path: Path, piece: Piece) -> bytes:
    with open(path, "rb") as file:
        file.seek(piece.start)
        return file.read(piece.size)


def damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is damaged: {what}. It has {path.stat().st_size:,} bytes: compare that with where it came from and "
        "copy it again, or use another save"
    )


class _Entry(NamedTuple):
    """Where the values of a tensor are: the name of a record, and its size in bytes."""

    record: str
    size: int


class _IndexReader(pickle.Unpickler):
    """Reads data.pkl without running any of what it names: tensors become `_Entry`, everything else a stand-in."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return name if name.endswith("Storage") else _first

    def persistent_load(self, pid: Any) -> _Entry:
        _, storage, record, _, count = pid
        return _Entry(record, count * ITEM_SIZES[storage])


def _first(*values: Any) -> Any:
    """Stands for the function that makes a tensor, whose first argument is where its values are."""
    return values[0] if values else None


def _tensors_in(index: bytes) -> dict[str, _Entry]:
    """The tensors of a .pth file by its data.pkl, those in dictionaries in it included; {} if it is not understood."""
    try:
        top = _IndexReader(io.BytesIO(index)).load()
    except Exception:  # torch.load says what is wrong with it
        return {}
    found: dict[str, _Entry] = {}
    pending = [top]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            found |= {str(key): entry for key, entry in value.items() if isinstance(entry, _Entry)}
            pending += [inner for inner in value.values() if isinstance(inner, dict)]
    return found
