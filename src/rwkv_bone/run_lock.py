"""The lock of a results folder: two runs never work in one.

The file `.lock` in the folder says which process holds it, and the kernel keeps its lock for as long as that process
lives (`locks.py`). Where the file system has no locks, or keeps them from other machines, the file itself is the lock:
it is void once its process has ended, which only the machine of that process can tell.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rwkv_bone import signals
from rwkv_bone.checkpoints import make_folder
from rwkv_bone.errors import UserError
from rwkv_bone.locks import NoLocks, Process, hold

NAME = ".lock"
MOUNTS = Path("/proc/self/mounts")
# Options of a network file system with which its locks are those of one machine.
LOCAL = {"nolock", "local_lock=all", "local_lock=flock", "localflock"}
PATIENCE = 1.0  # seconds in which a process that has taken a lock says who it is


class Holder(NamedTuple):
    """Who holds a folder."""

    process: Process
    since: str  # local time, for people

    @classmethod
    def current(cls) -> Holder:
        return cls(Process.current(), time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def read(cls, text: str) -> Holder | None:
        """The inverse of `text`; None for anything else."""
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            found = json.loads(text)
            return cls(Process(str(found["host"]), int(found["pid"]), str(found["start"])), str(found["since"]))
        return None

    def text(self) -> str:
        return json.dumps({**self.process._asdict(), "since": self.since}) + "\n"


@contextlib.contextmanager
def held(folder: Path, flag: str = "--proj_dir") -> Iterator[None]:
    """Hold `folder` for this process, and make it if it is not there; it goes again if nothing is in it at the end.

    flag: by which the user named it. UserError if another run holds it, or if the machine refuses the folder.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]

    def remove_made() -> None:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()

    def leave_nothing() -> None:
        # The main thread may still write: the lock itself is held until this process has ended.
        if missing and [path.name for path in folder.iterdir()] == [NAME]:
            (folder / NAME).unlink()
            remove_made()

    try:
        lock = _Lock(folder, flag)
        try:
            with signals.cleaned_by(leave_nothing):
                yield
        finally:
            lock.release()
    finally:
        remove_made()


def holder(folder: Path) -> Holder | None:
    """Who works in `folder` now, as far as its lock tells; None if nobody does. Only reads."""
    with contextlib.suppress(OSError):
        found = Holder.read((folder / NAME).read_text(encoding="utf-8", errors="replace"))
        return None if found is None or found.process.is_dead() else found
    return None


class _Lock:
    """A lock that was taken. A process that is forked off does not have it."""

    def __init__(self, folder: Path, flag: str):
        self.folder, self.path, self._mine = folder, folder / NAME, Holder.current()
        self._flag = flag
        self._descriptor = self._take()
        _open.add(self._descriptor)

    def release(self) -> None:
        if os.getpid() != self._mine.process.pid:
            return
        # While it is held: who opened this file before sees that it is not the one at the path any more.
        with contextlib.suppress(OSError):
            if Holder.read(self._text()) == self._mine:
                self.path.unlink()
        _open.discard(self._descriptor)
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def _take(self) -> int:
        while True:
            try:
                make_folder(self.folder)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # a run that was refused has just removed the folder that it had made
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"{self._flag} {self.folder} is not a writable folder: {reason}") from error
            try:
                if self._hold(descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _hold(self, descriptor: int) -> bool:
        """Lock the open file. False if it is not the one at the path any more. UserError if another process has it."""
        try:
            if not _are_shared(self.folder):
                raise NoLocks
            if not hold(descriptor):
                raise self._in_use()
        except NoLocks:
            self._replace()
            return True
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                with contextlib.suppress(OSError):  # it only tells others who has the lock
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, self._mine.text().encode(), 0)
                return True
        return False

    def _replace(self) -> None:
        """Take a lock that is only a file: put one in its place if its process has ended."""
        text = self._text()
        holder = Holder.read(text)
        if text and not (holder and holder.process.is_dead()):
            raise self._in_use(f"; if it has ended, remove {self.path}")
        new = self.path.with_name(f"{NAME}.{secrets.token_hex(8)}")
        new.write_text(self._mine.text(), encoding="utf-8")
        os.replace(new, self.path)
        # Several may have found the old one void; the last of them has it.
        time.sleep(PATIENCE)
        if Holder.read(self._text()) != self._mine:
            raise self._in_use()

    def _in_use(self, remedy: str = "") -> UserError:
        # It says who it is right after it has taken the lock.
        until = time.monotonic() + PATIENCE
        while not (holder := Holder.read(self._text())) or holder.process.is_dead():
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        who = f"another process, which holds {self.path}"
        if holder:
            process = holder.process
            who = f"process {process.pid} on {process.host}, since {holder.since}"
        return UserError(
            f"{self._flag} {self.folder} is in use by another run ({who}): wait until it has ended, or stop it; or "
            f"give another {self._flag}{remedy}"
        )

    def _text(self) -> str:
        with contextlib.suppress(OSError):
            return self.path.read_text(encoding="utf-8", errors="replace")
        return ""


def _are_shared(folder: Path) -> bool:
    """Whether every machine that sees this folder sees its locks, as far as the table of mounts says."""
    place, options = "", ""
    with contextlib.suppress(OSError):
        for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
            _, point, _, found, *_ = line.split()
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)
            if len(point) >= len(place) and folder.resolve().is_relative_to(point):
                place, options = point, found
    return not LOCAL & set(options.split(","))


_open: set[int] = set()  # descriptors of the locks that this process has


def _forget() -> None:
    """In a forked process: it would keep the lock after the death of the run."""
    for descriptor in _open:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _open.clear()


os.register_at_fork(after_in_child=_forget)
