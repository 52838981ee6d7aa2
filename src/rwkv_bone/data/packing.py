"""Packs whole samples into rows of a fixed number of tokens, and leaves little of it unused.

Bounded best fit: each sample goes to the open row that it fills up best, or opens a row. If more than `OPEN` rows are
open, the fullest is closed. Samples are taken in the order given, which is random, but each `WINDOW` of them is sorted,
longest first: the shorter ones then fill the gaps of the longer ones. Time grows with the number of samples only.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

OPEN = 1024
WINDOW = 64


def best_fit(lengths: np.ndarray, budget: int) -> np.ndarray:
    """lengths int64 [n], each from 1 to `budget` -> the row of each sample, int64 [n]: 0 to the number of rows - 1."""
    assert not len(lengths) or 1 <= lengths.min() <= lengths.max() <= budget
    order = np.lexsort((-lengths, np.arange(len(lengths)) // WINDOW))
    rows, count = [], 0
    room: list[tuple[int, int]] = []  # of every open row: (tokens that still fit in, row), sorted
    for length in lengths[order].tolist():
        place = bisect_left(room, (length, 0))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row, count = budget, count, count + 1
        rows.append(row)
        if left > length:
            insort(room, (left - length, row))
            if len(room) > OPEN:
                del room[0]
    result = np.empty(len(lengths), dtype=np.int64)
    result[order] = rows
    return result
