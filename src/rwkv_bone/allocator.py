"""What a training process on the CPU wants of the C library's allocator, glibc's: memory kept from step to step, and
none kept that fragments.

By default glibc hands a large block back to the system as soon as it is freed, and the top of its heap with it. The
next step gets the same memory again page by page, zeroed: 12 to 15 % of a step's time (docs/measured.md, "The
allocator"). A step that goes over its row in chunks has the opposite trouble: blocks that outlive a chunk lie between
freed ones, which then fit nothing, and the heap grows with the row. Steps whose rows differ in length do the same,
more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

# Of mallopt, as malloc.h numbers them: the size from which a block is mapped for itself, and the free memory at the top
# of the heap above which the top is given back.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
LARGEST_BLOCK, MOST_AT_TOP = 2**30, 2**31 - 1  # bytes; an `int`
SLACK = 2**28  # bytes by which resident memory may grow before what is free within it is looked for
GROWTH = 0.1  # by which resident memory may grow from one step to a later one before what is free is given back
SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


class Heap:
    """glibc's heap: `keep` what is freed, or `trim` it."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        self._least = 0  # bytes resident after the last trim
        self._usual = 0  # after the first step since then; 0: there was none

    def keep(self) -> None:
        """From now on keep freed memory for later blocks. What is free so far is given back."""
        self.give_back()
        self._library.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        self._library.mallopt(M_TRIM_THRESHOLD, MOST_AT_TOP)
        self._least = resident()

    def trim(self) -> None:
        """Give back all free memory, also between blocks, if SLACK bytes have become resident since the last time."""
        if resident() > self._least + SLACK:
            self.give_back()
            self._least = resident()

    def give_back(self) -> None:
        """Give back all free memory."""
        self._library.malloc_trim(ctypes.c_size_t(0))

    def trim_after_step(self) -> None:
        """Give back all free memory if GROWTH more is resident than after the first step since the last time."""
        now = resident()
        if not self._usual:
            self._usual = now
        elif now > self._usual * (1 + GROWTH):
            self.give_back()
            self._usual = 0


@functools.cache
def heap() -> Heap | None:
    """This process's heap; None if it is not glibc's, or the user has chosen: an environment variable with settings
    of the allocator, or a library loaded in its place, is the user's choice.
    """
    if any(name.startswith(SETTINGS) for name in os.environ):  # MALLOC_..., GLIBC_TUNABLES, LD_PRELOAD
        return None
    try:
        library = ctypes.CDLL(None)
        # musl and macOS have none of these.
        found = all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim"))
    except OSError:
        return None
    return Heap(library) if found and resident() else None


def keep() -> None:
    """Once, before the first step on the CPU: see `Heap.keep`."""
    if found := heap():
        found.keep()


def trim() -> None:
    """Between two chunks on the CPU: see `Heap.trim`."""
    if found := heap():
        found.trim()


def trim_after_step() -> None:
    """After each optimiser step on the CPU: see `Heap.trim_after_step`."""
    if found := heap():
        found.trim_after_step()


def give_back() -> None:
    """After the last step on the CPU: see `Heap.give_back`."""
    if found := heap():
        found.give_back()


def resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
