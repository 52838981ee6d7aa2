"""Long series made short without hiding anything: lowest and highest of every few steps, and a moving average."""

from __future__ import annotations

import numpy as np

POINTS = 2000  # of a series on a page: more than a screen has columns


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the values, at most 50, corrected for its start."""
    weight = 1 - 1 / min(max(len(values) / 20, 2), 50)
    out, mean = [], 0.0
    for i, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**i))
    return out


def span(count: int, most: int = POINTS) -> int:
    """How many of `count` values two points stand for, so that there are at most `most` points; 1: each has its own."""
    return 1 if count <= most else -(-count // (most // 2))


def extremes(values: np.ndarray, width: int) -> np.ndarray:
    """Positions, ascending, of the lowest and the highest of every `width` values [n]; of all with a width of 1.

    Values that are no finite number are left out, unless the width is 1.
    """
    if width == 1:
        return np.arange(len(values))
    rows = -(-len(values) // width)
    padded = np.full(rows * width, np.nan)
    padded[: len(values)] = np.where(np.isfinite(values), values, np.nan)
    parts = padded.reshape(rows, width)
    filled = ~np.isnan(parts).all(axis=1)
    first = np.arange(rows)[filled] * width
    found = [first + pick(parts[filled], axis=1) for pick in (np.nanargmin, np.nanargmax)]
    return np.unique(np.concatenate(found)) if len(first) else np.array([], dtype=np.int64)


def ends(count: int, width: int) -> np.ndarray:
    """Positions of the last of every `width` of `count` values."""
    return np.unique(np.minimum(np.arange(width - 1, count + width - 1, width), count - 1)) if count else np.arange(0)


def spread(count: int, most: int, also: tuple[int, ...] = ()) -> list[int]:
    """At most `most` positions of `count`, evenly spread with both ends, and those of `also`; ascending."""
    chosen = np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist() if count else []
    return sorted({*chosen, *(position for position in also if 0 <= position < count)})
