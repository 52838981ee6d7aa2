"""The samples of a run, from one or several sources, with the lengths and counts that batches are planned by.

Sizes: n samples, L ids of a sample.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rwkv_bone.console import counted
from rwkv_bone.data.lost import check_lost
from rwkv_bone.data.samples import Documents, samples_of, uncut
from rwkv_bone.data.tokenizer import END_MARK, Tokenizer, decode_marked
from rwkv_bone.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One sequence to train on."""

    ids: np.ndarray  # int32 [L]
    trained: np.ndarray  # bool [L]: this token is a target; False for the first, which nothing predicts
    origin: str  # such as "data.jsonl:17"


def prompt_hash(ids: np.ndarray, first_trained: int) -> int:
    """A 64-bit hash of the prompt: the ids before the first target, or all ids if there is at most one before it."""
    part = ids[:first_trained] if first_trained > 1 else ids
    return int.from_bytes(hashlib.blake2b(part.astype("<u4").tobytes(), digest_size=8).digest(), "little")


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
    """Samples with at least one target each; what is cut or left out for it is counted and named.

    With `windows` (--dataload get) nothing is cut: batches are windows of `tokens`, the whole stream.
    weights: one for each of `parts`, how often a pass contains its samples. UserError if no sample has a target, or if
    more than the share `max_lost` of a part is lost.
    """

    def __init__(
        self,
        parts: Sequence[Documents],
        ctx_len: int,
        *,
        windows: bool = False,
        long_samples: str = "auto",
        max_lost: float = 0.5,
        weights: Sequence[float] | None = None,
    ):
        self.ctx_len = ctx_len
        self.windows = windows
        self._parts = tuple(parts)
        self._whole = True
        made = [uncut(documents) if windows else samples_of(documents, ctx_len, long_samples) for documents in parts]
        self._part = np.repeat(np.arange(len(made), dtype=np.int32), [len(samples.start) for samples in made])
        self._document = np.concatenate([samples.document for samples in made])  # int64 [n]: number in its part
        self._start = np.concatenate([samples.start for samples in made])  # int64 [n]: position in the part's tokens
        self.lengths = np.concatenate([samples.length for samples in made])  # int64 [n]: ids
        self.trained_counts = np.concatenate([samples.trained for samples in made])  # int64 [n]: targets
        self.repeats = None if weights is None else np.asarray(weights, dtype=np.float64)[self._part]
        self._check_some()
        self._notes: list[str] = []
        for documents, samples in zip(parts, made, strict=True):
            lost = [*documents.lost, *samples.lost]
            check_lost(documents.name, lost, max_lost)
            self._notes += [*(one.line() for one in lost), *samples.notes, *documents.notes]

    def _check_some(self) -> None:
        if len(self):
            return
        longest = max(int(documents.lengths.max(initial=0)) for documents in self._parts)
        remedy = "raise --ctx_len" if longest > self.ctx_len + 1 else "check --loss_mask, which marks nothing"
        raise UserError(
            f"{self._parts[0].origin(0)} and every other sample: no token to train on within --ctx_len {self.ctx_len} "
            f"(longest sample: {longest:,} tokens): {remedy}"
        )

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
            starts, lengths = self._documents_read(number)
            ends = starts + lengths
            breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
            for first, last in zip([0, *breaks], [*breaks, len(starts)], strict=True):
                if last > first:
                    pieces.append(documents.tokens[starts[first] : ends[last - 1]])
        return pieces[0] if len(pieces) == 1 else TokenStream(pieces)

    def subset(self, indices: np.ndarray, *, windows: bool | None = None, notes: bool = True) -> Dataset:
        """The samples `indices`, in that order; `windows` (default: as here) says how they are read.

        notes: whether it says what was lost and changed, too.
        """
        part = copy.copy(self)
        part._whole = False
        part.__dict__.pop("groups", None)
        part.__dict__.pop("tokens", None)
        for name in ("_part", "_document", "_start", "lengths", "trained_counts", "repeats"):
            column = getattr(self, name)
            setattr(part, name, None if column is None else column[indices])
        if windows is not None:
            part.windows = windows
        if not notes:
            part._notes = []
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
            counts = f"{counted(len(self), 'document')}, {len(self.tokens):,} tokens"
            lines.append(f"{counts}, read in random windows of --ctx_len {self.ctx_len}")
        else:
            counts = f"{counted(len(self), 'sample')}, {self.lengths.sum():,} tokens"
            lines.append(f"{counts}, {self.trained_counts.sum():,} of them trained; longest {self.lengths.max():,}")
        return [*lines, *self._notes]

    def note_lines(self) -> list[str]:
        """Of these lines what was changed, lost or not used, and where the tokens are kept."""
        return list(self._notes)

    def spans(self) -> list[tuple[Documents, np.ndarray, np.ndarray, np.ndarray]]:
        """(source, indices of its samples here, their starts and lengths) of each source; of windows all documents."""
        found = []
        for number, documents in enumerate(self._parts):
            if self.windows:
                starts, lengths = self._documents_read(number)
                found.append((documents, np.arange(len(starts)), starts, lengths))
            else:
                mine = np.flatnonzero(self._part == number)
                found.append((documents, mine, self._start[mine], self.lengths[mine]))
        return found

    def _documents_read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths) of the documents of a part that the stream of tokens has."""
        documents = self._parts[number]
        chosen = slice(None) if self._whole else np.unique(self._document[self._part == number])
        return documents.starts[chosen], documents.lengths[chosen]
