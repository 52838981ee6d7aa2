"""The processes of a run, as one of them sees them."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rwkv_bone import console
from rwkv_bone.errors import Interrupted, UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

SAME_FILES = "copy the same files to every machine"
POLL = 0.05  # seconds
SAID_AFTER, SAID_EVERY = 10.0, 60.0  # seconds of waiting before it is said for whom
FAREWELL = 5.0  # seconds that the first process, which holds the store, waits for others to read why the run ends


class Failed(UserError):
    """The run ends for a reason that another process has found."""


@dataclass
class World:
    """Which of a run's processes this one is, and a store of short texts that all of them reach.

    Used as a context, it ends the run's processes together: what one raises, every one is told at its next wait.
    """

    rank: int = 0
    local_rank: int = 0  # among the processes of this machine: the number of its card
    size: int = 1  # processes of the run
    node: int = 0  # number of this machine
    nodes: int = 1
    address: str = "127.0.0.1"  # where the store is
    port: int = 0  # 0: of a run of one process, which has no store
    store: TCPStore | None = None  # None with one process
    children: tuple[subprocess.Popen, ...] = ()  # processes of this machine that this one has started
    hosts: tuple[str, ...] = ()  # of each node
    launched: bool = False  # a launcher has started every process, this one too
    prefix: str = "rwkv_bone"

    @property
    def devices(self) -> int:
        """Processes on this machine."""
        return self.size // self.nodes

    @property
    def main(self) -> bool:
        """Whether this is the process that prints, and that alone reads and writes proj_dir."""
        return self.rank == 0

    @property
    def first_here(self) -> bool:
        """Whether this is the process that tells of errors on this machine."""
        return self.local_rank == 0

    def name(self, rank: int) -> str:
        """`node 1 (hostname)`, or with one machine `process 1`."""
        node = rank // self.devices
        if self.nodes == 1:
            return f"process {rank}"
        host = f" ({self.hosts[node]})" if node < len(self.hosts) else ""
        return f"node {node}{host}" + (f", device {rank % self.devices}" if self.devices > 1 else "")

    def key(self, *parts: object) -> str:
        return "/".join(map(str, (self.prefix, *parts)))

    def agree(self, name: str, value: str, remedy: str = "every machine must have the same") -> None:
        """To be called on every rank, and once with each name: UserError on each of them if `value` differs anywhere.

        name: what it is of, such as `--data_file`. Waits for ranks that are not there yet, and says so.
        """
        if self.store is None:
            return
        self.store.set(self.key("agree", name, self.rank), value)
        if self.main:
            found = [self.get(self.key("agree", name, rank), name, rank) for rank in range(self.size)]
            unlike = [rank for rank in range(self.size) if found[rank] != found[0]]
            sentence = ""
            if unlike:
                other = unlike[0]
                sentence = f"{name}: {self.name(other)} has {found[other]}, {self.name(0)} has {found[0]}: {remedy}"
            self.store.set(self.key("agreed", name), sentence)
        sentence = self.get(self.key("agreed", name), name, 0)
        if sentence:
            raise Failed(sentence)

    def least(self, name: str, value: int) -> int:
        """To be called on every rank, and once with each name: the least of the ranks' numbers."""
        if self.store is None:
            return value
        self.store.set(self.key("least", name, self.rank), str(value))
        return min(int(self.get(self.key("least", name, rank), name, rank)) for rank in range(self.size))

    def from_first(self, name: str, make: Callable[[], Any]) -> Any:
        """To be called on every rank: what `make()` returns on rank 0, which alone calls it. JSON values only.

        What it raises ends the run on every rank. name: unique in the run.
        """
        if self.store is None:
            return make()
        if self.main:
            value = make()
            self.store.set(self.key("first", name), json.dumps(value))
            return value
        return json.loads(self.get(self.key("first", name), name, 0))

    def get(self, key: str, doing: str, rank: int) -> str:
        """The text under `key`, once it is there. doing, rank: for whom this waits, and for what."""
        assert self.store
        began = told = time.monotonic()
        while True:
            try:
                if self.store.check([key]):
                    return self.store.get(key).decode()
                self.stop_if_failed()
            except UserError:
                raise
            except RuntimeError as error:  # torch has its own subclasses of it
                raise Failed(self._lost()) from error
            now = time.monotonic()
            if now - began > SAID_AFTER and (told == began or now - told > SAID_EVERY):
                told = now
                if self.main:
                    console.say(f"waiting   for {self.name(rank)} ({doing}), {now - began:.0f} seconds")
            time.sleep(POLL)

    def failure(self) -> str:
        """Why the run ends, if a process has failed, with its name; else nothing."""
        assert self.store
        key = self.key("failed")
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def stop_if_failed(self) -> None:
        if self.store is not None and (reason := self.failure()):
            raise Failed(reason)

    def fail(self, text: str) -> str:
        """Have every process end because of `text`; the first text that any of them has told, with its name."""
        assert self.store
        named = text if self.nodes == 1 else f"{self.name(self.rank)}: {text}"
        return self.store.compare_set(self.key("failed"), "", named).decode()

    def _lost(self) -> str:
        return f"{self.name(0)} has ended; what it printed says why"

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """End with the others. The error is printed on each machine once, by its first process."""
        if self.size == 1:
            return
        mistake = isinstance(error, UserError)
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                if mistake and not isinstance(error, Failed):
                    self.fail(str(error))
                if isinstance(error, Exception) and not isinstance(error, Interrupted):
                    self._leave()
        self.end_children(60.0 if error is None else 0.0 if isinstance(error, Failed) else FAREWELL)
        if mistake and not self.first_here:
            raise SystemExit(2) from None

    def _leave(self) -> None:
        """Say that this process knows why the run ends; the first, which holds the store, waits for the others."""
        assert self.store
        gone, end = self.store.add(self.key("gone"), 1), time.monotonic() + FAREWELL
        while self.main and gone < self.size and time.monotonic() < end:
            time.sleep(POLL)
            gone = self.store.add(self.key("gone"), 0)

    def end_children(self, seconds: float) -> None:
        """Wait so long for the processes that this one has started, and end those that are still there."""
        end = time.monotonic() + seconds
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(end - time.monotonic(), 0.01))
        for number in (signal.SIGTERM, signal.SIGKILL):
            for child in self.children:
                if child.poll() is None:
                    child.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                for child in self.children:
                    child.wait(3)
