"""How far a model has moved from the one that its run began with: the Kullback-Leibler divergence of its predictions.

It is exact over the vocabulary, at some positions of held-out answers, and needs no second model: kept are the rows
that enter the head, and the head, which is not trained, makes logits of them again.

Sizes: N positions, C channels, V vocabulary, D documents of a packed row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rwkv_bone.data import Batch, Dataset

POSITIONS = 512  # at which it is measured, at most
LOGITS = 2**22  # at a time, of each of the two models: 16 MB in float32


class Places(NamedTuple):
    """Positions in the first sequences of some units of a dataset, N of them, ascending."""

    units: np.ndarray  # int64 [N]
    offsets: np.ndarray  # int64 [N]: the position, which predicts the id after it


def divergence(now: Tensor, start: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int) -> Tensor:
    """KL(p || q) = sum over the vocabulary of p (log p - log q) at each position, in nats: [N], at least float32.

    p = softmax(head(now)) is what the model predicts, q = softmax(head(start)) what it predicted at the start.
    now, start [N, C]: rows after the last norm. head: rows [n, C] -> logits [n, V]; it is called with some rows at a
    time, so that memory is bounded whatever N and V are.
    """
    found = []
    for rows in zip(*(x.split(max(1, LOGITS // vocabulary)) for x in (now, start)), strict=True):
        p, q = (_log_softmax(head(part)) for part in rows)
        found.append((p.exp() * (p - q)).sum(dim=-1))
    return torch.cat(found)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def places(dataset: Dataset, count: int = POSITIONS) -> Places:
    """`count` positions, evenly spread over the trained tokens of the good answers; all of them if there are no more.

    Good answers are the chosen ones of pairs, and of single answers those with a good label; all, where none is good.
    Of more than `count` such units as many are looked at, evenly spread.
    """
    good = np.arange(len(dataset))
    if dataset.good is not None and dataset.good.any():
        good = np.flatnonzero(dataset.good)
    units = _spread(good, count)
    targets = [np.flatnonzero(dataset.sequences(int(unit))[0].trained[1:]) for unit in units]
    at = np.stack([np.repeat(units, [len(one) for one in targets]), np.concatenate(targets)], axis=1)
    return Places(*_spread(at, count).T)


def _spread(values: np.ndarray, count: int) -> np.ndarray:
    """`count` of them, evenly spread; all if there are no more."""
    count = min(count, len(values))
    return values[np.arange(count) * len(values) // count]


class Rows:
    """Takes what a layer returns at some places, while a model runs the packed batches of a dataset one after another.

    layer: returns [1, T, C], or pieces of that in a row. Every place is in one of the batches.
    """

    def __init__(self, layer: nn.Module, where: Places):
        self._layer, self._where = layer, where
        self._taken: list[Tensor] = []
        self._order: list[np.ndarray] = []

    @contextlib.contextmanager
    def of(self, batch: Batch) -> Iterator[None]:
        """In this context the model runs `batch`, of preference data and packed."""
        answers = (batch.host or batch).answers
        bounds = (batch.host or batch).cu_seqlens
        assert answers is not None and bounds is not None
        begins = dict(zip(answers.units.tolist(), bounds[:: answers.members].tolist(), strict=False))
        mine = np.flatnonzero(np.isin(self._where.units, answers.units.numpy()))
        at = np.array([begins[unit] for unit in self._where.units[mine].tolist()], dtype=np.int64)
        at += self._where.offsets[mine]
        order = np.argsort(at)
        at, done = at[order], 0

        def take(layer: nn.Module, args: Any, output: Tensor) -> None:
            nonlocal done
            here = at[(at >= done) & (at < done + output.shape[1])] - done
            if len(here):
                self._taken.append(output[0].detach()[torch.from_numpy(here).to(output.device)])
            done += output.shape[1]

        hook = self._layer.register_forward_hook(take)
        try:
            yield
        finally:
            hook.remove()
        self._order.append(mine[order])

    def all(self) -> Tensor:
        """What was taken, [N, C], in the order of the places."""
        order = np.argsort(np.concatenate(self._order))
        return torch.cat(self._taken)[torch.from_numpy(order).to(self._taken[0].device)]
