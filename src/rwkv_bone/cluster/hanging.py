"""Which of a run's processes has stopped or hangs, by what each tells of itself: rules without clocks and sockets.

Each process (rank) tells in every beat how much it has done and whether it works. In a hanging run most ranks are
healthy: they wait for the one that hangs. Waiting on a CPU (gloo) takes no processor time, waiting on a GPU (NCCL)
takes a whole core.

On a crowded machine a healthy rank may hardly come to run. So of the time in which one of its threads waits for a
processor, nothing counts against it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

PATIENCE = 10  # times the longest time without progress so far, and times the limit where nothing is known yet


class Life(NamedTuple):
    """What a rank tells of itself."""

    done: int = 0  # reports of progress so far
    running: bool = False  # within the steps or measurements, where ranks wait for one another
    busy: bool = False  # its processor time since the beat before is more than nothing
    disk: bool = False  # its main thread reads or writes a file
    longest: float = 0.0  # seconds between two reports, while running
    at: str = ""  # where its main thread is, once it is without progress for a while
    waits: bool = False  # its main thread is in a collective
    share: float = 1.0  # the part of the time in which none of its threads waited for a processor


class Verdict(NamedTuple):
    """The rank that ends the run, and why, in words that follow its name."""

    rank: int
    words: str


@dataclass
class Seen:
    """What is known of a rank.

    Seconds count from when it was heard, made progress, was busy, used a file; but for the first only as far as it
    could run.
    """

    life: Life = field(default_factory=Life)
    silent: float = 0.0
    still: float = 0.0
    idle: float = 0.0
    off_disk: float = 0.0


class Judge:
    """Decides by the beats of `ranks` which of them ends the run.

    timeout: seconds without a sign of life. spins: ranks that wait for another take processor time.
    """

    def __init__(self, ranks: range, timeout: float, spins: bool = False):
        self.timeout, self.spins = timeout, spins
        self.seen = {rank: Seen() for rank in ranks}

    def heard(self, rank: int, life: Life) -> None:
        """A beat of a rank has come."""
        if seen := self.seen.get(rank):
            seen.silent = 0.0
            seen.still *= life.done == seen.life.done and life.running == seen.life.running
            seen.idle *= not life.busy
            seen.off_disk *= not life.disk
            seen.life = life

    def finished(self, rank: int) -> None:
        """A rank has done its part: nothing more is expected of it."""
        self.seen.pop(rank, None)

    def judge(self, seconds: float) -> Verdict | None:
        """To be asked again and again. seconds: since the last time, in which the caller itself has run."""
        for rank, seen in self.seen.items():
            own = seconds * seen.life.share
            seen.silent += seconds
            seen.still += own
            seen.idle += own
            seen.off_disk += own
            if seen.silent > self.timeout:
                return self._silent(rank)
        # The main process may wait for a server when all others have done their part.
        if self.seen.keys() <= {0} or not any(seen.life.running for seen in self.seen.values()):
            return None
        for everybody in (self._all_idle(), self._too_long()):
            if everybody:
                return self._named()
        return None

    def _silent(self, rank: int) -> Verdict:
        seconds = self.seen[rank].silent
        return Verdict(rank, f"has stopped, or its machine is gone: no sign of life for {seconds:.0f} s")

    def _all_idle(self) -> bool:
        """No rank makes progress, and none works; where ranks wait busily: one does not work."""
        prepared = all(seen.life.running for seen in self.seen.values())
        limit = self.timeout * (1 if prepared else PATIENCE)
        idle = [min(seen.idle, seen.off_disk) > limit for seen in self.seen.values()]
        return self._still > limit and (any(idle) if self.spins else all(idle))

    def _too_long(self) -> bool:
        """No rank has made progress for much longer than ever before."""
        longest = max(seen.life.longest for seen in self.seen.values())
        if not all(seen.life.running for seen in self.seen.values()) or not (longest or self.spins):
            return False
        on_disk = any(seen.off_disk <= self.timeout for seen in self.seen.values())
        limit = max(self.timeout, PATIENCE * longest) if longest else PATIENCE * self.timeout
        return self._still > limit and not on_disk

    @property
    def _still(self) -> float:
        return min(seen.still for seen in self.seen.values())

    def _named(self) -> Verdict:
        """Of the ranks without progress, one that does not wait for another, and of those the one that did least."""
        rank, seen = min(self.seen.items(), key=lambda item: (item[1].life.waits, item[1].life.done))
        silent = max(self.seen, key=lambda rank: self.seen[rank].silent)
        if self.seen[silent].silent > self.timeout / 2:
            return self._silent(silent)
        where = f", at {seen.life.at}" if seen.life.at else ""
        return Verdict(rank, f"hangs: no progress for {seen.still:.0f} s{where}")
