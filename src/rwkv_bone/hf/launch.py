"""One process of `train_hf.py` for each device of this machine."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
from types import FrameType

from rwkv_bone.devices import usable_cores
from rwkv_bone.errors import Interrupted, UserError
from rwkv_bone.signals import SIGNALS

PR_SET_PDEATHSIG = 1
FIRST = "127.0.0.1"  # the address of the first process


def launch(argv: list[str], devices: int) -> None:
    """Run this command, the script and its arguments, in `devices` processes that meet as torchrun's do.

    UserError if one fails, after it has said why; the others are then ended. A signal is passed on to each of them, and
    Interrupted is raised once they have ended, however long their last step takes.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # our messages say the same
    size = str(devices)
    meet = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": FIRST, "MASTER_PORT": str(_free_port())}
    threads = str(max(1, usable_cores() // devices))
    meet["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
    ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are passed on here
    processes = start_processes(
        "train_hf",
        sys.executable,
        {rank: tuple(argv) for rank in range(devices)},
        {rank: {**meet, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(devices)},
        DefaultLogsSpecs(),
    )
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for pid in processes.pids().values():
            try:
                os.killpg(pid, number)  # each has a session of its own, so that a terminal's Ctrl-C reaches only this
            except ProcessLookupError:
                continue

    for number in SIGNALS:
        if number not in ignored:
            signal.signal(number, pass_on)
    result = processes.wait(period=0.2)
    if result is None or result.is_failed():
        if received:
            raise Interrupted("", received[0])
        raise UserError("a process has failed; its message is above")


def end_with_launcher() -> None:
    """Have the system end this process, if a launcher has started it, when the launcher ends, even by SIGKILL.

    Works on Linux alone.
    """
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind((FIRST, 0))
        return listening.getsockname()[1]
