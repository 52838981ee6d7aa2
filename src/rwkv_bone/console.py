"""What a program shows: output that never ends it, progress bars, and counts with their noun.

A reader of a pipe goes away (`| head`), a terminal is closed, a disk is full, an encoding lacks a character: none of
this may cost a run its results. `exit_status` calls `guard` once, before a program says anything.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer
    from tqdm import tqdm

Item = TypeVar("Item")

NAMES = {1: "standard output", 2: "standard error"}
# What writes to a pipe, a terminal or a file that is gone for good; after a full disk the next write may succeed.
GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET}
HELD = 1 << 20  # bytes kept in memory of output that could not be written, until there is a file for it
LAYOUT = "{percentage:3.0f}%  {remaining} left  {desc} [{bar}]"
UNKNOWN_WIDTH = 79  # columns, of a terminal that says it has none


class OutputLost(Exception):
    """Standard output cannot be written, of a program whose output is its result. reader_left: `| head` has ended."""

    def __init__(self, reason: OSError):
        super().__init__(f"{NAMES[1]} could not be written: {reason.strerror}")
        self.reader_left = reason.errno == errno.EPIPE


class _Lasting(io.FileIO):
    """A file descriptor of this process, to which writing does not fail.

    What cannot be written goes to the file that `keep_lost_output` names. needed: raise OutputLost instead.
    """

    def __init__(self, descriptor: int, needed: bool):
        super().__init__(descriptor, "w", closefd=False)
        self.needed, self.gone = needed, False

    def write(self, data: Buffer) -> int:
        if not self.gone:
            try:
                return self._write(data)
            except OSError as error:
                self.fail(error)
        lost = bytes(data)
        _kept.add(lost)
        return len(lost)

    def _write(self, data: Buffer) -> int:
        # None: somebody else has made the terminal non-blocking, and it is full.
        while (written := super().write(data)) is None:
            select.select([], [self.fileno()], [])
        return written

    def fail(self, error: OSError) -> None:
        """Take note that a write has failed."""
        if self.needed or error.errno in GONE:
            self.gone = True
            # Nobody else is to meet the broken pipe: a library, or what this process starts.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if self.needed:
            raise OutputLost(error)
        _kept.begin(self.fileno(), error)


class _Kept:
    """Output that could not be written, and the file for it, made when there is some."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.bytes = bytearray()
        self.reasons: dict[int, OSError] = {}  # of each stream that has failed
        self.told = False

    def begin(self, descriptor: int, error: OSError) -> None:
        if descriptor not in self.reasons:
            self.reasons[descriptor] = error
            self.add(f"({NAMES[descriptor]} could not be written: {error.strerror}. It would have said:)\n".encode())
            if self.path:
                self.tell()

    def tell(self) -> None:
        """Say once, where somebody may still read it, that standard output has failed."""
        error = self.reasons.get(1)
        # Nobody who ends the reader of a pipe, or closes a stream, wants to be told so.
        if self.told or not error or not (self.path or error.errno not in (errno.EPIPE, errno.EBADF)):
            return
        self.told = True
        where = f": what it would have said is in {self.path}" if self.path else ""
        print(f"warning: standard output could not be written ({error.strerror}){where}", file=sys.stderr)

    def add(self, data: bytes) -> None:
        self.bytes += data[: HELD - len(self.bytes)]
        self.flush()

    def flush(self) -> None:
        if not (self.path and self.bytes):
            return
        try:
            with open(self.path, "ab") as file:
                file.write(self.bytes)
        except OSError:
            return  # there is nobody left to tell
        self.bytes.clear()


_kept = _Kept()


def guard(needed: bool = False) -> None:
    """Make standard output and standard error ones to which writing never fails, and that can show any character.

    What the encoding lacks is shown as its number, \\u4f60. A stream that is closed or that breaks later is lost alone:
    the program goes on. needed: standard output is the result of this program, so that OutputLost ends it.
    """
    if os.name != "posix":
        return
    for descriptor in (0, 1, 2):
        # A file opened later would get the number of a closed stream, and with it what libraries print.
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # A stream of other making, such as a test's, is left alone.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lasting(1, sys.stdout, needed)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lasting(2, sys.stderr, False)


def _lasting(descriptor: int, stream: TextIO | None, needed: bool) -> TextIO:
    if stream is not None:
        stream.flush()
    raw = _Lasting(descriptor, needed and stream is not None)
    if stream is None:
        raw.fail(OSError(errno.EBADF, "it is closed"))
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        # write_through: python -u, or PYTHONUNBUFFERED.
        line_buffering=descriptor == 2 or raw.isatty() or getattr(stream, "write_through", False),
    )


def keep_lost_output(path: Path) -> None:
    """From now on, append to this file what standard output and standard error cannot take."""
    _kept.path = path
    _kept.flush()
    _kept.tell()


def tell_lost_output() -> None:
    """Say that standard output could not be written, if that is so and has not been said."""
    _kept.tell()


def say(line: str, end: str = "\n") -> None:
    """Print a line, at once, and above a progress bar if there is one."""
    if "tqdm" in sys.modules and sys.stdout.isatty():
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stdout):
            print(line, end=end, flush=True)
    else:
        print(line, end=end, flush=True)


def progress_bar(
    total: int | None,
    doing: str = "",
    layout: str = LAYOUT,
    *,
    stream: TextIO | None = None,
    delay: float = 2,
    leave: bool = False,
    **options: Any,
) -> tqdm:
    """A bar that fits the terminal, whatever its width is or becomes.

    Nothing is drawn where `stream` is no terminal, nor by the processes that a run starts for its other devices.
    doing: `merging`. layout: tqdm's `bar_format`; what does not fit is cut at the right, so that the most important
    comes first. stream: standard error if None. delay: seconds before it appears; leave: it stays when it is done.
    """
    from tqdm import tqdm

    stream = stream or sys.stderr
    shown = stream.isatty() and os.environ.get("RANK", "0") == "0"
    known = not shown or columns(stream) > 0
    return tqdm(
        total=total,
        desc=doing,
        bar_format=layout,
        file=stream,
        delay=delay,
        leave=leave,
        ascii=".#",
        disable=not shown,
        dynamic_ncols=known,
        ncols=None if known else UNKNOWN_WIDTH,
        **options,
    )


def with_bar(items: Iterable[Item], total: int, doing: str) -> Iterator[Item]:
    """The items, with a bar on a terminal where they take longer than two seconds. doing: `merging`."""
    with progress_bar(total, doing) as bar:
        for item in items:
            yield item
            bar.update()


def columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def counted(number: int, noun: str, nouns: str = "") -> str:
    """`1 step`, `1,200 steps`. nouns: the plural, where it is not `noun` with an s."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"
