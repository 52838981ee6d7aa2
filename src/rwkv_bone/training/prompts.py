"""The prompt that both answers of a pair share, computed once: both go on from its state.

A packed row holds each pair's prompt twice, once before each answer. Here the model runs what the two documents have in
common as a document of its own, and then the rest of both, each from the state that the first leaves. Losses are the
same but for rounding, and so are gradients, which go back through the state.

Sizes: U pairs, D documents of a packed row, R labelled positions, T positions of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_bone.data import Batch
from rwkv_bone.models import LayerState, Recompute
from rwkv_bone.ops.cross_entropy import IGNORED_LABEL
from rwkv_bone.training.context import to_device, values

# Tokens of a prompt that is worth its states: a pair has three in each layer, with as many numbers as the inputs of 64
# tokens each. A shorter prompt is computed twice, so that memory is never more than that of the row as it is. Where a
# block is computed again, backward keeps a token's input alone.
LEAST, LEAST_RECOMPUTED = 32, 192
PIECES = 32  # a row's length is a multiple of such a part of the whole: see `BatchPlan`


class Cut(NamedTuple):
    """A packed row as two: what pairs share, and the rest, documents of sharing pairs before all others."""

    shared: np.ndarray  # int64: positions in the row; one of any kind if nothing is shared
    shared_bounds: np.ndarray  # cu_seqlens
    pairs: int  # that share something
    rest: np.ndarray  # int64: positions in the row
    rest_bounds: np.ndarray  # cu_seqlens
    label_rows: np.ndarray  # int64 [R], ascending: the labelled positions in the rest
    order: np.ndarray  # int64 [R]: which of them each of the row's is


def cut(ids: np.ndarray, bounds: np.ndarray, label_rows: np.ndarray, pairs: int, least: int) -> Cut:
    """ids [T]: a packed row, cu_seqlens [D + 1], that begins with two documents for each pair. label_rows: [R].

    A pair shares the ids at the beginning of both documents, up to the first that differs or has a label; nothing, if
    they are fewer than `least`.
    """
    begins, ends = bounds[: 2 * pairs], bounds[1 : 2 * pairs + 1]
    before = label_rows[np.searchsorted(label_rows, begins)] - begins  # of each document's first label
    lengths = np.zeros(2 * pairs, dtype=np.int64)
    for one in range(0, 2 * pairs, 2):
        most = before[one : one + 2].min()
        same = ids[begins[one] :][:most] == ids[begins[one + 1] :][:most]
        length = most if same.all() else same.argmin()
        lengths[one : one + 2] = length if length >= least else 0
    sharing = np.flatnonzero(lengths)
    documents = np.concatenate([sharing, np.flatnonzero(lengths == 0)])
    shared, shared_bounds = _spans(begins[sharing[::2]], lengths[sharing[::2]])
    rest, rest_bounds = _spans((begins + lengths)[documents], (ends - begins - lengths)[documents])
    place = np.zeros(len(ids), dtype=np.int64)
    place[rest] = np.arange(len(rest))
    labels = place[label_rows]
    order = np.argsort(labels)
    return Cut(shared, shared_bounds, len(sharing) // 2, rest, rest_bounds, labels[order], np.argsort(order))


def _spans(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions of these spans, their cu_seqlens); without a span one of the first position."""
    if not len(starts):
        starts, lengths = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    bounds = np.cumsum([0, *lengths])
    return np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], lengths), bounds


def shared_prompts(model: Callable[..., Any], batch: Batch, *, recompute: Recompute, **options: Any) -> Tensor:
    """`model(batch.ids, labels=batch.labels, ..., per_token=True)` of a packed micro-batch of pairs: the loss of each
    labelled position [R], in the order of batch.label_rows. options go to the model as well.

    How the row is cut depends on batch.host, in the CPU's memory, so that nothing waits for a GPU. Every rank calls the
    model twice, whatever its pairs share: at stage 3 each call gathers parameters from all.
    """
    assert batch.host and batch.cu_seqlens is not None and batch.answers and batch.answers.members == 2
    host, least = batch.host, LEAST_RECOMPUTED if recompute.blocks else LEAST
    assert host.cu_seqlens is not None
    made = cut(values(host.ids[0]), values(host.cu_seqlens), values(host.label_rows), len(batch.answers.units), least)
    piece = max(host.ids.shape[1] // PIECES, 1)
    extra = [-len(positions) % piece for positions in (made.shared, made.rest)]
    bounds = [
        np.append(bounds, bounds[-1] + more) if more else bounds
        for bounds, more in zip((made.shared_bounds, made.rest_bounds), extra, strict=True)
    ]
    arrays = (made.shared, bounds[0], made.rest, bounds[1], made.label_rows, made.order)
    shared, shared_bounds, rest, rest_bounds, label_rows, order = to_device(arrays, batch.ids.device)

    how = {"per_token": True, "return_state": True, "recompute": recompute, **options}
    ids = F.pad(batch.ids[:, shared], (0, extra[0]))
    none = {"labels": torch.full_like(ids, IGNORED_LABEL), "label_rows": label_rows[:0]}
    nothing, after = model(ids, cu_seqlens=shared_bounds, **none, **how)
    state = [LayerState(*(_twice(rows[: made.pairs]) for rows in layer)) for layer in after]
    ids, labels = (F.pad(x[:, rest], (0, extra[1]), value=IGNORED_LABEL) for x in (batch.ids, batch.labels))
    losses, _ = model(
        ids.clamp(min=0), labels=labels, label_rows=label_rows, cu_seqlens=rest_bounds, state=state, **how
    )
    # The first call's loss, of no position, is in the sum so that on every rank the graph holds all of both calls.
    return torch.cat([nothing, losses])[order]


def _twice(rows: Tensor) -> Tensor:
    """[k, ...] -> [2 k, ...]: each row two times, one after the other."""
    return rows.unsqueeze(1).expand(-1, 2, *rows.shape[1:]).flatten(0, 1)
