"""What a terminal shows: colours, control characters made visible, the width of a text, lines broken at a width."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata

BOLD, DIM, CYAN, RESET = "\033[1m", "\033[2m", "\033[36m", "\033[0m"
JOINERS = "\u200c\u200d"  # within emoji, and letters of some scripts


def visible(text: str) -> str:
    """The text with every character that would command a terminal, or reorder its line, as its number: \\x1b."""
    return "".join(char if _is_harmless(char) else _number(char) for char in text)


def _is_harmless(char: str) -> bool:
    return char.isprintable() or char in "\n\t" or char in JOINERS or unicodedata.category(char) == "Zs"


def _number(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


class Style:
    """Colours, or none."""

    def __init__(self, color: str = "auto"):
        """color: auto, always or never."""
        wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.on = color == "always" or (color == "auto" and wanted)

    def __call__(self, text: str, code: str) -> str:
        return f"{code}{text}{RESET}" if self.on and code and text else text

    def prompt(self, text: str) -> str:
        """A prompt for readline, which must know what takes no room."""
        return f"\001{BOLD}\002{text}\001{RESET}\002" if self.on else text


def columns() -> int:
    """The width of the terminal; 80 where it does not say."""
    return shutil.get_terminal_size((80, 24)).columns


def width(text: str) -> int:
    """Columns that a text of one line takes: none for marks that combine, two for wide letters."""
    return sum(map(_width, text))


def _width(char: str) -> int:
    if char in JOINERS or unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def wrapped(text: str, wide: int) -> list[str]:
    """The text in lines of at most `wide` columns, broken at spaces where there are any. `wide` is at least 2."""
    lines = []
    for line in text.expandtabs(4).split("\n"):
        while width(line) > wide:
            room, end = wide, 0
            while room >= _width(line[end]):
                room -= _width(line[end])
                end += 1
            space = line.rfind(" ", 1, end + 1)
            cut = space if space > 0 else end
            lines.append(line[:cut])
            line = line[cut:].removeprefix(" ")
        lines.append(line)
    return lines


def broken(text: str) -> str:
    """The text with its lines broken at the width of the terminal."""
    return "\n".join(wrapped(text, columns() - 1))


def padded(text: str, wide: int) -> str:
    return text + " " * (wide - width(text))
