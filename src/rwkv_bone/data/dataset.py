"""Samples, cut from tokenised documents, with the lengths and counts that batches are planned by.

A document is a list of ids of which some are targets; it may lie anywhere in a memory-mapped file. A sample is a
document of at most `ctx_len` predictions (`ctx_len` + 1 ids), or what --long_samples makes of a longer one.

Sizes: D documents of a source, N tokens of a source, n samples, L ids of a sample.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rwkv_bone.data.rows import Places
from rwkv_bone.data.tokenizer import END_MARK, Tokenizer, decode_marked
from rwkv_bone.errors import UserError

SCAN = 1 << 24  # tokens looked at in one go, so that a memory-mapped file is never in memory as a whole
ORIGINS_SHOWN = 3


@dataclass(frozen=True)
class Sample:
    """One sequence to train on."""

    ids: np.ndarray  # int32 [L]
    trained: np.ndarray  # bool [L]: this token is a target; False for the first, which nothing predicts
    origin: str  # such as "data.jsonl:17"


@dataclass(frozen=True)
class Documents:
    """The documents of one source, uncut. Arrays may be memory-mapped."""

    kind: str  # one line for the user
    tokens: np.ndarray  # integers [N]
    starts: np.ndarray  # int64 [D]: position of each document's first id, ascending
    lengths: np.ndarray  # int64 [D]
    trained: np.ndarray | None  # bool [N]; None: every token but the first of a document
    prompts: np.ndarray | None  # uint64 [D]: equal for equal prompts, see `prompt_hash`; None: not known yet
    places: Places
    origin_numbers: np.ndarray  # int64 [D]: line, row or document number, as `places` takes it
    notes: tuple[str, ...] = ()  # further lines for the user: what was skipped, where the cache is

    def origin(self, index: int) -> str:
        return self.places(int(self.origin_numbers[index]))


def prompt_hash(ids: np.ndarray, first_trained: int) -> int:
    """A 64-bit hash of the prompt: the ids before the first target, or all ids if there is at most one before it."""
    part = ids[:first_trained] if first_trained > 1 else ids
    return int.from_bytes(hashlib.blake2b(part.astype("<u4").tobytes(), digest_size=8).digest(), "little")


def count_trained(trained: np.ndarray | None, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Targets at positions starts + 1 to ends - 1 of each span, int64; `starts` ascending, spans possibly adjoining."""
    if trained is None or not len(starts):
        return np.maximum(ends - starts - 1, 0)
    counts = np.zeros(len(starts), dtype=np.int64)
    first = 0
    while first < len(starts):
        base = starts[first]
        last = max(first + 1, int(np.searchsorted(starts, base + SCAN)))
        sums = np.concatenate([[0], np.cumsum(trained[base : ends[first:last].max()], dtype=np.int64)])
        begin = np.minimum(starts[first:last] + 1, ends[first:last])
        counts[first:last] = sums[ends[first:last] - base] - sums[begin - base]
        first = last
    return counts


class TokenStream:
    """Several arrays, read as one: `len()`, and slices, each of which is a new array."""

    def __init__(self, pieces: Sequence[np.ndarray]):
        self._pieces = pieces
        self._ends = np.cumsum([len(piece) for piece in pieces])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(len(self))
        found = []
        while start < stop:
            number = int(np.searchsorted(self._ends, start, side="right"))
            piece, begin = self._pieces[number], start - (self._ends[number] - len(self._pieces[number]))
            found.append(piece[begin : begin + stop - start].astype(np.int64))
            start += len(found[-1])
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


class Dataset:
    """Samples with at least one target each; documents without any are left out, counted and named.

    With `windows` (--dataload get) nothing is cut: batches are windows of `tokens`, the whole stream.
    weights: one for each of `parts`, how often a pass contains its samples. UserError if no sample has a target.
    """

    def __init__(
        self,
        parts: Sequence[Documents],
        ctx_len: int,
        *,
        windows: bool = False,
        long_samples: str = "cut",
        weights: Sequence[float] | None = None,
    ):
        self.ctx_len = ctx_len
        self.windows = windows
        self._parts = tuple(parts)
        self._whole = True
        self._notes: list[str] = []
        tables = [self._samples_of(number, long_samples) for number in range(len(parts))]
        part, document, start, length, counts = (np.concatenate(column) for column in zip(*tables, strict=True))
        self._part = part  # int32 [n]: index into _parts
        self._document = document  # int64 [n]: number of the document in its part
        self._start = start  # int64 [n]: position of the first id in the part's tokens
        self.lengths = length  # int64 [n]: ids
        self.trained_counts = counts  # int64 [n]: targets
        self.repeats = None if weights is None else np.asarray(weights, dtype=np.float64)[part]
        if not len(self):
            longest = max(int(documents.lengths.max(initial=0)) for documents in parts)
            remedy = "raise --ctx_len" if longest > ctx_len + 1 else "check --loss_mask, which marks nothing"
            raise UserError(
                f"{parts[0].origin(0)} and every other sample: no token to train on within --ctx_len {ctx_len} "
                f"(longest sample: {longest:,} tokens): {remedy}"
            )

    def _samples_of(self, number: int, long_samples: str) -> tuple[np.ndarray, ...]:
        """(part, document, start, length, trained count) of the samples of one part. Notes what is cut or left out."""
        documents, limit = self._parts[number], self.ctx_len + 1
        full, starts = np.asarray(documents.lengths), np.asarray(documents.starts)
        index, lengths = np.arange(len(full)), full
        too_long = np.flatnonzero(full > limit)
        if len(too_long) and not self.windows:
            lost = int((full[too_long] - limit).sum())
            what = f"{len(too_long):,} samples longer than --ctx_len {self.ctx_len}"
            if long_samples == "cut":
                lengths = np.minimum(full, limit)
                self._notes.append(
                    f"cut at --ctx_len {self.ctx_len}: {len(too_long):,} samples, {lost:,} tokens left out"
                )
            elif long_samples == "drop":
                index = np.flatnonzero(full <= limit)
                starts, lengths = starts[index], full[index]
                self._notes.append(
                    f"dropped (--long_samples drop): {what}, {int(full[too_long].sum()):,} tokens "
                    f"({self._named(documents, too_long)})"
                )
            else:
                # Neighbouring pieces share one id, the last target of one and the first input of the next.
                pieces = np.maximum(-(-(full - 1) // self.ctx_len), 1)
                index = np.repeat(index, pieces)
                piece = np.arange(len(index)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
                starts = starts[index] + piece * self.ctx_len
                lengths = np.minimum(full[index] - piece * self.ctx_len, limit)
                became = int(pieces[too_long].sum())
                self._notes.append(f"split (--long_samples split): {what} became {became:,}")
        counts = count_trained(documents.trained, starts, starts + lengths)
        kept = np.flatnonzero(counts)
        if len(kept) < len(counts):
            empty = index[counts == 0]
            self._notes.append(
                f"left out, no token to train on within --ctx_len {self.ctx_len}: {len(empty):,} samples "
                f"({self._named(documents, empty)})"
            )
        return np.full(len(kept), number, dtype=np.int32), index[kept], starts[kept], lengths[kept], counts[kept]

    @staticmethod
    def _named(documents: Documents, index: np.ndarray) -> str:
        shown = ", ".join(documents.origin(i) for i in index[:ORIGINS_SHOWN])
        return shown + ", ..." * (len(index) > ORIGINS_SHOWN)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        documents = self._parts[self._part[index]]
        start, length = self._start[index], self.lengths[index]
        ids = np.array(documents.tokens[start : start + length], dtype=np.int32)
        trained = np.ones(length, dtype=bool)
        if documents.trained is not None:
            trained[:] = documents.trained[start : start + length]
        trained[0] = False
        return Sample(ids, trained, documents.origin(self._document[index]))

    @cached_property
    def groups(self) -> np.ndarray:
        """uint64 [n]: equal for samples of equal prompts, and for the pieces of one document."""
        groups = np.empty(len(self), dtype=np.uint64)
        for number, documents in enumerate(self._parts):
            mine = np.flatnonzero(self._part == number)
            if documents.prompts is not None:
                groups[mine] = documents.prompts[self._document[mine]]
            elif len(mine):
                groups[mine] = self._hashes(documents, self._document[mine])
        return groups

    @staticmethod
    def _hashes(documents: Documents, index: np.ndarray) -> np.ndarray:
        distinct, back = np.unique(index, return_inverse=True)
        hashes = np.empty(len(distinct), dtype=np.uint64)
        for row, document in enumerate(distinct):
            start = documents.starts[document]
            span = slice(start, start + documents.lengths[document])
            first = 0 if documents.trained is None else int(np.argmax(documents.trained[span]))
            hashes[row] = prompt_hash(documents.tokens[span], first)
        return hashes[back]

    @cached_property
    def tokens(self) -> np.ndarray | TokenStream:
        """The ids of all documents as one stream: memory-mapped if the source is, for --dataload get."""
        pieces = []
        for number, documents in enumerate(self._parts):
            chosen = slice(None) if self._whole else np.unique(self._document[self._part == number])
            starts, lengths = documents.starts[chosen], documents.lengths[chosen]
            ends = starts + lengths
            breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
            for first, last in zip([0, *breaks], [*breaks, len(starts)], strict=True):
                if last > first:
                    pieces.append(documents.tokens[starts[first] : ends[last - 1]])
        return pieces[0] if len(pieces) == 1 else TokenStream(pieces)

    def subset(self, indices: np.ndarray, *, windows: bool | None = None) -> Dataset:
        """The samples `indices`, in that order; `windows` (default: as here) says how they are read."""
        part = copy.copy(self)
        part._whole = False
        part.__dict__.pop("groups", None)
        part.__dict__.pop("tokens", None)
        for name in ("_part", "_document", "_start", "lengths", "trained_counts", "repeats"):
            column = getattr(self, name)
            setattr(part, name, None if column is None else column[indices])
        if windows is not None:
            part.windows = windows
        return part

    def pairs(self, tokenizer: Tokenizer, limit: int | None = None) -> list[tuple[str, str]]:
        """(text before the last response, that response) of the first `limit` samples that have both and are whole."""
        pairs: list[tuple[str, str]] = []
        for index in range(len(self)):
            if limit is not None and len(pairs) == limit:
                break
            sample = self[index]
            documents, document = self._parts[self._part[index]], self._document[index]
            begins = np.flatnonzero(np.diff(sample.trained.astype(np.int8)) == 1) + 1
            whole = self._start[index] == documents.starts[document] and len(sample.ids) == documents.lengths[document]
            if documents.trained is not None and whole and begins[-1] > 1:
                response = sample.ids[begins[-1] :][sample.trained[begins[-1] :]]
                prompt = decode_marked(tokenizer, sample.ids[: begins[-1]].tolist())
                pairs.append((prompt, decode_marked(tokenizer, response.tolist()).partition(END_MARK)[0]))
        return pairs

    def summary_lines(self) -> list[str]:
        """What was read and what was left out, line by line, for the user."""
        lines = [documents.kind for documents in self._parts]
        if self.windows:
            counts = f"{len(self):,} documents, {len(self.tokens):,} tokens"
            lines.append(f"{counts}, read in random windows of --ctx_len {self.ctx_len}")
        else:
            counts = f"{len(self):,} samples, {self.lengths.sum():,} tokens"
            lines.append(f"{counts}, {self.trained_counts.sum():,} of them trained; longest {self.lengths.max():,}")
        return [*lines, *self._notes, *(note for documents in self._parts for note in documents.notes)]
