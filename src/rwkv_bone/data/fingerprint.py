"""A hash of the data of a run, by which a continued run recognises that its data is still the same."""

from __future__ import annotations

import hashlib

import numpy as np

from rwkv_bone.data.dataset import Dataset


def data_fingerprint(dataset: Dataset) -> str:
    """A short hash of the samples: how many, their lengths and trained tokens, and the ids of 256 spread over them."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{len(dataset)} {dataset.ctx_len} {dataset.windows}\n".encode())
    for counts in (dataset.lengths, dataset.trained_counts):
        digest.update(np.ascontiguousarray(counts, dtype=np.int64).data)
    for index in range(0, len(dataset), -(-len(dataset) // 256)):
        digest.update(np.ascontiguousarray(dataset[index].ids).data)
    return digest.hexdigest()
