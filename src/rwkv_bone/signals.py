"""Ctrl-C, SIGTERM and a closed terminal: noted during a step, so that the run can end after it."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any

from rwkv_bone.errors import StoppedAtOnce

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Listener:
    """Notes the first signal if it comes during the steps; a second one, or one outside the steps, ends the run at
    once. But not a second SIGHUP, since a terminal that closes sends several. A signal that the run was started to
    ignore, as `nohup` does, is ignored.

    received: the number of the signal, or 0. stepping: for the run to set, whether it is within its steps.
    """

    def __init__(self) -> None:
        self.received = 0
        self.stepping = False
        self._speaks = False
        self._before: dict[int, Any] = {}

    def begin(self, speaks: bool) -> None:
        """Hear signals from now on. speaks: say so when one has come, which one process of several does."""
        self._speaks = speaks
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)

    def end(self) -> None:
        """Leave signals to what heard them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGHUP:
            return
        if self.received or not self.stepping:
            raise StoppedAtOnce(number)
        self.received = number
        if self._speaks:
            # print is not safe in a signal handler. The terminal may be gone.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step, to save it (once more: at once)\n")
