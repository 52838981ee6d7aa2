"""Documents to samples: what becomes of those that are longer than --ctx_len, and of those that train nothing.

A document is a list of ids of which some are targets; it may lie anywhere in a memory-mapped file. A sample is a
document of at most `ctx_len` predictions (`ctx_len` + 1 ids), or what --long_samples makes of a longer one.

Of preference data a sample is a unit: the answers of one row, see `units.py`.

Sizes: D documents of a source, N tokens of a source, n samples, M members of a unit (1 where there are no pairs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rwkv_bone.console import counted
from rwkv_bone.data.cache import Cache
from rwkv_bone.data.lost import Lost, percent
from rwkv_bone.data.sources.rows import Places

SCAN = 1 << 24  # tokens looked at in one go, so that a memory-mapped file is never in memory as a whole
ORIGINS_SHOWN = 3


@dataclass(frozen=True)
class Kept:
    """Where the arrays of a source are kept on disk."""

    cache: Cache
    keys: tuple[str, ...]  # of the entries, which name all that the arrays were made from


@dataclass(frozen=True)
class Documents:
    """The documents of one source, uncut. Arrays may be memory-mapped."""

    name: str  # what the user calls the source
    kind: str  # one line for the user
    tokens: np.ndarray  # integers [N]
    starts: np.ndarray  # int64 [D]: position of each document's first id, ascending
    lengths: np.ndarray  # int64 [D]
    trained: np.ndarray | None  # bool [N]; None: every token but the first of a document
    places: Places
    origin_numbers: np.ndarray  # int64 [D]: line, row or document number, as `places` takes it
    prompts: np.ndarray | None = None  # uint64 [D]: equal for equal prompts, see `prompt_hash`; None: not known yet
    turns: bool = False  # conversations, which lose their sense where they are split
    tools: int = 0  # rows that have tools
    # Preference data. A row makes `members` documents, one after another: 2 are the chosen answer and the rejected one.
    members: int = 1
    answers: np.ndarray | None = None  # int64 [D]: how many ids are before each document's answer; None: no preferences
    good: np.ndarray | None = None  # bool [D]: KTO's label; None: no labels
    notes: tuple[str, ...] = ()  # further lines for the user: what was changed or not used, where the cache is
    lost: tuple[Lost, ...] = ()  # what did not become documents
    kept: Kept | None = None

    def origin(self, index: int) -> str:
        return self.places(int(self.origin_numbers[index]))

    def named(self, index: Sequence[int] | np.ndarray) -> str:
        """Where the first of these documents come from."""
        shown = ", ".join(self.origin(i) for i in index[:ORIGINS_SHOWN])
        return shown + ", ..." * (len(index) > ORIGINS_SHOWN)


@dataclass
class Samples:
    """The samples of one source, in the order of its documents, and what the user should know of how they were made."""

    document: np.ndarray  # int64 [n]: number of the document, of a unit its first
    start: np.ndarray  # int64 [n, M]: position of the first id in the source's tokens
    length: np.ndarray  # int64 [n, M]: ids
    trained: np.ndarray  # int64 [n]: targets, at least one
    notes: list[str] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)


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


def uncut(documents: Documents) -> Samples:
    """Each document that has a target, uncut, for batches that are windows of all tokens."""
    assert documents.answers is None  # windows would cut answers
    starts, lengths = np.asarray(documents.starts), np.asarray(documents.lengths)
    return _with_targets(documents, np.arange(len(starts)), starts, lengths)


def samples_of(documents: Documents, ctx_len: int, long_samples: str) -> Samples:
    """The samples of one source without preferences. long_samples: auto, cut, drop or split."""
    full, starts, limit = np.asarray(documents.lengths), np.asarray(documents.starts), ctx_len + 1
    index, lengths = np.arange(len(full)), full
    too_long = np.flatnonzero(full > limit)
    how = ("cut" if documents.turns else "split") if long_samples == "auto" else long_samples
    notes, lost = [], []
    targets = count_trained(documents.trained, starts, starts + full)
    if len(too_long) and how == "drop":
        index = np.flatnonzero(full <= limit)
        starts, lengths = starts[index], full[index]
        lost.append(
            Lost(
                f"{documents.name}: dropped (--long_samples drop): {counted(len(too_long), 'sample')} longer than "
                f"--ctx_len {ctx_len} ({documents.named(too_long)})",
                share(targets[too_long].sum(), targets.sum()),
                remedy="raise --ctx_len",
            )
        )
    elif len(too_long) and how == "split":
        # Neighbouring pieces share one id, the last target of one and the first input of the next.
        pieces = np.maximum(-(-(full - 1) // ctx_len), 1)
        index = np.repeat(index, pieces)
        piece = np.arange(len(index)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = starts[index] + piece * ctx_len
        lengths = np.minimum(full[index] - piece * ctx_len, limit)
        notes.append(
            f"{documents.name}: split (--long_samples {long_samples}): {counted(len(too_long), 'sample')} longer than "
            f"--ctx_len {ctx_len} became {int(pieces[too_long].sum()):,}"
        )
    elif len(too_long):
        lengths = np.minimum(full, limit)
    samples = _with_targets(documents, index, starts, lengths)
    if len(too_long) and how == "cut":
        left_out = np.setdiff1d(too_long[targets[too_long] > 0], samples.document)
        lost.append(
            Lost(
                f"{documents.name}: cut at --ctx_len {ctx_len}: {counted(len(too_long), 'sample')}, "
                f"{int((full[too_long] - limit).sum()):,} tokens left out",
                share(targets.sum() - samples.trained.sum(), targets.sum()),
                remedy="raise --ctx_len, give --long_samples split",
            )
        )
        if len(left_out):
            notes.append(
                f"{documents.name}: left out, no token to train on within --ctx_len {ctx_len}: {len(left_out):,} of "
                f"these samples, {percent(len(left_out) / len(full))} of all ({documents.named(left_out)})"
            )
    empty = np.flatnonzero(targets == 0)
    if len(empty):
        lost.append(
            Lost(
                f"{documents.name}: left out, no token to train on: {counted(len(empty), 'sample')} "
                f"({documents.named(empty)})",
                share(full[empty].sum(), full.sum()),
                "tokens",
                "check --loss_mask, which marks nothing there",
            )
        )
    samples.notes, samples.lost = notes, lost
    return samples


def _with_targets(documents: Documents, index: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Samples:
    counts = count_trained(documents.trained, starts, starts + lengths)
    some = np.flatnonzero(counts)
    return Samples(index[some], starts[some, None], lengths[some, None], counts[some])


def share(part: int, all_of_it: int) -> float:
    return float(part) / max(int(all_of_it), 1)
