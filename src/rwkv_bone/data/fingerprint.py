"""A hash of the data of a run, by which a continued run recognises that its data is still the same.

It sees each sample: every id as a number (not its dtype), which of them are targets, where samples begin and end, their
order and weights, and whether windows are cut out of them. Of preference data it also sees where answers begin, which
are good, and which answers follow other prompts. It does not see what no sample has (text that is cut off), nor the
files and formats that the samples came from.

The tokens that samples cover, one after another, are cut into blocks, which threads hash at the same time. A core does
about 250 million ids a second, a third of that where samples are cut off: 20 seconds of one core for a binidx of 10 GB.
The hash of large data is kept in the cache, under the keys of the arrays, so that a run that goes on need not wait.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from rwkv_bone.data.dataset import Dataset
from rwkv_bone.data.samples import Documents
from rwkv_bone.devices import usable_cores
from rwkv_bone.errors import UserError

FORMAT = 2  # of the hash. Version 0.2.0 had one without a number, of 256 samples.
BLOCK = 1 << 21  # ids hashed at a time
REMEMBERED = 1 << 26  # ids from which on the hash is kept in the cache; fewer take less than a second
THREADS = 8


@dataclass(frozen=True)
class _Stream:
    """The tokens of one source that its samples cover, one after another: R regions without a gap in them."""

    documents: Documents
    positions: np.ndarray  # int64 [R]: of each region in the source's tokens
    begins: np.ndarray  # int64 [R + 1]: of each region in the stream, and the stream's length
    firsts: np.ndarray  # int64, ascending: places in the stream of first ids, which nothing predicts


def data_fingerprint(dataset: Dataset) -> str:
    """A short text, `2:` and 32 digits: equal for equal samples, in the same order and with the same weights."""
    table = hashlib.blake2b(f"{FORMAT} {len(dataset)} {dataset.ctx_len} {dataset.windows}\n".encode(), digest_size=16)
    streams, places, lengths, offset = [], np.zeros(0, np.int64), np.zeros(0, np.int64), 0
    order = np.zeros(0, np.int64)
    for documents, index, starts, sizes in dataset.spans():
        stream, mine = _stream(documents, starts, sizes)
        streams.append(stream)
        order, places = np.concatenate([order, index]), np.concatenate([places, mine + offset])
        lengths = np.concatenate([lengths, sizes])
        offset += int(stream.begins[-1])
    back = np.arange(len(places)) if dataset.windows else np.argsort(order)
    for column in (places[back], lengths[back]):
        table.update(np.ascontiguousarray(column, dtype="<i8").data)
    for name, values in dataset.preference_columns().items():
        table.update(name.encode())
        table.update(np.ascontiguousarray(values, dtype="<i8").data)
    if dataset.repeats is not None:
        table.update(np.ascontiguousarray(dataset.repeats, dtype="<f8").data)
    digest = hashlib.blake2b(table.digest(), digest_size=16)
    digest.update(_remembered(streams, table.hexdigest()).encode())
    return f"{FORMAT}:{digest.hexdigest()}"


def of_this_format(fingerprint: str) -> bool:
    """Whether a fingerprint was made as here, so that it is equal if the data is."""
    return fingerprint.startswith(f"{FORMAT}:")


def _stream(documents: Documents, starts: np.ndarray, lengths: np.ndarray) -> tuple[_Stream, np.ndarray]:
    """(The stream of these samples, the place in it where each begins). Samples may overlap, and come in any order."""
    by_start = np.argsort(starts, kind="stable")
    first, end = starts[by_start], (starts + lengths)[by_start]
    reached = np.maximum.accumulate(end)  # position up to which this sample and those before it cover
    before = np.concatenate([[-1], reached[:-1]])[: len(first)]
    opens = np.flatnonzero(first > before)
    positions = first[opens]
    sizes = reached[np.append(opens[1:] - 1, len(first) - 1)[: len(opens)]] - positions
    begins = np.concatenate([[0], np.cumsum(sizes)])
    region = np.cumsum(first > before) - 1
    places = np.empty(len(starts), dtype=np.int64)
    sorted_places = first - positions[region] + begins[region]
    places[by_start] = sorted_places
    return _Stream(documents, positions, begins, np.unique(sorted_places[first >= before])), places


def _remembered(streams: list[_Stream], table: str) -> str:
    """The hash of the streams; from the cache, if they are large and their arrays are there."""
    kept = [stream.documents.kept for stream in streams]
    if sum(int(stream.begins[-1]) for stream in streams) >= REMEMBERED and kept[0] is not None and all(kept):
        made_from = {"fingerprint": FORMAT, "table": table, "of": [one.keys for one in kept if one is not None]}
        with suppress(UserError):  # a folder that cannot be written any more: remembering only saves time
            return str(kept[0].cache.entry(made_from, lambda _: {"hash": _hash(streams)})[1]["hash"])
    return _hash(streams)


def _hash(streams: list[_Stream]) -> str:
    total = sum(int(stream.begins[-1]) for stream in streams)
    digest = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor(min(usable_cores(), THREADS)) as pool:
        for part in pool.map(lambda begin: _block(streams, begin, min(begin + BLOCK, total)), range(0, total, BLOCK)):
            digest.update(part)
    return digest.hexdigest()


def _block(streams: list[_Stream], begin: int, end: int) -> bytes:
    """The hash of the ids and targets from `begin` to `end` of all streams, one after another."""
    ids, targets = [], []
    for stream in streams:
        size = int(stream.begins[-1])
        low, high = max(begin, 0), min(end, size)
        if low < high:
            where = _positions(stream, low, high)
            trained = stream.documents.trained
            mask = np.ones(high - low, dtype=bool) if trained is None else np.array(trained[where])
            firsts = stream.firsts[slice(*np.searchsorted(stream.firsts, (low, high)))]
            mask[firsts - low] = False
            ids.append(stream.documents.tokens[where])
            targets.append(mask)
        begin, end = begin - size, end - size
    # Half the bytes where two hold every id of the block, whatever the dtype is in which it lies there.
    width = "<u2" if all(part.itemsize <= 2 or part.max() < 1 << 16 for part in ids) else "<u4"
    digest = hashlib.blake2b(width.encode(), digest_size=16)
    for part in ids:
        digest.update(np.ascontiguousarray(part, dtype=width).data)
    digest.update(np.packbits(np.concatenate(targets)).data)
    return digest.digest()


def _positions(stream: _Stream, low: int, high: int) -> slice | np.ndarray:
    """Where the tokens from `low` to `high` of a stream lie in its source."""
    first, last = np.searchsorted(stream.begins, low, "right") - 1, np.searchsorted(stream.begins, high, "left")
    shift = stream.positions[first:last] - stream.begins[first:last]
    if len(shift) == 1:
        return slice(low + int(shift[0]), high + int(shift[0]))
    sizes = np.diff(np.clip(stream.begins[first : last + 1], low, high))
    return np.arange(low, high) + np.repeat(shift, sizes)
