"""Token ids made beforehand: a .bin/.idx pair, a NumPy array, a bare array of uint16."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_bone.data.sources.binidx import part_of, read_pair
from rwkv_bone.data.sources.rows import Places
from rwkv_bone.errors import UserError


@dataclass(frozen=True)
class Tokens:
    """Documents of token ids."""

    path: Path
    kind: str
    places: Places
    files: list[Path]
    tokens: np.ndarray  # integers [N], memory-mapped
    lengths: np.ndarray | None  # int64 [documents]; None: a document ends with each end-of-document id


def of_pair(pair: Path) -> Tokens:
    tokens, lengths = read_pair(pair)
    files = [part_of(pair, ending) for ending in (".bin", ".idx")]
    return Tokens(pair, f"binidx, {tokens.dtype}", Places((f"{pair}.bin document ",)), files, tokens, lengths)


def of_numpy(path: Path) -> Tokens:
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


def of_uint16(path: Path) -> Tokens:
    size = path.stat().st_size
    if not size or size % 2:
        raise UserError(f"{path}: {size:,} bytes are no array of uint16 tokens")
    kind = "bare array of uint16, a document up to each end-of-document id"
    return Tokens(path, kind, Places((f"{path} document ",)), [path], np.memmap(path, dtype="<u2", mode="r"), None)
