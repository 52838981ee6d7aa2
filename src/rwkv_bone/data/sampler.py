"""Which samples make up which batch: a pure function of (seed, epoch, step, micro, rank).

An optimiser step consumes one window: `accumulate` micro-batches on each of `world_size` ranks. The windows follow one
another through a seeded order of the data; after a full pass comes a new order. An epoch is a full pass, or
`steps_per_epoch` windows: the next epoch goes on where it ended, so that a pass repeats no sample and leaves none out.

Passes may differ in their number of steps: packing puts other samples together, weights select other samples.

Sizes: B rows of a micro-batch, T positions, D documents of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import RLock

import numpy as np
import torch

from rwkv_bone.data.dataset import Dataset, Sample
from rwkv_bone.data.packing import best_fit
from rwkv_bone.errors import UserError

IGNORED_LABEL = -100
PASSES_KEPT = 2
SIZES = 16  # lengths that a packed row may have


@dataclass
class Answers:
    """What of a micro-batch the losses on whole answers need: U units, S = U x members sequences, R label rows.

    A unit is a pair of answers, chosen and rejected (members 2), or one answer with its label (members 1). Sequence
    u x members + m of the batch is member m of unit u.
    """

    sequence: torch.Tensor  # int64 [R]: the sequence of each of `Batch.label_rows`
    units: torch.Tensor  # int64 [U]: their numbers in the dataset
    members: int
    window_units: int  # of the whole window: all micro-batches of the step, on all ranks
    good: torch.Tensor | None = None  # bool [U]: KTO's labels
    # KTO, in a window's first micro-batch: for each of the window's micro-batches of this rank, its prompts with
    # answers of other prompts, one sequence a unit, in the order of `units`.
    mismatched: tuple[Batch, ...] = ()

    def map(self, function: Callable[[torch.Tensor], torch.Tensor], of_batch: Callable[[Batch], Batch]) -> Answers:
        return replace(
            self,
            sequence=function(self.sequence),
            units=function(self.units),
            good=None if self.good is None else function(self.good),
            mismatched=tuple(map(of_batch, self.mismatched)),
        )


@dataclass
class Batch:
    """One micro-batch. Its tensors are in the CPU's memory until `to` moves them; `host` is then the batch there."""

    ids: torch.Tensor  # int64 [B, T]; packed [1, T]
    labels: torch.Tensor  # int64 [B, T]: the target of each position, -100 where none is trained
    label_rows: torch.Tensor  # int64 [R]: the trained positions in the flattened labels, ascending
    rows: list[str]  # where the samples came from; fewer than the batch has room for if it has empty rows
    tokens: int  # of this micro-batch, padding not counted
    window_tokens: int  # trained labels of the whole window: all micro-batches of the step, on all ranks
    widest: int  # the largest T among the ranks, which run this micro-batch at the same time
    cu_seqlens: torch.Tensor | None = None  # packed: int64 [D + 1], where each document begins and the last one ends
    answers: Answers | None = None  # of preference data
    host: Batch | None = None  # after `to`: the batch in the CPU's memory, to be read without waiting for a GPU

    def to(self, device: torch.device | str) -> Batch:
        """On `device`. A copy from pinned memory is only queued there; nothing waits for it."""
        moved = self._map(lambda x: x.to(device, non_blocking=True), lambda batch: batch.to(device))
        return replace(moved, host=self)

    def pinned(self) -> Batch:
        """Copied to page-locked memory, which a GPU can read while the CPU goes on."""
        return self._map(torch.Tensor.pin_memory, Batch.pinned)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor], of_batch: Callable[[Batch], Batch]) -> Batch:
        bounds = None if self.cu_seqlens is None else function(self.cu_seqlens)
        ids, labels, label_rows = map(function, (self.ids, self.labels, self.label_rows))
        answers = None if self.answers is None else self.answers.map(function, of_batch)
        return replace(self, ids=ids, labels=labels, label_rows=label_rows, cu_seqlens=bounds, answers=answers)


@dataclass(frozen=True)
class Pass:
    """One pass over the data: micro-batch i holds samples[bounds[i] : bounds[i + 1]]."""

    samples: np.ndarray  # int64: each sample as often as the pass has it
    bounds: np.ndarray  # int64 [micro-batches of all windows + 1]


class BatchPlan:
    """The micro-batches of a run, made of whole samples.

    Padded: `micro_bsz` samples, each a row, as wide as the longest of them needs; the last window of a pass is filled
    up with empty rows (all labels ignored), spread over ranks and micro-batches. `pack`: one row of at most micro_bsz x
    ctx_len tokens, filled with documents one after another; where the last window of a pass has none left, a row of one
    ignored token. The rest of a row up to the next sixteenth of what it may have is a document of ignored tokens: of
    rows that are all of different lengths no step's memory fits the next, and on a CPU the heap grows and grows.
    unit: where it is given, `micro_bsz` is a multiple of it, and a packed micro-batch joins so many rows of at most
    unit x ctx_len tokens. Then the samples of a step depend on micro_bsz x accumulate alone, not on how they are cut.
    A dataset of `windows` gives random windows of its token stream instead, other windows on each rank, every token
    trained; a pass is then the number of windows that together have as many tokens as the stream.
    Of preference data a sample is a unit with all its members, each a document, or a row of a padded batch: neighbours,
    in one micro-batch, which has room for so many times the rows and tokens. KTO's answers take the room that their
    prompts with other answers need, if that is more.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        micro_bsz: int,
        accumulate: int = 1,
        world_size: int = 1,
        seed: int = 0,
        steps_per_epoch: int | None = None,
        pack: bool = False,
        unit: int | None = None,
    ):
        unit = unit or micro_bsz
        assert micro_bsz % unit == 0
        self.dataset = dataset
        self.micro_bsz = micro_bsz
        self.accumulate = accumulate
        self.world_size = world_size
        self.seed = seed
        self.pack = pack and not dataset.windows
        self._joined = micro_bsz // unit
        # Tokens of a packed row. Samples of a dataset that is meant for windows may be longer than ctx_len.
        self._row = max(unit * dataset.members * dataset.ctx_len, int(dataset.positions.max()))
        self.budget = self._joined * self._row  # tokens of a packed micro-batch
        self._fill = max(self.budget // SIZES, 1)  # the length of a packed row is a multiple of it, or the budget
        self._per_window = accumulate * world_size  # micro-batches of an optimiser step
        self._width = min(dataset.ctx_len, len(dataset.tokens) - 1) if dataset.windows else 0  # T of a stream's windows
        self._lengths = dataset.positions if self.pack else dataset.widths  # of each sample in a row
        self._fixed_steps = steps_per_epoch
        self._pass_steps: dict[int, int] = {}
        self._passes: dict[int, Pass] = {}
        self._lock = RLock()  # guards _passes, since batches are made in a thread
        self._offsets = None if dataset.repeats is None else _offsets(dataset.repeats, seed)

    def steps_in(self, epoch: int) -> int:
        """The optimiser steps of an epoch."""
        return self._fixed_steps or self.steps_in_pass(epoch)

    def total_steps(self, epochs: int) -> int:
        """The optimiser steps of the first `epochs` epochs. Raises UserError if there is none."""
        steps = sum(self.steps_in(epoch) for epoch in range(epochs))
        if not steps:
            raise UserError(
                f"--data_weights are so small that {epochs} passes use none of the {len(self.dataset):,} samples: "
                "give larger weights or more epochs"
            )
        return steps

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step in the epoch) of an optimiser step of the run; all count from 0."""
        return divmod(step, self._fixed_steps) if self._fixed_steps else self._locate_in_passes(step)

    def ends_epoch(self, step: int) -> bool:
        """Whether this optimiser step of the run, 0 the first, is the last of its epoch."""
        epoch, step = self.locate(step)
        return step + 1 == self.steps_in(epoch)

    def batch(self, epoch: int, step: int, micro: int, rank: int) -> Batch:
        """The micro-batch `micro` (of `accumulate`) of optimiser step `step` of `epoch`; all count from 0."""
        if self.dataset.windows:
            return self._stream_batch(epoch, step, micro, rank)
        if self._fixed_steps:
            epoch, step = self._locate_in_passes(epoch * self._fixed_steps + step)
        order = self._pass(epoch)
        first = step * self._per_window
        window = order.samples[order.bounds[first] : order.bounds[first + self._per_window]]
        window_tokens = int(self.dataset.trained_counts[window].sum())
        mine = first + micro * self.world_size + rank
        units = order.samples[slice(*order.bounds[mine : mine + 2])]
        batch = self._of(
            [self.dataset.sequences(unit) for unit in units], window_tokens, self._widest(order, mine - rank)
        )
        if self.dataset.unit != "sample":
            batch.answers = self._answers(batch, units, len(window))
            if self.dataset.good is not None and micro == 0:
                batch.answers.mismatched = tuple(self._mismatched(order, first, rank))
        return batch

    def _of(self, units: Sequence[tuple[Sample, ...]], window_tokens: int, widest: int) -> Batch:
        """The micro-batch of these units, each with its members."""
        samples = [sample for unit in units for sample in unit]
        lengths = [len(sample.ids) - 1 for sample in samples]
        if self.pack:
            bounds = np.cumsum([0, *(lengths or [1])])
            if samples and (filled := self._filled(bounds[-1])) > bounds[-1]:
                bounds = np.append(bounds, filled)
            shape, places = (1, bounds[-1]), [(0, start) for start in bounds[: len(samples)]]
        else:
            bounds = None
            rows = self.micro_bsz * self.dataset.members
            shape, places = (rows, max(lengths, default=1)), [(row, 0) for row in range(len(samples))]
        ids, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED_LABEL, dtype=np.int64)
        for sample, length, (row, start) in zip(samples, lengths, places, strict=True):
            ids[row, start : start + length] = sample.ids[:-1]
            labels[row, start : start + length] = np.where(sample.trained[1:], sample.ids[1:], IGNORED_LABEL)
        return Batch(
            ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            label_rows=torch.from_numpy(np.flatnonzero(labels != IGNORED_LABEL)),
            rows=[first.origin for first, *_ in units],
            tokens=sum(lengths),
            window_tokens=window_tokens,
            widest=widest,
            cu_seqlens=None if bounds is None else torch.from_numpy(bounds),
        )

    def _answers(self, batch: Batch, units: np.ndarray, window_units: int) -> Answers:
        """Which label of a micro-batch of these units belongs to which of its sequences."""
        if batch.cu_seqlens is None:
            sequence = batch.label_rows // batch.ids.shape[1]
        else:
            sequence = torch.searchsorted(batch.cu_seqlens, batch.label_rows, right=True) - 1
        good = None if self.dataset.good is None else torch.from_numpy(self.dataset.good[units])
        return Answers(sequence, torch.from_numpy(units), self.dataset.members, window_units, good)

    def _mismatched(self, order: Pass, first: int, rank: int) -> Iterator[Batch]:
        """See `Answers`. first: the window's first micro-batch."""
        window = order.samples[order.bounds[first] : order.bounds[first + self._per_window]]
        window_tokens = int(self.dataset.mismatched_counts[window].sum())
        for begin in range(first, first + self._per_window, self.world_size):
            units = order.samples[slice(*order.bounds[begin + rank : begin + rank + 2])]
            samples = [(self.dataset.mismatched(unit),) for unit in units]
            batch = self._of(samples, window_tokens, self._widest(order, begin, self.dataset.mismatched_widths))
            batch.answers = self._answers(batch, units, len(window))
            yield batch

    def share_read(self, steps: int) -> float:
        """The share of the data's trained tokens that the first `steps` optimiser steps read at least once."""
        dataset = self.dataset
        if dataset.windows:  # drawn anywhere: as many tokens as that
            return min(1.0, steps * self._per_window * self.micro_bsz * self._width / len(dataset.tokens))
        return float(dataset.trained_counts[self.units_read(steps)].sum() / dataset.trained_counts.sum())

    def units_read(self, steps: int) -> np.ndarray:
        """int64, ascending: the numbers of the samples that the first `steps` optimiser steps read at least once."""
        seen = np.zeros(len(self.dataset), dtype=bool)
        number = 0
        while steps > 0 and not seen.all():
            order, taken = self._pass(number), self.steps_in_pass(number)
            end = order.bounds[min(steps, taken) * self._per_window]
            seen[order.samples[:end]] = True
            number, steps = number + 1, steps - taken
        return np.flatnonzero(seen)

    def summary_lines(self) -> list[str]:
        """How full the micro-batches of the first pass are, for the user."""
        if self.dataset.windows or not self.steps_in_pass(0):
            return []
        order = self._pass(0)
        counts = np.diff(order.bounds)
        used = int(self.dataset.positions[order.samples].sum())
        if self.pack:
            rows = int((counts > 0).sum())
            unused = 1 - used / (rows * self.budget)
            count = f"{rows:,} row{'s' * (rows != 1)}"
            return [f"packed into {count} of at most {self.budget:,} tokens, {unused:.1%} of that unused"]
        padding = 1 - used / self.positions()
        longest = "answer" if self.dataset.unit == "pair" else self.dataset.unit
        return [f"padded to the longest {longest} of each batch: {padding:.1%} of all positions are padding"]

    def positions(self) -> int:
        """The positions, padding included, that all micro-batches of the first pass have together."""
        if self.dataset.windows:
            return self.steps_in_pass(0) * self._per_window * self.micro_bsz * self._width
        order = self._pass(0)
        lengths, counts = self._lengths[order.samples], np.diff(order.bounds)
        if self.pack:
            rows = np.diff(np.cumsum([0, *lengths])[order.bounds])
            return sum(self._filled(int(row)) if row else 1 for row in rows)
        widths = np.ones(len(counts), dtype=np.int64)
        np.maximum.at(widths, np.repeat(np.arange(len(counts)), counts), lengths)
        return int((widths * self.micro_bsz * self.dataset.members).sum())

    def _locate_in_passes(self, step: int) -> tuple[int, int]:
        number = 0
        while step >= (steps := self.steps_in_pass(number)):
            number, step = number + 1, step - steps
        return number, step

    def steps_in_pass(self, number: int) -> int:
        """The optimiser steps of one pass over the data."""
        if number not in self._pass_steps:
            if self.dataset.windows:
                micro_batches = -(-len(self.dataset.tokens) // (self._width * self.micro_bsz))
            elif self.pack:
                micro_batches = len(self._pass(number).bounds) - 1
            else:
                micro_batches = -(-self._counts(number).sum() // self.micro_bsz)
            self._pass_steps[number] = int(-(-micro_batches // self._per_window))
        return self._pass_steps[number]

    def _counts(self, number: int) -> np.ndarray:
        """How often pass `number` has each sample, int64 [n]: its weight, rounded down or up so that passes add up."""
        repeats = self.dataset.repeats
        if repeats is None:
            return np.ones(len(self.dataset), dtype=np.int64)
        assert self._offsets is not None  # there are repeats
        before, after = (np.floor(repeats * passes + self._offsets) for passes in (number, number + 1))
        return (after - before).astype(np.int64)

    def _pass(self, number: int) -> Pass:
        with self._lock:
            if number not in self._passes:
                while len(self._passes) >= PASSES_KEPT:
                    del self._passes[next(iter(self._passes))]
                self._passes[number] = self._order(number)
            return self._passes[number]

    def _order(self, number: int) -> Pass:
        random = np.random.default_rng([self.seed, number])
        samples = random.permutation(np.repeat(np.arange(len(self.dataset)), self._counts(number)))
        if self.pack:
            places = self._spread(best_fit(self.dataset.room[samples], self._row), samples, random)
            # Each window deals out its rows over its micro-batches, as below its samples.
            window, row = np.divmod(places, self._joined * self._per_window)
            places = window * self._per_window + row % self._per_window
        else:
            # Each window deals out its samples over its micro-batches, one by one.
            positions = np.arange(len(samples))
            places = positions // (self.micro_bsz * self._per_window) * self._per_window + positions % self._per_window
        windows = -(-(places.max(initial=-1) + 1) // self._per_window)
        counts = np.bincount(places, minlength=windows * self._per_window)
        return Pass(samples[np.argsort(places, kind="stable")], np.cumsum([0, *counts]))

    def _spread(self, rows: np.ndarray, samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """The micro-batch of each sample, from its packed row: rows in random order, in each window the fullest first.

        So the ranks, which run neighbouring micro-batches at the same time, have about equal work.
        """
        fill = np.bincount(rows, weights=self._lengths[samples])
        order = random.permutation(len(fill))
        order = order[np.lexsort((-fill[order], np.arange(len(fill)) // (self._joined * self._per_window)))]
        place = np.empty(len(fill), dtype=np.int64)
        place[order] = np.arange(len(fill))
        return place[rows]

    def _widest(self, order: Pass, first: int, lengths: np.ndarray | None = None) -> int:
        """T of the widest of the micro-batches that all ranks run at the same time, the first of which is `first`.

        lengths: of each sample of the dataset, where it is not its own.
        """
        bounds = order.bounds[first : first + self.world_size + 1]
        lengths = (self._lengths if lengths is None else lengths)[order.samples[bounds[0] : bounds[-1]]]
        if self.pack:
            lengths = np.diff(np.cumsum([0, *lengths])[bounds - bounds[0]])
            return self._filled(int(lengths.max())) if lengths.any() else 1
        return int(lengths.max(initial=1))

    def _filled(self, length: int) -> int:
        """The length of a packed row of documents that together have this length."""
        return max(min(-(-length // self._fill) * self._fill, self.budget), length)

    def _stream_batch(self, epoch: int, step: int, micro: int, rank: int) -> Batch:
        stream = self.dataset.tokens
        size = self.micro_bsz // self._joined
        draws = [
            np.random.default_rng([self.seed, epoch, step, number, rank])
            for number in range(micro * self._joined, (micro + 1) * self._joined)
        ]
        starts = np.concatenate([draw.integers(0, len(stream) - self._width, size=size) for draw in draws])
        windows = np.stack([stream[start : start + self._width + 1] for start in starts]).astype(np.int64)
        return Batch(
            ids=torch.from_numpy(windows[:, :-1].copy()),
            labels=torch.from_numpy(windows[:, 1:].copy()),
            label_rows=torch.arange(self.micro_bsz * self._width),
            rows=[f"tokens {start} to {start + self._width}" for start in starts],
            tokens=self.micro_bsz * self._width,
            window_tokens=self.micro_bsz * self._per_window * self._width,
            widest=self._width,
        )


def _offsets(repeats: np.ndarray, seed: int) -> np.ndarray:
    """float64 [n] in (0, 1): an offset for each sample, chosen so that all passes are about equally long.

    Passes 0 to p - 1 together contain a sample of weight r floor(p r + offset) times. The offsets of samples with the
    same weight are spread evenly, in a seeded order, so every pass contains r times their number, give or take one.
    """
    shuffled = np.random.default_rng([seed, 0, 1]).permutation(len(repeats))
    offsets = np.empty(len(repeats))
    for weight in np.unique(repeats):
        same = shuffled[repeats[shuffled] == weight]
        offsets[same] = (np.arange(len(same)) + 0.5) / len(same)
    return offsets
