"""Readers that do what none should, so that the harness is seen to find it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkv_bone.errors import UserError
from tests.fuzz.reader import Reader


def make(folder: Path) -> Path:
    (folder / "file").write_bytes(b"the good bytes of a file")
    return folder / "file"


def bad(fault: Callable[[], Any]) -> Callable[[Path], Any]:
    """Reads a good file well."""
    return lambda path: "good" if path.read_bytes() == b"the good bytes of a file" else fault()


def raising(error: Exception) -> Callable[[], Any]:
    def fault() -> Any:
        raise error

    return fault


READERS = (
    Reader("refused", make, bad(raising(UserError("a sentence"))), checksums=True),
    Reader("read, other values", make, bad(lambda: "other values")),
    Reader("changed", make, bad(lambda: "other values"), checksums=True),
    Reader("traceback", make, bad(raising(KeyError("x")))),
    Reader("memory", make, bad(lambda: len(b"x" * (200 << 20)))),
    Reader("died", make, bad(lambda: os.kill(os.getpid(), signal.SIGSEGV))),
)
