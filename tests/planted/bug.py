"""A planted bug: a text of the source, what stands in its place, and the tests that must fail with it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Bug(NamedTuple):
    """A mistake that somebody could make."""

    file: str  # path below the repository
    old: str  # found there exactly once
    new: str
    tests: str  # pytest arguments: the tests of which one must fail

    def problem(self) -> str:
        """Why it cannot be planted; empty if it can."""
        count = (ROOT / self.file).read_text(encoding="utf-8").count(self.old)
        if count != 1:
            return f"{self.file}: found {count} times, expected once: {self.old!r}"
        return "" if self.new != self.old else f"{self.file}: changes nothing: {self.old!r}"

    def plant(self, root: Path) -> None:
        """Put the bug into the copy of the repository at `root`."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        (root / self.file).write_text(text.replace(self.old, self.new), encoding="utf-8")

    def remove(self, root: Path) -> None:
        """Undo `plant`."""
        (root / self.file).write_bytes((ROOT / self.file).read_bytes())
