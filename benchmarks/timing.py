"""What the benchmarks share: how a call is timed, what the device can do at best, and where rows go."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

MATRIX = {"cuda": 8192, "cpu": 512}  # side of the square matrices of the ceiling
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
CEILING_ROUNDS = 8
CYCLES = 2.5e9  # of a GPU in a second, rather more than it has
LONGEST_WAIT = 0.05


class Ceilings(NamedTuple):
    """What a device does at best: operations of bf16 products, and bytes read and written, per second."""

    matmul: float
    copy: float


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that work() takes, until the device has done it."""
    synchronise(device)
    begin = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - begin


def queued(work: Callable[[], object], times: int, wait: float) -> tuple[float, float]:
    """(seconds of the GPU for one work(), seconds of the host to queue one), of `times` in a row.

    The GPU is kept busy for about `wait` seconds first, so that it finds the calls queued, as in a training step.
    Otherwise a short call would show the time that the host takes.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(CYCLES * min(wait, LONGEST_WAIT)))
    begin.record()
    started = time.perf_counter()
    for _ in range(times):
        work()
    host = time.perf_counter() - started
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / times, host / times


def ceilings(device: torch.device) -> Ceilings:
    """The best of some products of square matrices in bf16, and of some copies."""
    n, size = MATRIX[device.type], COPY_BYTES[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best = [
        min(elapsed(work, device) for _ in range(CEILING_ROUNDS))
        for work in (lambda: a @ b, lambda: target.copy_(source))
    ]
    return Ceilings(2 * n**3 / best[0], 2 * size / best[1])


def hardware(device: torch.device) -> str:
    """The card's name, or the processor's and how many of its threads are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def append(path: Path | None, row: dict) -> None:
    """Adds a row to a file of rows, if there is one."""
    if path:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
