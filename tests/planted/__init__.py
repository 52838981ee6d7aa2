"""Bugs that the tests are known to find. Each file here is a table of them; `python -m tests.planted` plants them."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.planted.bug import Bug


def tables() -> dict[str, tuple[Bug, ...]]:
    """{name: its bugs} of every table."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem[0] != "_")
    return {name: importlib.import_module(f"tests.planted.{name}").BUGS for name in names if name not in ("bug", "run")}
