"""What the benchmarks share: how a call is timed, what the device can do at best, and where rows go."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

MATRIX = {"cuda": 8192, "cpu": 512}  # side of the square matrices of the ceiling
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
CEILING_ROUNDS = 8
CYCLES = 2.5e9  # of a GPU in a second, rather more than it has
LONGEST_WAIT = 0.05


class Ceilings(NamedTuple):
    """What a device does at best: operations of matrix products, and bytes read and written, per second."""

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


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that work() takes of the device: of the clock on a GPU, on a CPU processor time of all threads.

    Other processes disturb processor time less than the clock. Threads that wait for each other spin, which counts: on
    a busy machine set OMP_NUM_THREADS=1.
    """
    if device.type == "cuda":
        return elapsed(work, device)
    begin = time.process_time()
    work()
    return time.process_time() - begin


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that work() holds at once, beyond those that were there before.

    On a CPU the profiler counts them, so what the C library keeps of freed blocks is not among them. It also notes what
    was freed that was there before: nothing should be.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = most = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def middle_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Relative difference of two lists of gradients: that of the middle one of their tensors.

    With random weights a norm may divide the first row of a document by almost nothing. In bf16 some tensors are then
    far off, on either side: six such layers of 128 are 5 % from fp32 in the middle. A sharp check needs fp32.
    """
    pairs = [(mine.double(), other.double()) for mine, other in zip(ours, theirs, strict=True)]
    return statistics.median(float((mine - other).norm() / mine.norm()) for mine, other in pairs)


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


def ceilings(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, clock: Callable[..., float] = elapsed
) -> Ceilings:
    """The best of some products of square matrices of this dtype, and of some copies; clock: `elapsed` or `seconds`."""
    n, size = MATRIX[device.type], COPY_BYTES[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best = [
        min(clock(work, device) for _ in range(CEILING_ROUNDS))
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
