"""The samples of a run, from one or several sources, with the lengths and counts that batches are planned by.

Of preference data a sample is a unit, which stays in one forward: a pair of answers, chosen and rejected, or one answer
with its label. It has M members, each a sequence of its own: 2 or 1.

Sizes: n samples, L ids of a sequence.
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
from rwkv_bone.data.samples import Documents, Samples, samples_of, uncut
from rwkv_bone.data.tokenizer import END_MARK, Tokenizer, decode_marked
from rwkv_bone.data.units import unit_name, units_of
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
        self.members = parts[0].members
        self.unit = unit_name(parts[0])  # what a user calls a sample
        assert all((one.members, unit_name(one)) == (self.members, self.unit) for one in parts)
        made = [_made(documents, ctx_len, windows, long_samples) for documents in parts]
        self._part = np.repeat(np.arange(len(made), dtype=np.int32), [len(samples.start) for samples in made])
        self._document = np.concatenate([samples.document for samples in made])  # int64 [n]: number in its part
        self._start = np.concatenate([samples.start for samples in made])  # int64 [n, M]: position in the part's tokens
        self._length = np.concatenate([samples.length for samples in made])  # int64 [n, M]: ids
        self.trained_counts = np.concatenate([samples.trained for samples in made])  # int64 [n]: targets
        self.repeats = None if weights is None else np.asarray(weights, dtype=np.float64)[self._part]
        self._check_some()
        # KTO: the sample, of all that were read, whose answer follows this one's prompt in `mismatched`.
        self._all: Dataset | None = None  # None: itself
        self._other = None if self.good is None else self._others()  # int64 [n]
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
            f"{self._parts[0].origin(0)} and every other {self.unit}: no token to train on within --ctx_len "
            f"{self.ctx_len} (longest sample: {longest:,} tokens): {remedy}"
        )

    def _others(self) -> np.ndarray:
        """int64 [n]: the next sample, of the first after the last, with another prompt."""
        # A prompt of one id is the beginning of every document, or none at all.
        prompts = np.where(self._prompt_lengths > 1, self.groups, np.uint64(0))
        changes = np.flatnonzero(prompts != np.roll(prompts, 1))  # where another prompt begins
        if not len(changes):
            raise UserError(
                f"{self._parts[0].name}: all of its {counted(len(self), self.unit)} have the same prompt, and --task "
                "kto measures what has changed by answers to other prompts: give rows with at least two prompts"
            )
        place = np.searchsorted(changes, np.arange(len(self)), side="right")
        return changes[place % len(changes)]

    def __len__(self) -> int:
        return len(self._length)

    def __getitem__(self, index: int) -> Sample:
        """The sample; of a pair the chosen answer."""
        return self._sequence(index, 0)

    def sequences(self, index: int) -> tuple[Sample, ...]:
        """The members of a unit: of a pair the chosen answer, then the rejected one."""
        return tuple(self._sequence(index, member) for member in range(self.members))

    def _sequence(self, index: int, member: int) -> Sample:
        documents = self._parts[self._part[index]]
        start, length = self._start[index, member], self._length[index, member]
        ids = np.array(documents.tokens[start : start + length], dtype=np.int32)
        trained = np.ones(length, dtype=bool)
        if documents.trained is not None:
            trained[:] = documents.trained[start : start + length]
        trained[0] = False
        return Sample(ids, trained, documents.origin(self._document[index]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n]: ids, of all members together."""
        return self._length[:, 0] if self.members == 1 else self._length.sum(axis=1)

    @cached_property
    def positions(self) -> np.ndarray:
        """int64 [n]: predictions of all members together, which is what a sample takes of a packed row."""
        return self.lengths - self.members

    @cached_property
    def widths(self) -> np.ndarray:
        """int64 [n]: predictions of the longest member."""
        return self._length.max(axis=1) - 1

    @cached_property
    def good(self) -> np.ndarray | None:
        """bool [n]: KTO's labels; None: there are none."""
        if any(documents.good is None for documents in self._parts):
            return None
        good = np.empty(len(self), dtype=bool)
        for number, documents in enumerate(self._parts):
            mine = self._part == number
            assert documents.good is not None
            good[mine] = documents.good[self._document[mine]]
        return good

    @cached_property
    def _prompt_lengths(self) -> np.ndarray:
        """int64 [n]: ids before the answer, without those that are cut off."""
        prompts = np.empty(len(self), dtype=np.int64)
        for number, documents in enumerate(self._parts):
            mine = self._part == number
            assert documents.answers is not None
            first = self._document[mine]
            prompts[mine] = documents.answers[first] - (self._start[mine, 0] - documents.starts[first])
        return prompts

    @cached_property
    def room(self) -> np.ndarray:
        """int64 [n]: `positions`, and of KTO as many as `mismatched` takes in its place, if these are more."""
        return self.positions if self.good is None else np.maximum(self.positions, self.mismatched_widths)

    def prompt_length(self, index: int) -> int:
        """How many ids, the same in every member of a unit, are before the answer. Only of preference data."""
        return int(self._prompt_lengths[index])

    def prompt_cut(self, index: int) -> int:
        """How many ids of the prompt, at its beginning, are cut off. Only of preference data."""
        documents = self._parts[self._part[index]]
        return int(self._start[index, 0] - documents.starts[self._document[index]])

    @property
    def answer_lengths(self) -> np.ndarray:
        """int64 [n, M]: ids of the answers. Only of preference data."""
        return self._length - self._prompt_lengths[:, None]

    def mismatched(self, index: int) -> Sample:
        """KTO: the prompt of a sample with the answer of another prompt; cut at its beginning to fit --ctx_len."""
        assert self._other is not None
        every, number = self._all or self, self._other[index]
        one, other, begin = self[index], every[number], every._prompt_lengths[number]
        answer, trained = other.ids[begin:], other.trained[begin:]
        prompt = one.ids[: self._prompt_lengths[index]]
        prompt = prompt[max(len(prompt) + len(answer) - self.ctx_len - 1, 0) :]
        trained = np.concatenate([np.zeros(len(prompt), dtype=bool), trained])
        trained[0] = False
        return Sample(np.concatenate([prompt, answer]), trained, f"{one.origin} with the answer of {other.origin}")

    @cached_property
    def mismatched_widths(self) -> np.ndarray:
        """int64 [n]: predictions of `mismatched`."""
        assert self._other is not None
        every = self._all or self
        answers = (every.lengths - every._prompt_lengths)[self._other]
        return np.minimum(self._prompt_lengths + answers - 1, self.ctx_len)

    @cached_property
    def mismatched_counts(self) -> np.ndarray:
        """int64 [n]: targets of `mismatched`."""
        return (self._all or self).trained_counts[self._other]

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
        part._all = self._all or self
        for name, value in vars(Dataset).items():
            if isinstance(value, cached_property):
                part.__dict__.pop(name, None)
        for name in ("_part", "_document", "_start", "_length", "trained_counts", "repeats", "_other"):
            column = getattr(self, name)
            setattr(part, name, None if column is None else column[indices])
        if windows is not None:
            part.windows = windows
        if not notes:
            part._notes = []
        return part

    def pairs(self, tokenizer: Tokenizer, limit: int | None = None) -> list[tuple[str, str]]:
        """(text before the last response, that response) of the first `limit` samples that have both and are whole.

        Of preference data these are the chosen or good answers.
        """
        pairs: list[tuple[str, str]] = []
        for index in range(len(self)):
            if limit is not None and len(pairs) == limit:
                break
            if self.good is not None and not self.good[index]:
                continue
            sample = self[index]
            documents, document = self._parts[self._part[index]], self._document[index]
            begins = np.flatnonzero(np.diff(sample.trained.astype(np.int8)) == 1) + 1
            span = int(self._start[index, 0]), len(sample.ids)
            whole = span == (documents.starts[document], documents.lengths[document])
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
            kinds, longest = "", f"longest {self.widths.max() + 1:,}"
            if self.good is not None:
                kinds = f", {self.good.sum():,} good and {(~self.good).sum():,} bad"
            elif self.members == 2:
                longest += " with the longer answer"
            counts = f"{counted(len(self), self.unit)}{kinds}, {self.lengths.sum():,} tokens"
            lines.append(f"{counts}, {self.trained_counts.sum():,} of them trained; {longest}")
        return [*lines, *self._notes]

    def note_lines(self) -> list[str]:
        """Of these lines what was changed, lost or not used, and where the tokens are kept."""
        return list(self._notes)

    def spans(self) -> list[tuple[Documents, np.ndarray, np.ndarray, np.ndarray]]:
        """(source, numbers of its sequences here, their starts and lengths) of each source; of windows all documents.

        The sequences are numbered from one sample to the next. Behind an answer of KTO is the one whose answer follows
        its prompt in `mismatched`.
        """
        found = []
        parts, begins, lengths = np.repeat(self._part[:, None], self.members, axis=1), self._start, self._length
        if self._other is not None:
            every = self._all or self
            parts = np.column_stack([parts, every._part[self._other]])
            begins = np.column_stack([begins, every._start[self._other]])
            lengths = np.column_stack([lengths, every._length[self._other]])
        parts, begins, lengths = parts.ravel(), begins.ravel(), lengths.ravel()
        for number, documents in enumerate(self._parts):
            if self.windows:
                starts, sizes = self._documents_read(number)
                found.append((documents, np.arange(len(starts)), starts, sizes))
            else:
                mine = np.flatnonzero(parts == number)
                found.append((documents, mine, begins[mine], lengths[mine]))
        return found

    def preference_columns(self) -> dict[str, np.ndarray]:
        """{what it is: integers [n]}: all that units have beside their sequences; of other data nothing."""
        if self.unit == "sample":
            return {}
        columns = {f"{self.members} answers after": self._prompt_lengths}
        if self.good is not None and self._other is not None:
            columns |= {"good": self.good, "others after": (self._all or self)._prompt_lengths[self._other]}
        return columns

    def _documents_read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths) of the documents of a part that the stream of tokens has."""
        documents = self._parts[number]
        chosen = slice(None) if self._whole else np.unique(self._document[self._part == number])
        return documents.starts[chosen], documents.lengths[chosen]


def _made(documents: Documents, ctx_len: int, windows: bool, long_samples: str) -> Samples:
    if windows:
        return uncut(documents)
    if documents.answers is not None:
        return units_of(documents, ctx_len, long_samples)
    return samples_of(documents, ctx_len, long_samples)
