"""Tables that are made for a page of docs/, between two marks of it: `migration.py` and `when_page.py` make them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from rwkv_bone.errors import UserError

END = "<!-- End of what is made. -->"


def table(head: str, rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown. head: the titles of the columns, between bars. A bar inside a cell is escaped."""
    columns = head.split(" | ")
    lines = [f"| {head} |", "|---" * len(columns) + "|"]
    for row in rows:
        assert len(row) == len(columns)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |")
    return "\n".join(lines)


def renewed(page: str, begin: str, made: str) -> str:
    """The text of the page with `made` between its marks; UserError if it has no such marks."""
    before, begin_found, rest = page.partition(begin)
    _, end, after = rest.partition(END)
    if not (begin_found and end):
        raise UserError(f"the page has no lines {begin!r} and {END!r}, between which the tables go")
    return f"{before}{begin}\n\n{made}\n\n{END}{after}"


def write(renew: Callable[[str], str]) -> None:
    """Renew the page that is named on the command line. renew: its text of today, of its text."""
    if len(sys.argv) != 2:
        raise UserError("expected one argument, the page, such as docs/migrating.md")
    page = Path(sys.argv[1])
    try:
        page.write_text(renew(page.read_text(encoding="utf-8")), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{page}: {error.strerror}") from error
