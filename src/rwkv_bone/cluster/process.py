"""Processes of this machine as Linux shows them: how they ended, and what their threads get of the processors.

Elsewhere nothing is known of them, and what is asked here says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import NamedTuple

KILLED = "perhaps by the system for lack of memory (see dmesg)"


class Got(NamedTuple):
    """What the threads of a process got of the processors in some time."""

    seconds: float
    used: float = 0.0  # seconds of processor time, of all threads
    waited: float = 0.0  # seconds in which the thread that waited longest for a processor wanted one and had none


class Threads:
    """The threads of process `pid`, but for `without`, to be looked at again and again."""

    def __init__(self, pid: int, without: int = 0):
        self._pid, self._without = pid, str(without)
        self._when, self._before = time.monotonic(), self._read()
        self._owed: dict[str, float] = {}  # seconds that each thread has waited and that were not told yet

    def look(self) -> Got:
        """What they got since the last time."""
        now, found = time.monotonic(), self._read()
        seconds, used, longest, owed = now - self._when, 0.0, 0.0, {}
        for thread, (ran, waited) in found.items():
            ran_before, waited_before = self._before.get(thread, (ran, waited))
            used += ran - ran_before
            # Linux adds a wait when it is over: it may be longer than the time since the last look.
            all_of_it = self._owed.get(thread, 0.0) + waited - waited_before
            longest = max(longest, min(all_of_it, seconds))
            owed[thread] = max(all_of_it - seconds, 0.0)
        self._when, self._before, self._owed = now, found, owed
        return Got(seconds, used, longest)

    def _read(self) -> dict[str, tuple[float, float]]:
        """Of each thread: seconds on a processor, and seconds of waiting for one."""
        found: dict[str, tuple[float, float]] = {}
        with contextlib.suppress(OSError):
            for thread in set(os.listdir(f"/proc/{self._pid}/task")) - {self._without}:
                fields = read(f"/proc/{self._pid}/task/{thread}/schedstat").split()
                if len(fields) > 1:
                    found[thread] = int(fields[0]) / 1e9, int(fields[1]) / 1e9
        return found


def on_disk(pid: int) -> bool:
    """Whether a thread of a process waits for a disk."""
    with contextlib.suppress(OSError):
        tasks = [f"/proc/{pid}/task/{thread}/stat" for thread in os.listdir(f"/proc/{pid}/task")]
        return any(read(task).rpartition(b")")[2].split()[:1] == [b"D"] for task in tasks)
    return False


def how_it_ended(status: int | None) -> str:
    """In words that follow its name. status: as of a Popen; None: not known."""
    if status is None:
        return f"has ended without a word: it was killed, {KILLED}"
    if status == -signal.SIGKILL:
        return f"was killed by signal 9, {KILLED}"
    if status < 0:
        return f"was ended by signal {-status} ({signal.Signals(-status).name})"
    return f"has ended with status {status}, without a word"


def read(path: str) -> bytes:
    """A file of /proc; nothing if it is not there."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
