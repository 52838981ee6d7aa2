"""The shim from Python: how it is compiled and told what to do, and what it records."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("shim.c")
COMPILERS = ("cc", "gcc", "clang", "g++")
# The kinds of operations, in the order of shim.c. `open` is of a file that is there, `create` of a new one.
KINDS = ("open", "create", "write", "sync", "rename", "unlink", "link", "truncate", "mkdir", "rmdir")
CHANGES = KINDS[1:]  # what a kill can leave half done
RECORD = struct.Struct("<iiQqqqq")


def obstacle() -> str:
    """Why there can be no shim on this machine; "" if there can."""
    if not sys.platform.startswith("linux"):
        return f"file operations are intercepted with Linux's LD_PRELOAD, and this is {sys.platform}"
    return "" if _compiler() else f"no C compiler ({', '.join(COMPILERS)}) to make the shim with"


def _compiler() -> str:
    from shutil import which

    return next((name for name in COMPILERS if which(name)), "")


def compile_shim(folder: Path) -> Path:
    """The shared library, made in `folder` unless it is there."""
    library = folder / "shim.so"
    if not library.exists():
        flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-x", "c"]
        subprocess.run([_compiler(), *flags, "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
    return library


@dataclass(frozen=True)
class Faults:
    """What happens to the file operations of a process below a folder. Numbers are of operations, from 1; 0: none.

    kinds: those that count. kill_at: SIGKILL, in the middle of a write and before anything else, or `delay`
    microseconds after it. fail_at: it does nothing and fails with `error`. trace: the file to record into.
    """

    folder: str
    kinds: tuple[str, ...] = KINDS
    kill_at: int = 0
    delay: int = -1
    fail_at: int = 0
    error: str = "ENOSPC"
    trace: str = ""

    @property
    def _numbers(self) -> tuple[int, int, int, int, int]:
        kinds = sum(1 << KINDS.index(kind) for kind in self.kinds)
        return kinds, self.kill_at, self.delay, self.fail_at, getattr(errno, self.error)

    def begin(self) -> None:
        """From now on, in this process, which the shim must be preloaded into."""
        library = ctypes.CDLL(None)
        library.faults_set.argtypes = [
            ctypes.c_char_p, ctypes.c_uint, *[ctypes.c_long] * 3, ctypes.c_int, ctypes.c_char_p,
        ]  # fmt: skip
        library.faults_set(os.fsencode(self.folder), *self._numbers, os.fsencode(self.trace))

    def environment(self, library: Path) -> dict[str, str]:
        """For a process that is started: its own starts, as other ranks, have none."""
        assert not self.trace
        words = " ".join(map(str, self._numbers))
        return {"LD_PRELOAD": str(library), "FAULTS": f"{words} {self.folder}"}

    def to_dict(self) -> dict:
        return asdict(self)


class Operation(NamedTuple):
    """One that took place. number: among those that counted; file: inode; offset: of data; truncate: the size."""

    kind: str
    number: int
    file: int
    offset: int
    path: str
    other: str  # the new name
    data: bytes


def read_trace(path: Path) -> list[Operation]:
    """The operations in their order. Before a sync stands a write of all that the file holds, which has no number."""
    content, place, found = path.read_bytes(), 0, []

    def take(size: int) -> bytes:
        nonlocal place
        place += size
        return content[place - size : place]

    while place < len(content):
        kind, number, file, offset, size, first, second = RECORD.unpack(take(RECORD.size))
        path_text, other = os.fsdecode(take(first)), os.fsdecode(take(second))
        found.append(Operation(KINDS[kind], number, file, offset, path_text, other, take(size)))
    return found
