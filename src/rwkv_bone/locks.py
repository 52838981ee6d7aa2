"""Locks on files that a dead process does not keep, and which process of which machine someone is.

The kernel frees such a lock when the process that holds it ends, however it ends. Network file systems pass it on to
the other machines (NFS 4, Lustre with flock), keep it within one (mounted with `nolock` or `local_lock`), or have none.
So a lock that was taken says that nobody of this machine holds it; and of other machines only where they share it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import NamedTuple, Protocol

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF}
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class HasDescriptor(Protocol):
    def fileno(self) -> int: ...


class NoLocks(OSError):
    """The file system of a file has no locks."""


def hold(file: int | HasDescriptor) -> bool:
    """Take the lock of an open file, without waiting. True: held from now on, until the file is closed or this process
    ends. False: another process holds it, or this one through another opening of the file.

    file: open for writing, as NFS asks for it, or a folder. NoLocks where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise NoLocks(error.errno, error.strerror) from error
        raise
    return True


class Process(NamedTuple):
    """Which process of which machine, told apart from a later one of the same number."""

    host: str = ""
    pid: int = 0
    start: str = ""  # the machine's boot, the container, and the clock ticks at its start; "" where that is not known

    @classmethod
    def current(cls) -> Process:
        return cls(socket.gethostname(), os.getpid(), started(os.getpid()))

    def is_here(self) -> bool:
        """Whether it is known to be on this machine and still there."""
        return bool(self.start) and self.start == started(self.pid)

    def is_dead(self) -> bool | None:
        """Whether it has ended; None if that cannot be known from here: another machine, another container."""
        if self.host != socket.gethostname():
            return None
        (boot, container), (boot_now, container_now) = _place(self.start), _place(started(os.getpid()))
        if boot == boot_now and container != container_now:
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # it is another user's
        now = started(self.pid)
        return bool(self.start and now and now != self.start)


def started(pid: int) -> str:
    """When a process of this machine started, in a form that can only be compared; "" where that is not known."""
    with contextlib.suppress(OSError, LookupError):
        # The second field, in brackets, is the program's name, which may have brackets and spaces.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return f"{BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')} {fields[19]}"
    return ""


def _place(start: str) -> tuple[str, str]:
    """(boot, container) of what `started` gives."""
    boot, container, *_ = *start.split(), "", ""
    return boot, container
