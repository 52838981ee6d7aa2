"""Held-out samples taken from the training data (--eval_split)."""

from __future__ import annotations

import numpy as np

from rwkv_bone.errors import UserError

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def split_heldout(groups: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training indices, held-out indices) of samples, both ascending; groups uint64 [n], 0 < share < 1.

    Samples of one group (one prompt) stay together. A group is held out if the hash of its number and the seed is below
    `share` of the range of hashes. So about that share is held out, and rows that are added later move no sample from
    one side to the other. At least one group goes to each side, whatever the share.
    """
    unique, member = np.unique(groups, return_inverse=True)
    if len(unique) < 2:
        raise UserError(
            f"--eval_split {share}: the data has {len(groups):,} usable samples with {len(unique)} different prompts, "
            "and both training and held-out data need one: name held-out data with --eval_data, or leave both out"
        )
    hashes = _mix(unique + _mix(np.array([seed % 2**64], dtype=np.uint64)))
    count = int((hashes < np.uint64(share * 2**64)).sum())
    chosen = np.argsort(hashes)[: min(max(count, 1), len(unique) - 1)]
    heldout = np.isin(member, chosen)
    return np.flatnonzero(~heldout), np.flatnonzero(heldout)


def _mix(x: np.ndarray) -> np.ndarray:
    """A hash of 64-bit numbers: one step of splitmix64 (Steele, Lea, Flood 2014)."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
