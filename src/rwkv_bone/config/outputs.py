"""What the name of an output says about its form."""

from __future__ import annotations

from pathlib import Path


def suffix_of(name: str) -> str:
    """The suffix that says what a file is; "" for a folder's name, such as x/ or RWKV7-1.5B."""
    suffix = Path(name).suffix
    return "" if name.endswith("/") or suffix[1:2].isdigit() else suffix
