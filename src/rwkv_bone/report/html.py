"""HTML as text in which nothing but this file's own tags is ever markup, and numbers as people read them."""

from __future__ import annotations

import json
import math
import re
from html import escape
from typing import Any

EMPTY_TAGS = {"meta", "circle", "path", "line", "rect"}  # that are never closed by a tag of their own in this project
# Control characters, which no browser shows, and halves of characters, which UTF-8 cannot hold.
UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
NONE = "\N{EN DASH}"  # where there is no number


class Html(str):
    """Text that is markup already."""


def text(value: Any) -> Html:
    """A value as text of a page: escaped, what cannot be shown as its number. Markup stays as it is."""
    if isinstance(value, Html):
        return value
    return Html(escape(UNSHOWABLE.sub(lambda found: f"\\x{ord(found[0]):02x}", str(value))))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """`<name attributes>children</name>`. A trailing _ of an attribute is dropped, _ becomes -; None leaves it out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in EMPTY_TAGS and not children:
        return Html(f"<{name}{shown}/>")
    return Html(f"<{name}{shown}>{join(*children)}</{name}>")


def join(*children: Any) -> Html:
    return Html("".join(map(text, children)))


def table(head: list[Any], rows: list[list[Any]], caption: str = "", numbers: bool = True) -> Html:
    """A table that scrolls sideways where it is too wide. The first cell of a row names it; numbers: the others are."""
    kind = "numbers" if numbers else "words"
    # On a narrow screen a table of words has its headings beside the cells.
    heads = [None if numbers else name for name in head[1:]]
    body = [
        tag("tr", tag("th", first, scope="row"), *(tag("td", c, data_head=h) for c, h in zip(rest, heads, strict=True)))
        for first, *rest in rows
    ]
    inner = join(
        tag("caption", caption) if caption else "",
        tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))),
        tag("tbody", *body),
    )
    # What scrolls has to be reachable by keyboard.
    return tag("div", tag("table", inner, class_=kind), class_="scroll", tabindex=0, role="region", aria_label=caption)


def embedded(content: Any) -> Html:
    """A value as JSON that can stand inside a script element: it holds no <, > or &."""
    written = json.dumps(content, separators=(",", ":"))
    return Html(written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def number(value: float | None, digits: int = 4) -> str:
    """Significant digits, thousands separated: 0.0069, 1.820, 15,400; a dash for no number."""
    if value is None or not math.isfinite(value):
        return NONE
    if value and not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{digits - 1}e}"
    before = max(math.floor(math.log10(abs(value))) + 1, 1) if value else 1
    return f"{value:,.{max(digits - before, 0)}f}"


def loss(value: float | None) -> str:
    """Nats per token, to four places as the terminal shows them."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.4f}"


def change(value: float | None) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:+.4f}"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.1%}"


def duration(seconds: float) -> str:
    """47 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"


def shortened(words: str, most: int) -> str:
    """The beginning of a long text, and how much is left out."""
    return words if len(words) <= most else f"{words[:most]} ... {len(words) - most:,} more characters"


def shown(value: Any) -> str:
    """A setting's value as one types it."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list):
        return shortened(" ".join(map(str, value)), 200) or NONE
    return f"{value:g}" if isinstance(value, float) else shortened(str(value), 200) or NONE
