"""What ends a run from outside: Ctrl-C, SIGTERM, a closed terminal, the signals of schedulers.

A program calls `hear` before anything else. From then on a thread hears signals, in any state of the main thread: also
while that waits for another process, or is in C++ code, where no Python handler runs. A run that takes steps has a
`Listener`, which notes the first signal, so that the run can save after its step. Every other signal ends the process
at once, with 128 + its number.

A run that another program calls, as a function, has the `Listener` alone: then a signal that ends the run at once is
raised as StoppedAtOnce, and the program may live on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from rwkv_bone.errors import StoppedAtOnce, status_of

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNALS += tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, name))
# By these somebody wants the run to end. The others of SIGNALS say that something will end it soon.
ORDERS = (signal.SIGINT, signal.SIGTERM)
# Seconds within which a launcher and the system may send the same signal each, to every process of a job.
TOGETHER = 1.0
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
LAST_WORDS = 3.0  # seconds for what a process says when it leaves


class Listener:
    """Notes the first signal if it comes during the steps; a second one, or one outside the steps, ends the run at
    once.

    What comes together is one signal: a terminal that closes sends SIGHUP several times, and a scheduler and a launcher
    may each send the same. Ctrl-C is never counted as sent together. A first SIGTERM after a SIGUSR1 or SIGHUP is only
    a reminder. A signal that the run was started to ignore, as `nohup` does, is ignored.

    received: the number of the signal, or 0. stepping: for the run to set, whether it is within its steps.
    state(): what is saved and how to go on, in words.
    """

    def __init__(self, state: Callable[[], str] = str) -> None:
        self.received = 0
        self.stepping = False
        self.state = state
        self._speaks = False
        self._when: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    def begin(self, speaks: bool) -> None:
        """Hear signals from now on. speaks: say so when one has come, which one process of several does."""
        self._speaks = speaks
        if _program:
            _program.speaks, _program.listener = speaks, self
            return
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)

    def end(self) -> None:
        """Leave signals to what heard them before."""
        if _program and _program.listener is self:
            _program.listener = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def notes(self, number: int) -> bool:
        """Whether a signal that has come is only noted. If not, it ends the run at once."""
        now = time.monotonic()
        together = number != signal.SIGINT and number in self._when and now - self._when[number] < TOGETHER
        reminder = number == signal.SIGTERM and not any(order in self._when for order in ORDERS)
        self._when[number] = now
        if self.received:
            return number == signal.SIGHUP or together or reminder
        if not self.stepping:
            return False
        self.received = number
        if self._speaks:
            _write("\nstopping after this step, to save it (once more: at once)\n")
        return True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.notes(number):
            raise StoppedAtOnce(number)


class _Program:
    """The thread that hears the signals of a whole program, and what it knows."""

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self.speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        self.tell: list[Callable[[int, str], None]] = []  # called before this process ends: status, words
        self.parent = os.getppid() if _dies_with_parent() else 0
        self.numbers = {number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
        self._reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in self.numbers:
            # Only with a handler of Python's does C code write the number.
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        # A process that is forked, by a compiler for instance, would write its signals into the same pipe.
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._hear, name="signals", daemon=True).start()

    def _forget(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in self.numbers:
            signal.signal(number, signal.SIG_DFL)

    def _hear(self) -> None:
        while True:
            for number in os.read(self._reading, 64):
                if number in self.numbers:
                    self._heard(number)

    def _heard(self, number: int) -> None:
        if number == signal.SIGTERM and self.parent and os.getppid() != self.parent:
            # The process that has started this one is dead. Whoever watches over both tells so.
            time.sleep(LAST_WORDS)
            leave(status_of(number))
        listener = self.listener
        if listener is None:
            self.leave(number, "interrupted before the first step: nothing was lost")
        elif not listener.notes(number):
            how = "stopped at once" if listener.received else "interrupted"
            state = listener.state()
            self.leave(number, f"{how}; {state}" if state else how)

    def leave(self, number: int, words: str) -> NoReturn:
        """End all processes of the run because of a signal. words: for the user."""
        status = status_of(number)
        for tell in self.tell:
            tell(status, words)
        leave(status, words if self.speaks else "")


def _dies_with_parent() -> bool:
    """Whether the system sends this process a signal when the one that has started it ends."""
    found = ctypes.c_int()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(found))
    return found.value != 0


_program: _Program | None = None
_leaving = threading.Lock()
_clean: list[Callable[[], None]] = []  # called by `leave`
BEGAN = time.monotonic()  # about when the program was started


def hear() -> None:
    """Hear signals in a thread of their own, from now to the end of this program. The main thread must call it."""
    global _program
    if _program is None and os.name == "posix" and threading.current_thread() is threading.main_thread():
        _program = _Program()


def on_leaving(tell: Callable[[int, str], None]) -> None:
    """Call tell(status, words) before a signal ends this process at once, so that other processes learn of it."""
    if _program:
        _program.tell.append(tell)


def stop_now(number: int, words: str) -> NoReturn:
    """End the run as a signal of this number does outside the steps. words: for the user."""
    if _program:
        _program.leave(number, words)
    raise StoppedAtOnce(number)


@contextlib.contextmanager
def cleaned_by(clean: Callable[[], None]) -> Iterator[None]:
    """In this context, `leave` calls clean() in whatever thread it runs, since no `finally` does anything then."""
    _clean.append(clean)
    try:
        yield
    finally:
        _clean.remove(clean)


def leave(status: int, words: str = "") -> NoReturn:
    """End this process at once and with it all that it has started, whatever its main thread does. words: said last."""
    if not _leaving.acquire(blocking=False):
        time.sleep(2 * LAST_WORDS)  # another thread is about it
    # What is said may wait for a reader, or for a lock of the main thread.
    backstop = threading.Timer(LAST_WORDS, os._exit, [status])
    backstop.daemon = True
    backstop.start()
    kill(descendants())
    for clean in _clean:
        with contextlib.suppress(Exception):
            clean()
    if words:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            # A progress bar has no end of line.
            print(("\n" if sys.stderr.isatty() else "") + words, file=sys.stderr, flush=True)
    os._exit(status)


def obey_parent() -> None:
    """To be called by a worker process: no signal ends it but its parent, and the end of its parent."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants() -> list[int]:
    """The processes that this one has started, and those that they have started. Found on Linux alone."""
    children: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found = [os.getpid()]
    for process in found:  # grows
        found += children.get(process, [])
    return found[1:]


def kill(processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)


def _write(text: str) -> None:
    # print is not safe in a signal handler. The terminal may be gone.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
