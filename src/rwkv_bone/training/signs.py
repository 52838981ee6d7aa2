"""Signs of life of this process, which those that watch over it are told: `watch.py`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Marks:
    """What this process has done so far. running: within the steps, where ranks wait for one another."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As at the beginning of a run."""
        self.done, self.longest, self.running = 0, 0.0, False  # longest: seconds between two reports, while running
        self.last = time.monotonic()


marks = Marks()


def progress() -> None:
    """Tell that this process has advanced: a micro-batch, a batch of a measurement, a tensor of a save."""
    now = time.monotonic()
    if marks.running:
        marks.longest = max(marks.longest, now - marks.last)
    marks.done += 1
    marks.last = now


@contextlib.contextmanager
def waiting_outside() -> Iterator[None]:
    """In this context this process may wait long for something that is not of the run, such as a server."""
    before, marks.running = marks.running, False
    try:
        yield
    finally:
        marks.last, marks.running = time.monotonic(), before
