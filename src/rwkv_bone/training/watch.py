"""The processes of a run watch over one another, so that what ends one of them ends all, and is told once.

Each process (rank) has a thread with a connection to rank 0, over which it tells every second that it lives and what it
has done (`hanging.py` says what follows from that). The connection itself tells of a process that dies. What a rank
raises goes to rank 0, which tells every machine the first error; then all processes end, whatever their main threads
wait for.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer

from rwkv_bone import signals
from rwkv_bone.errors import Interrupted, UserError, sentence, status_of
from rwkv_bone.training.hanging import Judge, Life, Verdict
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.signs import marks, progress

if TYPE_CHECKING:
    from rwkv_bone.cluster.world import World

BEAT = 1.0  # seconds from one beat to the next
BUSY = 0.01  # the part of the time in which a process that works uses a processor, on a crowded machine too
CONNECTING = 600.0  # seconds for the connections between all ranks: some load the libraries from a slower disk
# Seconds in which a better reason may come than the first: a rank that dies has the others raise errors of their own.
GRACE = 1.0
MESSAGE = 1 << 20  # bytes; a longer one is none of ours
# Errors of ranks whose connections to another have broken.
BROKEN = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")
KILLED = "perhaps by the system for lack of memory (see dmesg)"

Message = dict[str, Any]


class ShowProgress(Callback):
    """Micro-batches and all other forward passes are progress."""

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        marks.last, marks.running = time.monotonic(), True
        module.register_forward_pre_hook(lambda *_: progress())

    def on_train_batch_start(self, trainer: Trainer, module: TrainingModule, batch: Any, index: int) -> None:
        progress()


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
        self._links: dict[int, _Link] = {}  # rank -> the connection to it
        self._places: dict[int, Message] = {world.rank: _this_process()}  # rank -> the process that it is
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
            self._main = threading.main_thread().ident
            self._connect()
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

    def _connect(self) -> None:
        """Connections between rank 0 and every other rank."""
        world, end = self.world, time.monotonic() + CONNECTING
        assert world.store
        if world.rank == 0:
            here = "127.0.0.1" if world.nodes == 1 else ""
            both = world.nodes > 1 and socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            with socket.create_server((here, 0), family=family, dualstack_ipv6=both, backlog=world.size) as server:
                token = secrets.token_hex(16)
                told = {"port": server.getsockname()[1], "token": token, **self._places[0]}
                world.store.set(world.key("watch"), json.dumps(told))
                self._accept(server, token, end)
            return
        told = json.loads(world.get(world.key("watch"), "the watch", 0))
        self._places[0] = told
        while 0 not in self._links:
            try:
                self._links[0] = _Link(socket.create_connection((world.address, told["port"]), timeout=5))
            except OSError as error:
                if time.monotonic() > end:
                    raise UserError(
                        f"{world.address}:{told['port']}, where rank 0 watches over the others, cannot be reached "
                        f"({error.strerror or error}): a firewall must let these machines' connections pass"
                    ) from None
                time.sleep(0.2)
        self._links[0].send({"token": told["token"], "rank": world.rank, **self._places[world.rank]})

    def _accept(self, server: socket.socket, token: str, end: float) -> None:
        """Take the connection of every other rank."""
        server.settimeout(1)
        while missing := sorted(set(range(1, self.world.size)) - self._links.keys()):
            self.world.stop_if_failed()
            for rank, child in enumerate(self.world.children, 1):
                if child.poll() is not None and rank in missing:
                    raise UserError(f"{self._name(rank)} {self._how_it_ended(rank)}")
            if time.monotonic() > end:
                raise UserError(f"{self._name(missing[0])} did not connect within {CONNECTING:.0f} s")
            # Whoever connects and is none of ours is sent away.
            with contextlib.suppress(OSError, ValueError):
                link = _Link(server.accept()[0])
                link.socket.settimeout(5)
                hello = next(iter(link.receive()), {})
                if hello.get("token") == token:
                    self._links[hello["rank"]], self._places[hello["rank"]] = link, hello
                else:
                    link.socket.close()

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
            self._run()
        except Exception:
            # A run that nobody watches over goes on.
            traceback.print_exc()
        finally:
            for link in self._links.values():
                link.socket.close()
            self._over.set()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            self._loop(selector)

    def _loop(self, selector: selectors.BaseSelector) -> None:
        for rank, link in self._links.items():
            link.socket.settimeout(5)
            selector.register(link.socket, selectors.EVENT_READ, rank)
        sample, last, next_beat = _Sample(self._main), time.monotonic(), 0.0
        while not self._over.is_set():
            for key, _ in selector.select(min(self._beat, 0.1) if self._decide_at else self._beat / 4):
                if not self._read(key.data):
                    selector.unregister(key.fileobj)
            while not self._events.empty():
                self._take(*self._events.get())
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + self._beat
                life = sample.take(self.timeout)
                self._judge.heard(self.world.rank, life)
                for rank in list(self._links):
                    self._send(rank, {"beat": life})
            # After a stop of this process itself the others are not to blame.
            verdict = self._judge.judge(min(now - last, 2 * self._beat))
            last = now
            if verdict and not self._lives(verdict.rank):
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
        stopped = self._places.get(verdict.rank) if seen.silent > self.timeout / 2 else None
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
        if stopped and _is_here(stopped):
            signals.kill([stopped["pid"]])
        next_to_it = self.world.local_rank == 1 and gone == self.world.rank - 1
        signals.leave(message["end"], message["text"] if self.world.local_rank == 0 or next_to_it else "")

    def _how_it_ended(self, rank: int) -> str:
        status = None
        if rank and rank <= len(self.world.children):
            status = self.world.children[rank - 1].poll()
        if status is None:
            return f"has ended without a word: it was killed, {KILLED}"
        if status == -signal.SIGKILL:
            return f"was killed by signal 9, {KILLED}"
        if status < 0:
            return f"was ended by signal {-status} ({signal.Signals(-status).name})"
        return f"has ended with status {status}, without a word"

    def _lives(self, rank: int) -> bool:
        """Whether a silent rank of this machine works all the same, in code that lets no other thread run."""
        seen, place = self._judge.seen[rank], self._places.get(rank)
        if seen.silent <= self.timeout or not place or not _is_here(place):
            return False
        used, before = _ticks(place["pid"]), place.get("ticks")
        place["ticks"] = used
        if before is None or used > before:
            place["mute"] = place.get("mute", 0.0) + self.timeout / 2
            seen.silent = self.timeout / 2
            return place["mute"] < 5 * self.timeout
        return False

    def _name(self, rank: int) -> str:
        place, size = self._places.get(rank), self.world.size
        return f"rank {rank} of {size} ({place['host']}, process {place['pid']})" if place else f"rank {rank} of {size}"

    def _state(self) -> str:
        state = self.state()
        return f"\n{state}" if state else ""

    def _send(self, rank: int, message: Message) -> None:
        # A connection that has broken is found when it is read.
        with contextlib.suppress(OSError):
            if link := self._links.get(rank):
                link.send(message)


class _Link:
    """A connection over which messages go, one JSON text a line."""

    def __init__(self, connection: socket.socket):
        self.socket, self.closed = connection, False
        self._buffer = b""
        self._lock = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Message) -> None:
        with self._lock:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Iterator[Message]:
        """The messages that have come; waits for some. ValueError for what is none."""
        data = self.socket.recv(1 << 16)
        self.closed = not data
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > MESSAGE:
            raise ValueError("a message without an end")
        for line in lines:
            yield json.loads(line)


class _Sample:
    """What the main thread and the process have used since the last time."""

    def __init__(self, main: int | None):
        self._main, self._id = main, threading.main_thread().native_id
        self._used, self._when, self._bytes = 0.0, time.monotonic(), 0

    def take(self, timeout: float) -> Life:
        # The watching itself is no work.
        now, used = time.monotonic(), time.process_time() - time.thread_time()
        busy = used - self._used > BUSY * (now - self._when)
        task = f"/proc/self/task/{self._id}"
        amount = 0
        for line in _read(f"{task}/io").splitlines():
            name, _, number = line.partition(b":")
            amount += int(number) if name in (b"rchar", b"wchar", b"read_bytes", b"write_bytes") else 0
        blocked = _read(f"{task}/stat").rpartition(b")")[2].split()[:1] == [b"D"]
        disk = blocked or amount > self._bytes
        self._used, self._when, self._bytes = used, now, amount
        at, waits = (
            ("", False) if now - marks.last < timeout / 2 else _where(sys._current_frames().get(self._main or 0))
        )
        return Life(marks.done, marks.running, busy, disk, marks.longest, at, waits)


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


def _this_process() -> Message:
    """Where this process is, so that another of the same machine can look at it."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "here": _here(), "began": _began(pid)}


def _is_here(place: Message) -> bool:
    """Whether a process is on this machine and still the same."""
    return bool(_here()) and place["here"] == _here() and place["began"] == _began(place["pid"])


def _here() -> str:
    """This machine and container: process numbers mean the same where this is the same."""
    with contextlib.suppress(OSError):
        boot = _read("/proc/sys/kernel/random/boot_id").decode().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}" if boot else ""
    return ""


def _began(pid: int) -> int:
    """When a process was started, in ticks."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return int(fields[19]) if len(fields) > 19 else 0


def _ticks(pid: int) -> int:
    """Processor time of a process, in ticks."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return int(fields[11]) + int(fields[12]) if len(fields) > 12 else 0


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
