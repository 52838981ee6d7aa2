"""Signs of life of this process, which those that watch over it are told: `watch.py`."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from rwkv_bone.cluster.hanging import Life
from rwkv_bone.cluster.process import Threads, read

BUSY = 0.01  # the part of the time in which a process that works uses a processor


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


class Sample:
    """What this process has done and used since the last time; to be taken by the thread that watches.

    timeout: as in `Judge`.
    """

    def __init__(self, timeout: float):
        main = threading.main_thread()
        self._main, self._task, self._timeout = main.ident or 0, f"/proc/self/task/{main.native_id}", timeout
        self._used, self._when, self._bytes = 0.0, time.monotonic(), 0
        self._threads: Threads | None = None

    def take(self) -> Life:
        # The watching itself is no work.
        now, used = time.monotonic(), time.process_time() - time.thread_time()
        busy = used - self._used > BUSY * (now - self._when)
        amount = 0
        for line in read(f"{self._task}/io").splitlines():
            name, _, number = line.partition(b":")
            amount += int(number) if name in (b"rchar", b"wchar", b"read_bytes", b"write_bytes") else 0
        blocked = read(f"{self._task}/stat").rpartition(b")")[2].split()[:1] == [b"D"]
        disk = blocked or amount > self._bytes
        self._used, self._when, self._bytes = used, now, amount
        still = now - marks.last
        at, waits = _where(sys._current_frames().get(self._main)) if still > self._timeout / 2 else ("", False)
        return Life(marks.done, marks.running, busy, disk, marks.longest, at, waits, self._share(still))

    def _share(self, still: float) -> float:
        """The part of the time since the last call in which no thread waited for a processor."""
        if still < self._timeout / 10:
            self._threads = None  # nobody asks
            return 1.0
        if self._threads is None:
            self._threads = Threads(os.getpid(), without=threading.get_native_id())
            return 1.0
        got = self._threads.look()
        return 1 - got.waited / max(got.seconds, got.waited, 1e-9)


def _where(frame: Any) -> tuple[str, bool]:
    """(the innermost line, and the innermost of ours; whether it is in a collective)."""
    lines: list[str] = []
    waits = False
    for depth, (inner, line) in enumerate(traceback.walk_stack(frame)):
        name = inner.f_code.co_filename
        folders = name.split(os.sep)
        waits |= depth < 8 and ("distributed" in folders or folders[-3:-1] == ["deepspeed", "comm"])
        if not lines or "rwkv_bone" in folders:
            lines.append(f"{inner.f_code.co_name} ({folders[-1]}:{line})")
            if "rwkv_bone" in folders:
                break
    return " in ".join(lines), waits
