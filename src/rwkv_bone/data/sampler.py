"""Which samples make up which batch: a pure function of (seed, epoch, step, micro, rank).

An optimiser step consumes one window of micro_bsz x accumulate x world_size samples. The windows follow one another
through a seeded permutation of the data; after a full pass comes a new permutation. An epoch is a full pass, or
`steps_per_epoch` windows: the next epoch goes on where it ended, so that a pass repeats no sample and leaves none out.

Sizes: B samples of a micro-batch, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rwkv_bone.data.dataset import Dataset

IGNORED = -100


@dataclass
class Batch:
    ids: torch.Tensor  # int64 [B, T]
    labels: torch.Tensor  # int64 [B, T]: the target of each position, -100 where none is trained
    rows: list[str]  # where the samples came from; shorter than B if the batch was filled up with empty rows
    tokens: int  # of this micro-batch, padding not counted
    window_tokens: int  # trained labels of the whole window: all micro-batches of the step, on all ranks


class BatchPlan:
    """Batches of `micro_bsz` samples, as wide as the longest of them needs.

    The last window of a pass is filled up with empty rows (all labels ignored), spread over ranks and micro-batches.
    A dataset of `windows` gives random windows of its token stream instead, each rank its own, every token trained; an
    epoch is then as many of them as hold the tokens of the stream once.
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
    ):
        self.dataset = dataset
        self.micro_bsz = micro_bsz
        self.accumulate = accumulate
        self.world_size = world_size
        self.seed = seed
        self.window = micro_bsz * accumulate * world_size  # samples per optimiser step
        self._width = min(dataset.ctx_len, len(dataset.tokens) - 1)  # T of the windows of a stream
        samples = -(-len(dataset.tokens) // self._width) if dataset.windows else len(dataset)
        self._steps_per_pass = -(-samples // self.window)
        self.steps_per_epoch = steps_per_epoch or self._steps_per_pass
        self._shuffled: tuple[int, np.ndarray] = (-1, np.empty(0))

    def batch(self, epoch: int, step: int, micro: int, rank: int) -> Batch:
        """The micro-batch `micro` (of `accumulate`) of optimiser step `step` of `epoch`; all count from 0."""
        if self.dataset.windows:
            return self._stream_batch(epoch, step, micro, rank)
        window = self._window(epoch * self.steps_per_epoch + step)
        mine = window[micro * self.world_size + rank :: self.accumulate * self.world_size]
        samples = [self.dataset[index] for index in mine]
        width = max((len(sample.ids) - 1 for sample in samples), default=1)
        ids = np.zeros((self.micro_bsz, width), dtype=np.int64)
        labels = np.full((self.micro_bsz, width), IGNORED, dtype=np.int64)
        for row, sample in enumerate(samples):
            length = len(sample.ids) - 1
            ids[row, :length] = sample.ids[:-1]
            labels[row, :length] = np.where(sample.trained[1:], sample.ids[1:], IGNORED)
        return Batch(
            ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            rows=[sample.origin for sample in samples],
            tokens=sum(len(sample.ids) - 1 for sample in samples),
            window_tokens=int(self.dataset.trained_counts[window].sum()),
        )

    def _window(self, step: int) -> np.ndarray:
        """Indices of the samples of the step-th optimiser step since the beginning, at most `window` of them."""
        number, step = divmod(step, self._steps_per_pass)
        if self._shuffled[0] != number:
            self._shuffled = number, np.random.default_rng([self.seed, number]).permutation(len(self.dataset))
        return self._shuffled[1][step * self.window : (step + 1) * self.window]

    def _stream_batch(self, epoch: int, step: int, micro: int, rank: int) -> Batch:
        stream = self.dataset.tokens
        draw = np.random.default_rng([self.seed, epoch, step, micro, rank])
        starts = draw.integers(0, len(stream) - self._width, size=self.micro_bsz)
        windows = np.stack([stream[start : start + self._width + 1] for start in starts]).astype(np.int64)
        return Batch(
            ids=torch.from_numpy(windows[:, :-1].copy()),
            labels=torch.from_numpy(windows[:, 1:].copy()),
            rows=[f"tokens {start} to {start + self._width}" for start in starts],
            tokens=self.micro_bsz * self._width,
            window_tokens=self.window * self._width,
        )
