"""Helpers to write small data files, and to go through a plan's batches."""

import json
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from rwkv_bone.config import DataConfig
from rwkv_bone.data import Batch, BatchPlan
from rwkv_bone.data.samples import Documents
from rwkv_bone.data.sources.rows import Places


@pytest.fixture
def write_jsonl(tmp_path):
    """Factory: writes rows, one a line, and returns the path. A row that is str or bytes is written as it is."""

    def line_of(row) -> bytes:
        if isinstance(row, bytes):
            return row
        return (row if isinstance(row, str) else json.dumps(row)).encode()

    def write(*rows, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(b"".join(line_of(row) + b"\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def config(tmp_path):
    """Factory: a DataConfig for byte tokens."""

    def make(path: str | tuple[str, ...], **settings) -> DataConfig:
        files = (path,) if isinstance(path, str) else tuple(path)
        return DataConfig(
            **{"data_file": files, "tokenizer": "bytes", "cache_dir": str(tmp_path / "cache"), **settings}
        )

    return make


def windows(plan: BatchPlan, epoch: int) -> Iterator[list[Batch]]:
    """The batches of each optimiser step of an epoch, over all micro-batches and ranks."""
    for step in range(plan.steps_in(epoch)):
        places = product(range(plan.accumulate), range(plan.world_size))
        yield [plan.batch(epoch, step, micro, rank) for micro, rank in places]


def origins(plan: BatchPlan, epoch: int) -> list[str]:
    """Where the samples of an epoch come from, in the order in which they are trained on."""
    return [row for window in windows(plan, epoch) for batch in window for row in batch.rows]


def documents(ids, lengths, mask=None, first: int = 0) -> Documents:
    """Documents that lie one after another in `ids`, from `first` on."""
    lengths = np.asarray(lengths, dtype=np.int64)
    starts = first + np.cumsum(lengths) - lengths
    trained = None if mask is None else np.asarray(mask, dtype=bool)
    places = Places(("made up ",))
    return Documents("made up", "", np.asarray(ids), starts, lengths, trained, places, np.arange(len(lengths)))


def preferences(rows, good=None, name: str = "made up", first: int = 0) -> Documents:
    """Documents of rows (prompt, answer, ...), each a sequence of ids: a pair has two answers, KTO's row one.

    Every token of an answer is trained. first: the number of the first row, from which its place follows.
    """
    members, places = len(rows[0]) - 1, Places((f"{name} ",))
    texts = [[*prompt, *answer] for prompt, *answers in rows for answer in answers]
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    prompts = np.repeat([len(row[0]) for row in rows], members).astype(np.int64)
    hashes = np.repeat([hash(tuple(row[0])) % 2**64 for row in rows], members).astype(np.uint64)
    mask = [t >= before for length, before in zip(lengths, prompts, strict=True) for t in range(length)]
    return Documents(
        name,
        f"{name}: made up",
        np.concatenate([np.array(text, dtype=np.int64) for text in texts]),
        np.cumsum(lengths) - lengths,
        lengths,
        np.array(mask),
        places,
        np.repeat(np.arange(len(rows)) + first, members),
        prompts=hashes,
        members=members,
        answers=prompts,
        good=None if good is None else np.array(good, dtype=bool),
    )
