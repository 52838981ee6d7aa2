"""What a reader of files is, for the harness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reader:
    """make(folder) writes good files and returns what `read` is given. victims: patterns of the files that are damaged;
    None = the file that `make` returns. checksums: whether the file has any, so that no changed value may be accepted.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    victims: tuple[str, ...] = ()
    checksums: bool = False
