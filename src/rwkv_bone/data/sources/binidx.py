"""Megatron's .bin/.idx pair, as RWKV's tools write it: token ids made beforehand, memory-mapped.

The .idx file, little-endian: "MMIDIDX\\0\\0", version u64 = 1, dtype code u8, number of sequences S u64, number of
document bounds D u64, lengths i32 [S] in tokens, positions i64 [S] in bytes of the .bin file, document bounds i64 [D]
counted in sequences, from 0 to S. The .bin file is the tokens of all sequences, one after another. In RWKV's
own data each document ends with the end-of-document token, which is part of the data.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType

import numpy as np

from rwkv_bone.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are floating point: no token ids.
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def find_pair(path: Path) -> Path | None:
    """The common name (without .bin or .idx) of the pair that `path` names, or None if it names no pair."""
    if path.suffix in (".bin", ".idx"):
        return path.with_suffix("")
    if path.is_file() or not path.name:  # such as a folder's own "." or "/"
        return None
    if any(part_of(path, suffix).exists() for suffix in (".bin", ".idx")):
        return path
    return None


def part_of(pair: Path, suffix: str) -> Path:
    """The file of a pair with this ending, .bin or .idx. UserError for a path without a name, such as "."."""
    if not pair.name:
        raise UserError(f"{pair}: expected the name of a .bin/.idx pair")
    return pair.with_name(pair.name + suffix)


def read_pair(pair: Path) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of all documents, memory-mapped [N]; lengths int64 [documents])."""
    dtype, lengths, bounds = _read_index(part_of(pair, ".idx"))
    data = part_of(pair, ".bin")
    expected = int(lengths.sum()) * dtype.itemsize
    found = data.stat().st_size if data.is_file() else None
    if found is None:
        raise UserError(f"{data}: missing; a binidx pair is two files, {data.name} and {pair.name}.idx")
    if found != expected:
        state = "truncated" if found < expected else "from another pair"
        raise UserError(f"{data}: {found} bytes, but {pair.name}.idx describes {expected}: one of the two is {state}")
    if not expected:
        raise UserError(f"{pair}: the pair has no tokens")
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return np.memmap(data, dtype=dtype, mode="r"), np.diff(ends[bounds])


class PairWriter:
    """Writes a pair document by document, each one sequence. Both files appear together when the block ends well."""

    def __init__(self, pair: Path, dtype: np.dtype, overwrite: bool = False):
        self._targets = [part_of(pair, suffix) for suffix in (".bin", ".idx")]
        for target in self._targets:
            if target.exists() and not overwrite:
                raise UserError(f"{target} exists and is kept: give another name, or --overwrite")
        self._temporary = [path.with_name(f".{path.name}.{os.getpid()}.partial") for path in self._targets]
        self._dtype = np.dtype(dtype)
        self._lengths: list[np.ndarray] = []

    def __enter__(self) -> PairWriter:
        try:
            self._targets[0].parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary[0], "wb")
        except OSError as error:
            raise self._refused(error) from error
        return self

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Documents one after another: tokens [N] and their lengths [documents], which add up to N."""
        assert len(tokens) == lengths.sum()
        try:
            self._file.write(tokens.astype(self._dtype.newbyteorder("<")).tobytes())
        except OSError as error:
            raise self._refused(error) from error
        self._lengths.append(lengths.astype(np.int64))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as problem:
            raise self._refused(problem) from problem
        finally:
            self._file.close()
            for path in self._temporary:
                path.unlink(missing_ok=True)

    def _finish(self) -> None:
        lengths = np.concatenate([np.empty(0, dtype=np.int64), *self._lengths])
        if lengths.max(initial=0) > np.iinfo(np.int32).max:
            raise UserError(f"{self._targets[0]}: a document of {lengths.max():,} tokens; the format's limit is 2^31")
        header = HEADER.pack(MAGIC, 1, CODES[self._dtype], len(lengths), len(lengths) + 1)
        positions = (np.cumsum(lengths) - lengths) * self._dtype.itemsize
        bounds = np.arange(len(lengths) + 1)
        with open(self._temporary[1], "wb") as index:
            index.write(header + lengths.astype("<i4").tobytes())
            index.write(positions.astype("<i8").tobytes() + bounds.astype("<i8").tobytes())
            index.flush()
            os.fsync(index.fileno())
        self._file.flush()
        os.fsync(self._file.fileno())
        for temporary, target in zip(self._temporary, self._targets, strict=True):
            os.replace(temporary, target)

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"{self._targets[0]}: could not be written ({error.strerror or error})")


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file; a pair is a .bin and a .idx file")
    try:
        with open(path, "rb") as file:
            header, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a pair is a .bin and a .idx file") from error
    if not header.startswith(MAGIC):
        raise UserError(f"{path}: not a Megatron index (it does not begin with MMIDIDX)")
    if len(header) < HEADER.size:
        raise UserError(f"{path}: truncated: {len(header)} bytes, less than the header")
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != 1:
        raise UserError(f"{path}: version {version} of the format, expected 1")
    if code not in DTYPES:
        raise UserError(f"{path}: dtype code {code}, expected one of {', '.join(map(str, DTYPES))} (integers)")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size != expected:
        raise UserError(f"{path}: {size} bytes, but its header describes {expected}: truncated or damaged")
    content = path.read_bytes()

    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    lengths = np.frombuffer(content, "<i4", sequences, HEADER.size).astype(np.int64)
    positions = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
    bounds = np.frombuffer(content, "<i8", documents, HEADER.size + 12 * sequences)
    if (lengths < 0).any() or not np.array_equal(positions, (np.cumsum(lengths) - lengths) * dtype.itemsize):
        raise UserError(f"{path}: lengths and positions of the sequences do not fit together: damaged")
    if not documents or bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
        raise UserError(f"{path}: the document bounds do not run from 0 to {sequences}: damaged")
    return dtype, lengths, bounds
