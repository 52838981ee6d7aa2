"""Ctrl-C, SIGTERM and a closed terminal during a merge or conversion: what was begun is removed, then it ends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from rwkv_bone.errors import StoppedAtOnce

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within, the first of SIGNALS raises StoppedAtOnce, and later ones do nothing, so that nothing begun is left.

    A signal that the program was started to ignore, as `nohup` does, is ignored. For the main thread alone.
    """
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> None:
        for each in heard:
            signal.signal(each, signal.SIG_IGN)
        raise StoppedAtOnce(number)

    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
