"""Turns rows and texts into flat arrays of ids, a block of rows at a time, on several processes if there is much data.

The result does not depend on the number of processes: the reader makes the blocks, and the results
are collected in its order.
"""

from __future__ import annotations

import multiprocessing
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, TextIO

import numpy as np

from rwkv_bone import signals
from rwkv_bone.console import counted, progress_bar
from rwkv_bone.data.conversations.conversation import Layout
from rwkv_bone.data.conversations.remarks import Remarks
from rwkv_bone.data.dataset import prompt_hash
from rwkv_bone.data.encode import RowEncoder, token_dtype
from rwkv_bone.data.ids import check_ids
from rwkv_bone.data.lost import Lost
from rwkv_bone.data.sources.rows import Places
from rwkv_bone.data.templates.builtin import load_template
from rwkv_bone.data.tokenizer import load_tokenizer
from rwkv_bone.devices import usable_cores
from rwkv_bone.errors import UserError

BLOCK = 1 << 21  # bytes of rows that a process is given at a time
PARALLEL = 1 << 26  # bytes of data above which several processes are worth their start, a second each
PROCESSES = 16
ORIGINS_SHOWN = 3
ALIKE = "chosen and rejected are the same"  # the reason of rows that are left out whatever --bad_rows says
SKIP_HINT = "(--bad_rows skip leaves such rows out and counts them)"

Block = tuple[list, int]  # (items, their size in bytes)


@dataclass
class Encoded:
    """The documents of a block: D documents, N tokens."""

    tokens: np.ndarray  # uint16 or int32 [N]
    lengths: np.ndarray  # int64 [D]
    trained: np.ndarray | None = None  # bool [N]
    prompts: np.ndarray | None = None  # uint64 [D]: hashes of the prompts, see `dataset.prompt_hash`
    numbers: np.ndarray | None = None  # int64 [D]: number of each document's row in the source
    answers: np.ndarray | None = None  # int64 [D]: ids before each document's answer, of preference data
    good: np.ndarray | None = None  # bool [D]: whether the answer was chosen or is labelled as good, of preference data
    skipped: list[tuple[str, int]] = field(default_factory=list)  # (reason, number of the row)
    remarks: Mapping[str, int] = field(default_factory=dict)  # see `remarks.Remarks`
    tools: int = 0  # rows that have tools
    bytes: int = 0  # of the source


@dataclass(frozen=True)
class RowReader:
    """Parses the rows of a source. A bad row stops the run or, with `skip`, is replaced by the reason."""

    parse: Callable[[Any, str], dict]
    places: Places
    skip: bool

    def each(self, items: Iterable[tuple[int, Any]], function: Callable[[dict, str], Any]) -> Iterator[tuple[int, Any]]:
        """(number, function(row, where)) for each row; (number, the reason) for a row that is skipped."""
        for number, raw in items:
            where = self.places(number)
            try:
                if isinstance(raw, UserError):
                    raise raw
                yield number, function(self.parse(raw, where), where)
            except UserError as error:
                if not self.skip:
                    raise UserError(f"{error} {SKIP_HINT}") from error
                yield number, reason_of(str(error), where)


class Skipped:
    """Counts of the rows left out, by reason, with the numbers of the first few."""

    def __init__(self, counts: dict[str, tuple[int, list[int]]] | None = None):
        self.counts = counts or {}

    def add(self, found: Iterable[tuple[str, int]]) -> None:
        for reason, number in found:
            count, first = self.counts.get(reason, (0, []))
            self.counts[reason] = (count + 1, [*first, number][:ORIGINS_SHOWN])

    def lost(self, name: str, places: Places, used: int, unit: str = "rows") -> list[Lost]:
        """One for each reason. name: of the file; used: how many rows were not skipped."""
        rows = used + sum(count for count, _ in self.counts.values())
        found = []
        for reason, (count, first) in self.counts.items():
            named = ", ".join(places(number) for number in first) + ", ..." * (count > len(first))
            how = "left out" if reason == ALIKE else "skipped (--bad_rows skip)"
            what = f"{name}: {how}, {reason}: {counted(count, unit[:-1])} ({named})"
            found.append(Lost(what, count / rows, unit, f"mend these {unit}"))
        return found


class Settings(Protocol):
    """What decides the ids, as `run` hands it to each process."""

    def encoder(self) -> Callable[[Block], Encoded]:
        """The function from a block of a source to its documents."""


@dataclass(frozen=True)
class RowSettings:
    """Everything that decides the ids of a row. It is sent to other processes, each of which makes its own encoder."""

    reader: RowReader
    layout: Layout
    template: str
    tokenizer: str
    vocab_size: int
    loss_mask: str
    mask_id: str
    tool_format: str = "auto"

    def encoder(self) -> Callable[[Block], Encoded]:
        tokenizer = load_tokenizer(self.tokenizer, self.vocab_size)
        template = load_template(self.template, tokenizer.name, self.tool_format)
        encoder = RowEncoder(self.layout, template, tokenizer, self.vocab_size, self.loss_mask, self.mask_id)
        compared = self.layout.compares

        def encode_block(block: Block) -> Encoded:
            rows = list(self.reader.each(block[0], encoder.encode))
            good = [(number, row) for number, row in rows if not isinstance(row, str)]
            found = [(number, document) for number, row in good for document in row.documents]
            ids, masks = [document.ids for _, document in found], [document.trained for _, document in found]
            remarks = Remarks()
            for one in chain.from_iterable(row.remarks for _, row in good):
                remarks.add(one)
            # Of answers that are compared the prompt alone counts, however short it is.
            hashes = [prompt_hash(one.ids[: one.prompt] if compared else one.ids, one.prompt) for _, one in found]
            reasons = [
                (row if isinstance(row, str) else "" if row.documents else ALIKE, number) for number, row in rows
            ]
            return Encoded(
                np.concatenate([np.empty(0, dtype=encoder.dtype), *ids]),
                np.array([len(row) for row in ids], dtype=np.int64),
                np.concatenate([np.empty(0, dtype=bool), *masks]),
                np.array(hashes, "u8"),
                np.array([number for number, _ in found], dtype=np.int64),
                np.array([one.prompt for _, one in found], dtype=np.int64) if compared else None,
                np.array([one.good for _, one in found], dtype=bool) if compared else None,
                skipped=[(reason, number) for reason, number in reasons if reason],
                remarks=remarks.counts,
                tools=sum(row.tools for _, row in good),
                bytes=block[1],
            )

        return encode_block


@dataclass(frozen=True)
class TextSettings:
    """As RowSettings, for pieces of text: (number of its document, (text, whether the document ends here))."""

    places: Places
    tokenizer: str
    vocab_size: int

    def encoder(self) -> Callable[[Block], Encoded]:
        tokenizer = load_tokenizer(self.tokenizer, self.vocab_size)
        dtype = token_dtype(self.vocab_size)

        def encode_block(block: Block) -> Encoded:
            pieces = []
            for number, (text, ends) in block[0]:
                ids = np.array([*tokenizer.encode(text), *([tokenizer.eod] if ends else [])], dtype=np.int64)
                check_ids(ids, self.vocab_size, self.places(number), lambda token: tokenizer.decode([token]))
                pieces.append(ids.astype(dtype))
            lengths, numbers = [len(ids) for ids in pieces], [number for number, _ in block[0]]
            return Encoded(
                np.concatenate(pieces), np.array(lengths), numbers=np.array(numbers, dtype=np.int64), bytes=block[1]
            )

        return encode_block


def reason_of(message: str, where: str) -> str:
    """The message without its place and particulars, so that rows with the same problem are counted together."""
    reason = re.split(r"[;:(]|, expected|, found", message.removeprefix(where).lstrip(": "))[0]
    return re.sub(r"\d+", "N", reason).strip()


def blocks(items: Iterable[tuple[int, Any, int]]) -> Iterator[Block]:
    """`items` (number, raw, bytes) in groups of about BLOCK bytes."""
    group, size = [], 0
    for number, raw, count in items:
        group.append((number, raw))
        size += count
        if size >= BLOCK:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size


def run(settings: Settings, source: Iterable[Block], total: int, processes: int = 0) -> Iterator[Encoded]:
    """The results of `settings.encoder()` for every block, in order.

    processes: how many; 0 = by `total`, the bytes of all blocks.
    """
    count = processes or (usable_processes(total) if total >= PARALLEL else 1)
    if count == 1:
        yield from map(settings.encoder(), source)
        return
    # Started afresh rather than forked: the parent may have threads, and CUDA.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=_start, initargs=(settings,)) as pool:
        waiting: deque = deque()
        try:
            for block in source:
                waiting.append(pool.submit(_work, block))
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that tokenises ended early: if it left no message above, the machine may be out of memory"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def usable_processes(total: int) -> int:
    """How many processes are worth it for this many bytes, on the cores that this process may use."""
    return max(1, min(usable_cores(), PROCESSES, total // (PARALLEL // 4)))


# In a process that tokenises: what it does with a block.
_encode: Callable[[Block], Encoded] | None = None


def _start(settings: Settings) -> None:
    global _encode
    signals.obey_parent()
    _encode = settings.encoder()


def _work(block: Block) -> Encoded:
    assert _encode is not None  # `_start` has run
    return _encode(block)


class TokenisingProgress:
    """How much is tokenised: counted, and drawn as a bar on a terminal after two seconds. total: bytes, 0 = unknown."""

    def __init__(self, label: str, total: int, stream: TextIO | None = None, delay: float = 2):
        self.bytes = self.tokens = 0
        self.begin = time.perf_counter()
        layout = "{desc}: {percentage:3.0f}% [{bar:20}]{postfix}" if total else "{desc}{postfix}"
        self._bar = progress_bar(total or None, label, layout, stream=stream, delay=delay, mininterval=0.2)

    def add(self, count: int, tokens: int) -> None:
        self.bytes += count
        self.tokens += tokens
        self._bar.set_postfix_str(self.speed(), refresh=False)
        # Rows may take more bytes than their file, which is packed or says less about them.
        self._bar.update(min(count, self._bar.total - self._bar.n) if self._bar.total else count)

    def close(self) -> None:
        self._bar.close()

    def speed(self) -> str:
        seconds = max(time.perf_counter() - self.begin, 1e-6)
        return (
            f"{self.bytes / 1e6:,.1f} MB, {self.tokens:,} tokens in {seconds:.1f} s "
            f"({self.bytes / 1e6 / seconds:,.1f} MB/s, {self.tokens / seconds:,.0f} tokens/s)"
        )
