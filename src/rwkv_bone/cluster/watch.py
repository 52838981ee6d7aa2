"""The processes of a run watch over one another, so that what ends one of them ends all, and is told once.

Each process (rank) has a thread with a connection to rank 0, over which it tells every second that it lives and what it
has done (`hanging.py` says what follows from that). The connection itself tells of a process that dies. What a rank
raises goes to rank 0, which tells every machine the first error; then all processes end, whatever their main threads
wait for.
"""

from __future__ import annotations

import contextlib
import queue
import selectors
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from rwkv_bone import signals
from rwkv_bone.cluster.hanging import PATIENCE, Judge, Life, Verdict
from rwkv_bone.cluster.links import Link, Message, connect
from rwkv_bone.cluster.process import Threads, how_it_ended, on_disk
from rwkv_bone.cluster.signs import BUSY, Sample, marks
from rwkv_bone.errors import Interrupted, sentence, status_of
from rwkv_bone.locks import Process

if TYPE_CHECKING:
    from rwkv_bone.cluster.world import World

BEAT = 1.0  # seconds from one beat to the next
# Seconds in which a better reason may come than the first: a rank that dies has the others raise errors of their own.
GRACE = 1.0
# Errors of ranks whose connections to another have broken.
BROKEN = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")


class _Mute:
    """A silent process of this machine. worked: seconds for which it has nevertheless."""

    def __init__(self, pid: int):
        self.pid, self.threads, self.worked = pid, Threads(pid), 0.0


class Watch:
    """Watches over the processes of `world`; used as a context around all that the run does once they have met.

    What is raised within it ends the run: it is told once, and no process is left. timeout: seconds without a sign of
    life of a rank. state(): what is saved and how to go on, in words; to be set once it is known. A run of one process
    needs none of this.
    """

    def __init__(self, world: World, timeout: float):
        self.world, self.timeout = world, timeout
        self.state: Callable[[], str] = str
        self._judge = Judge(range(world.size) if world.rank == 0 else range(1), timeout)
        self._beat = min(BEAT, timeout / 5)
        self._events: queue.SimpleQueue[tuple[int, Message]] = queue.SimpleQueue()
        self._links: dict[int, Link] = {}  # rank -> the connection to it
        self._processes = {world.rank: Process.current()}  # of those that are known, by rank
        self._mute: dict[int, _Mute] = {}  # silent ranks of this machine
        self._failed: dict[int, Message] = {}  # rank -> what it has raised
        self._dead: list[int] = []
        self._decide_at: float | None = None
        self._over = threading.Event()

    def spins(self, spins: bool) -> None:
        """Whether waiting for other ranks takes processor time, as NCCL's does."""
        self._judge.spins = spins

    def __enter__(self) -> Watch:
        marks.reset()
        if self.world.size > 1:
            self._links = connect(self.world)
            self._processes |= {rank: link.process for rank, link in self._links.items()}
            signals.on_leaving(self._tell_signal)
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.world.size == 1:
            return
        if error is None or isinstance(error, Interrupted):
            self._finish()
        elif isinstance(error, KeyboardInterrupt):
            self._tell_signal(status_of(getattr(error, "signum", signal.SIGINT)), "interrupted")
        else:
            self._fail(error)

    # -- what the main thread does

    def _fail(self, error: BaseException) -> None:
        """Tell rank 0 what this rank has raised, and wait for the end."""
        words = sentence(error)
        text = words or "".join(traceback.format_exception(error)).rstrip()
        told = {"failed": text, "mistake": bool(words), "broken": any(word in str(error) for word in BROKEN)}
        self._events.put((self.world.rank, told))
        if self.world.rank:
            self._send(0, told)
        # The thread ends this process. If it cannot, the error takes its usual way.
        self._over.wait(self.timeout + 2 * GRACE)

    def _finish(self) -> None:
        """This rank has done its part. Rank 0 waits for the others, which are judged until then."""
        if self.world.rank:
            self._send(0, {"bye": True})
        self._events.put((self.world.rank, {"bye": True}))  # with which the thread of another rank ends
        self._over.wait()

    def _tell_signal(self, status: int, words: str) -> None:
        """All ranks are to end because this one does, of its own will."""
        told = {"end": status, "text": words}
        for rank in self._links:
            self._send(rank, told)

    # -- what the thread does

    def _watch(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                self._loop(selector)
        except Exception:
            # A run that nobody watches over goes on.
            traceback.print_exc()
        finally:
            for link in self._links.values():
                link.socket.close()
            self._over.set()

    def _loop(self, selector: selectors.BaseSelector) -> None:
        for rank, link in self._links.items():
            link.socket.settimeout(5)
            selector.register(link.socket, selectors.EVENT_READ, rank)
        sample, last, next_beat = Sample(self.timeout), time.monotonic(), 0.0
        while not self._over.is_set():
            for key, _ in selector.select(min(self._beat, 0.1) if self._decide_at else self._beat / 4):
                if not self._read(key.data):
                    selector.unregister(key.fileobj)
            while not self._events.empty():
                self._take(*self._events.get())
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + self._beat
                life = sample.take()
                self._judge.heard(self.world.rank, life)
                for rank in list(self._links):
                    self._send(rank, {"beat": life})
                self._look_at_the_silent()
            # After a stop of this process itself the others are not to blame.
            verdict = self._judge.judge(min(now - last, 2 * self._beat))
            last = now
            if verdict:
                self._end_by(verdict)
            if self._decide_at and now >= self._decide_at:
                self._decide()

    def _read(self, rank: int) -> bool:
        """Take what has come from a rank; False once its connection is closed."""
        link = self._links[rank]
        try:
            for message in link.receive():
                self._take(rank, message)
            if not link.closed:
                return True
        except (OSError, ValueError):
            pass
        self._links.pop(rank).socket.close()
        if rank in self._judge.seen and not (self.world.rank and 0 not in self._judge.seen):
            self._dead.append(rank)
            self._decide_within(GRACE / 2)
        return False

    def _look_at_the_silent(self) -> None:
        """A silent rank of this machine may work, in code that lets no other thread run, or hardly come to run."""
        for rank, seen in self._judge.seen.items():
            process = self._processes.get(rank)
            if seen.silent < self.timeout / 4:
                self._mute.pop(rank, None)
            elif mute := self._mute.get(rank):
                got = mute.threads.look()
                works = got.used > BUSY * got.seconds or on_disk(mute.pid)
                if works and mute.worked < PATIENCE / 2 * self.timeout:
                    mute.worked += got.seconds
                    seen.silent -= got.seconds
                else:
                    seen.silent -= got.waited
            elif process and process.is_here():
                self._mute[rank] = _Mute(process.pid)

    def _take(self, rank: int, message: Message) -> None:
        if "beat" in message:
            self._judge.heard(rank, Life(*message["beat"]))
        elif "bye" in message:
            self._judge.finished(rank)
            if self.world.rank or not self._judge.seen:
                self._over.set()
        elif "failed" in message:
            self._failed.setdefault(rank, message)
            self._decide_within(0 if self._failed.keys() >= set(range(self.world.size)) else GRACE)
        elif "end" in message:
            if self.world.rank == 0:
                for other in self._links.keys() - {rank}:
                    self._send(other, message)
            self._leave(message)

    def _decide_within(self, seconds: float) -> None:
        when = time.monotonic() + seconds
        self._decide_at = when if self._decide_at is None or not seconds else self._decide_at

    def _decide(self) -> None:
        """End the run for the best reason that is known."""
        self._decide_at = None
        if self._dead:
            rank = self._dead[0]
            return self._end_by(Verdict(rank, self._how_it_ended(rank)))
        if self.world.rank:
            return None  # rank 0 decides
        rank, first = min(self._failed.items(), key=lambda item: item[1]["broken"])
        text, everywhere = first["failed"], len(self._failed) == self.world.size
        same = everywhere and all(one["failed"] == text for one in self._failed.values())
        if not first["mistake"]:
            text = f"{self._name(rank)} failed:\n{text}{self._state()}"
        elif same or rank == 0:
            text = f"error: {text}"
        else:
            text = f"error: {self._name(rank)}: {text}"
        return self._end_all({"end": 2 if first["mistake"] else 1, "text": text})

    def _end_by(self, verdict: Verdict) -> None:
        """End the run because of a rank that cannot tell why itself."""
        text = f"error: {self._name(verdict.rank)} {verdict.words}{self._state()}"
        seen = self._judge.seen[verdict.rank]
        # A rank that hangs hears of the end, tells it and ends; one that is dead or has stopped does not.
        stopped = self._processes.get(verdict.rank) if seen.silent > self.timeout / 2 else None
        gone = verdict.rank if stopped or verdict.rank in self._dead else None
        self._end_all({"end": 1, "text": text, "gone": gone, "stopped": stopped})

    def _end_all(self, message: Message) -> None:
        if self.world.rank == 0:
            for rank in self._links:
                self._send(rank, message)
        self._leave(message)

    def _leave(self, message: Message) -> None:
        """End this process, and the one that has stopped if that is on this machine."""
        gone, stopped = message.get("gone"), message.get("stopped")
        if stopped and (process := Process(*stopped)).is_here():
            signals.kill([process.pid])
        next_to_it = self.world.local_rank == 1 and gone == self.world.rank - 1
        signals.leave(message["end"], message["text"] if self.world.local_rank == 0 or next_to_it else "")

    def _how_it_ended(self, rank: int) -> str:
        known = 0 < rank <= len(self.world.children)
        return how_it_ended(self.world.children[rank - 1].poll() if known else None)

    def _name(self, rank: int) -> str:
        process = self._processes.get(rank)
        if process is None:
            return f"rank {rank} of {self.world.size}"
        return f"rank {rank} of {self.world.size} ({process.host}, process {process.pid})"

    def _state(self) -> str:
        state = self.state()
        return f"\n{state}" if state else ""

    def _send(self, rank: int, message: Message) -> None:
        # A connection that has broken is found when it is read.
        with contextlib.suppress(OSError):
            if link := self._links.get(rank):
                link.send(message)
