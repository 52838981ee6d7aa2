"""What a user types: messages of one line or several, with editing and a history, by Python's readline.

A terminal marks what is pasted, so that a paste of several lines comes as one message. Where it does not, lines that
have come together are one message all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from pathlib import Path

from rwkv_bone.chat.screen import Style

QUOTES = '"""'
KEPT = 1000  # messages of the history
TOGETHER = 0.02  # seconds within which lines that are pasted follow one another


class Lines:
    """Messages from the terminal. history: whether they are kept for the next time."""

    def __init__(self, style: Style, history: bool):
        self._style = style
        self._history = History() if history else None
        self._marked = False  # whether readline knows what was pasted
        with contextlib.suppress(ImportError):  # not everywhere; then a terminal edits as it does
            import readline

            readline.set_auto_history(False)
            self._marked = "libedit" not in (readline.__doc__ or "")
            readline.parse_and_bind("set enable-bracketed-paste on")
            if self._history:
                for message in self._history.messages():
                    readline.add_history(message)

    def message(self) -> str:
        """The next message. EOFError at the end of the input (Ctrl-D), KeyboardInterrupt for Ctrl-C."""
        first = self._line("> ")
        lines = [first]
        if first.lstrip().startswith(QUOTES):
            lines = [first.lstrip().removeprefix(QUOTES)]
            while not lines[-1].rstrip().endswith(QUOTES):
                lines.append(self._line(". "))
            lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
            if len(lines) > 1:
                lines = lines[not lines[0] : len(lines) - (not lines[-1])]
        else:
            while lines[-1].endswith("\\") or (not self._marked and _more_is_there()):
                # A backslash joins to the next line; it is no part of the message.
                lines[-1] = lines[-1].removesuffix("\\")
                lines.append(self._line(". "))
        message = "\n".join(lines)
        self._remember(message)
        return message

    def _line(self, prompt: str) -> str:
        # Bytes that are no UTF-8 come as half characters, which no tokenizer takes.
        return input(self._style.prompt(prompt)).encode("utf-8", "replace").decode("utf-8")

    def _remember(self, message: str) -> None:
        if not message.strip():
            return
        with contextlib.suppress(ImportError):
            import readline

            readline.add_history(message)
        if self._history:
            self._history.add(message)


def _more_is_there() -> bool:
    """Whether another line has come at once, as in a paste that the terminal does not mark."""
    try:
        return bool(select.select([sys.stdin], [], [], TOGETHER)[0])
    except (OSError, ValueError):
        return False


class History:
    """What was typed, in a file of the user's own: a message a line, as JSON. A disk that refuses is let be."""

    def __init__(self) -> None:
        state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
        self.path = Path(state) / "rwkv_bone" / "chat_history"

    def messages(self) -> list[str]:
        """The newest messages, the oldest of them first."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        found = []
        for line in lines[-KEPT:]:
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(message := json.loads(line), str):
                    found.append(message)
        if len(lines) > 2 * KEPT:
            self._write([json.dumps(message) for message in found], os.O_TRUNC)
        return found

    def add(self, message: str) -> None:
        self._write([json.dumps(message)], os.O_APPEND)

    def _write(self, lines: list[str], how: int) -> None:
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | how, 0o600)
            try:
                os.fchmod(descriptor, 0o600)
                os.write(descriptor, "".join(f"{line}\n" for line in lines).encode())
            finally:
                os.close(descriptor)
