"""Importing large libraries."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """In this context no garbage is looked for, and what was made in it is never looked through later.

    A library makes hundreds of thousands of objects that stay. Looking through them again and again while they are
    made takes a quarter of the time of the import.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
