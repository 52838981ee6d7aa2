"""The conversation in a terminal: messages and commands in, answers out while they are written.

Ctrl-C ends an answer and not the program. With a second model (--compare), both answer: in columns on a wide terminal,
one after the other on a narrow one.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rwkv_bone.chat.flags import CHANGEABLE, ChatConfig
from rwkv_bone.chat.lines import Lines
from rwkv_bone.chat.screen import BOLD, CYAN, DIM, Style, broken, columns, padded, visible, wrapped
from rwkv_bone.chat.session import Reply, Session
from rwkv_bone.config.fields import check_value, plain
from rwkv_bone.config.other_names import intended_flag
from rwkv_bone.console import counted
from rwkv_bone.errors import UserError
from rwkv_bone.inference.sampling import Sampling
from rwkv_bone.inference.shown import THOUGHT, Shown
from rwkv_bone.inference.voice import Voice, enough_memory

WIDE = 120  # columns from which two answers stand side by side
BESIDE = 35  # columns of a text that stands beside its key
GAP = "  |  "
TEMPLATES = "(the template's)"  # instead of no stop text
ENDED = {
    "length": "the answer has --max_new {max_new} tokens: /settings max_new N gives the next one more",
    "closed": "stopped: what is written stays in the conversation; /undo takes it back",
    "unread": "stopped before the message was read: the conversation is as it was before it",
}


@dataclass(frozen=True)
class Command:
    words: str  # what follows the name, in help
    about: str
    call: Callable[[Talk, str], None]


class Talk:
    """One conversation: its models' sessions, and the settings as they are now."""

    def __init__(self, cfg: ChatConfig, voices: list[Voice], lines: Lines, style: Style):
        self.cfg, self.voices, self.lines, self.style = cfg, voices, lines, style
        self.sessions = [Session(voice, sampling_of(cfg), cfg.system, cfg.undo, cfg.stops) for voice in voices]
        self._leaves = False

    def run(self) -> None:
        """Until /quit or Ctrl-D."""
        for line in [*header(self.voices), "/help lists the commands. Ctrl-C ends an answer, Ctrl-D the program"]:
            self._note(line)
        while not self._leaves:
            print()
            try:
                message = self.lines.message()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                self._note("Ctrl-D or /quit leaves the program")
                continue
            try:
                self.take(message)
            except UserError as error:
                print(broken(f"error: {visible(str(error))}"))
            except KeyboardInterrupt:
                self._note("\nstopped: the conversation is as it was before")

    def take(self, message: str) -> None:
        """Answer a message, or carry out a command. UserError for what cannot be done."""
        if message.startswith("//"):
            message = message[1:]
        elif message.startswith("/"):
            name, _, words = message[1:].partition(" ")
            if name not in COMMANDS:
                meant = (intended_flag(f"--{name}", [f"--{known}" for known in COMMANDS]) or "").removeprefix("--")
                hint = f"did you mean /{meant}? " if meant else ""
                raise UserError(
                    f"/{name} is no command: {hint}/help lists them; a message that begins with / is written with //"
                )
            COMMANDS[name].call(self, words.strip())
            return
        if message.strip():
            self.answer(message)

    def answer(self, message: str) -> None:
        """Have every model answer; what they write is shown while they do."""
        with enough_memory("while the message was answered"):
            replies = [session.answer(message) for session in self.sessions]
            try:
                if len(replies) > 1 and columns() >= WIDE:
                    self._in_columns(replies)
                else:
                    for reply, voice in zip(replies, self.voices, strict=True):
                        if len(replies) > 1:
                            print(self.style(voice.name, BOLD))
                        self._stream(reply, voice)
            except KeyboardInterrupt:
                print()
            finally:
                with _undisturbed():
                    for reply in replies:
                        reply.keep()
        for reply, voice in zip(replies, self.voices, strict=True):
            if told := ENDED.get(reply.ended or ""):
                whose = f"{voice.name}: " if len(replies) > 1 else ""
                self._note(f"({whose}{told.format(max_new=self.cfg.max_new)})")

    def _stream(self, reply: Reply, voice: Voice) -> None:
        shown, empty, last = Shown(voice.wording.opening, voice.wording.several), True, ""
        for pieces in _pieces(reply, shown):
            for kind, text in pieces:
                if kind == THOUGHT and self.cfg.thinking == "hide":
                    continue
                if kind != last and last == THOUGHT:
                    print("\n")
                print(self.style(visible(text), DIM if kind == THOUGHT else ""), end="", flush=True)
                empty, last = False, kind
        print(self.style("(an empty answer)", DIM) if empty else "")

    def _in_columns(self, replies: list[Reply]) -> None:
        """Both answers at the same time; a line is printed when both columns have it."""
        wide = (columns() - 1 - len(GAP)) // 2
        sides = [_Column(reply, voice, self.cfg) for reply, voice in zip(replies, self.voices, strict=True)]
        print(self.style(GAP.join(padded(voice.name[:wide], wide) for voice in self.voices).rstrip(), BOLD))
        printed = 0
        try:
            while not all(side.done for side in sides):
                for side in sides:
                    side.go_on(wide)
                printed = self._rows(sides, printed, wide)
        finally:
            for side in sides:
                side.done = True
            self._rows(sides, printed, wide)

    def _rows(self, sides: list[_Column], printed: int, wide: int) -> int:
        """Print the rows that are certain, from this one on; the number printed so far."""
        rows = [side.rows(wide) for side in sides]
        certain = [len(found) if side.done else len(found) - 1 for found, side in zip(rows, sides, strict=True)]
        last = (
            max(certain)
            if all(side.done for side in sides)
            else min(count if not side.done else 10**9 for count, side in zip(certain, sides, strict=True))
        )
        for number in range(printed, last):
            cells = [found[number] if number < len(found) else "" for found in rows]
            print(GAP.join([padded(cells[0], wide), cells[1]]).rstrip(), flush=True)
        return max(printed, last)

    def _note(self, text: str) -> None:
        print(self.style(broken(visible(text)), DIM))

    def _table(self, rows: dict[str, str]) -> None:
        """Print what each key means: in a column of its own or, on a narrow terminal, below it."""
        wide = max(map(len, rows)) + 2
        beside = columns() - 1 - wide >= BESIDE
        for key, about in rows.items():
            margin = " " * (wide if beside else 2)
            lines = wrapped(about, max(columns() - 1 - len(margin), 2))
            print(self.style(key.ljust(wide) if beside else f"{key}\n{margin}", CYAN) + f"\n{margin}".join(lines))

    # Commands.

    def help(self, words: str) -> None:
        """List the commands."""
        self._table({f"/{name} {command.words}": command.about for name, command in COMMANDS.items()})
        print(
            broken(
                "A paste is one message, however many lines it has. To type several lines, begin and end with three "
                "double quotes, or end a line with \\. A message that begins with / is written with //. Ctrl-C ends "
                "an answer, Ctrl-D the program."
            )
        )

    def quit(self, words: str) -> None:
        self._leaves = True

    def reset(self, words: str) -> None:
        for session in self.sessions:
            session.reset()
        self._note("a new conversation begins")

    def undo(self, words: str) -> None:
        turn = self._take_back()
        self._note(f"taken back: {_short(turn)}; {counted(len(self.sessions[0].turns), 'turn')} left")

    def retry(self, words: str) -> None:
        message = self._take_back()
        self._note(f"> {_short(message)}")
        self.answer(message)

    def _take_back(self) -> str:
        """The message of the last turn, which is undone in every session that has it."""
        turns = max(len(session.turns) for session in self.sessions)
        undone = [session.undo() for session in self.sessions if len(session.turns) == turns]
        return undone[0].message

    def save(self, words: str) -> None:
        path = self._file(words)
        self.sessions[0].save(path)
        self._note(f"{path}: {counted(len(self.sessions[0].turns), 'turn')}, {path.stat().st_size:,} bytes")

    def load(self, words: str) -> None:
        path, session = self._file(words), self.sessions[0]
        session.load(path)
        self._note(f"{path}: {counted(len(session.turns), 'turn')}; the conversation goes on after")
        for turn in session.turns[-1:]:
            print(self.style("> ", BOLD) + visible(turn.message))
            self._stream(_Said(turn.answer), session.voice)  # type: ignore[arg-type]

    def _file(self, words: str) -> Path:
        if len(self.sessions) > 1:
            raise UserError("/save and /load are for one model's conversation: start without --compare")
        if not words:
            raise UserError("name a file: /save FILE, /load FILE")
        path = Path(words).expanduser()
        return path if path.suffix else path.with_suffix(".pth")

    def system(self, words: str) -> None:
        if not words:
            self._note(f"system: {self.sessions[0].system or '(none)'}")
            return
        for voice in self.voices:
            voice.wording.check_system(words)
        for session in self.sessions:
            session.system = words
        self.reset("")

    def settings(self, words: str) -> None:
        """Show what can be changed, or change one."""
        specs = {spec.name: spec for spec in fields(ChatConfig) if spec.name in CHANGEABLE}
        if not words:
            values = {name: _worded(getattr(self.cfg, name)) or TEMPLATES for name in CHANGEABLE}
            self._table({f"{name} {value}": specs[name].metadata["help"] for name, value in values.items()})
            self._note("/settings NAME VALUE changes one")
            return
        name, _, value = words.partition(" ")
        name = name.removeprefix("--")
        if name not in specs:
            raise UserError(f"/settings {name}: expected one of {', '.join(CHANGEABLE)}")
        self.cfg = changed(self.cfg, name, value.strip())
        for session in self.sessions:
            session.sampling, session.stops = sampling_of(self.cfg), self.cfg.stops
        self._note(f"{name} {_worded(getattr(self.cfg, name)) or TEMPLATES}")


COMMANDS = {
    "help": Command("", "this list", Talk.help),
    "undo": Command("", "take the last message and its answer back", Talk.undo),
    "retry": Command("", "take the last answer back and have another one written", Talk.retry),
    "reset": Command("", "begin a new conversation", Talk.reset),
    "system": Command("[TEXT]", "begin a new conversation under this system text; without TEXT show it", Talk.system),
    "settings": Command("[NAME VALUE]", "show the settings, or change one: /settings temperature 0.7", Talk.settings),
    "save": Command("FILE", "save the conversation: its text, and the state of the model that has read it", Talk.save),
    "load": Command("FILE", "go on with a saved conversation", Talk.load),
    "quit": Command("", "leave, as Ctrl-D does", Talk.quit),
}


class _Said:
    """An answer that is there already, as one on its way."""

    def __init__(self, text: str):
        self._texts = iter([text] if text else [])

    def __iter__(self) -> Iterator[str]:
        return self._texts


class _Column:
    """One of two answers that are written at the same time."""

    def __init__(self, reply: Reply, voice: Voice, cfg: ChatConfig):
        self._reply, self._shown = reply, Shown(voice.wording.opening, voice.wording.several)
        self._hides, self._text, self._last, self.done = cfg.thinking == "hide", "", "", False

    def go_on(self, wide: int) -> None:
        """Write one more piece."""
        if self.done:
            return
        piece = next(self._reply, None)
        self.done = piece is None
        for kind, text in self._shown.end() if piece is None else self._shown.add(piece):
            if not (kind == THOUGHT and self._hides):
                self._text += ("\n\n" if kind != self._last == THOUGHT else "") + visible(text)
                self._last = kind

    def rows(self, wide: int) -> list[str]:
        return wrapped(self._text, wide)


def header(voices: list[Voice]) -> list[str]:
    """Which models these are, and how a message is written."""
    lines = [f"model     {voices[0].header}", *(f"compare   {voice.header}" for voice in voices[1:])]
    wording = voices[0].wording
    how = (
        "turns are kept"
        if wording.several
        else "a message is read as it is typed, spaces included, and the next one begins anew"
    )
    return [*lines, f"template  {wording.template.name} ({voices[0].chosen}): {how}; --template chooses another"]


def sampling_of(cfg: ChatConfig) -> Sampling:
    """The settings of sampling."""
    return Sampling(**{spec.name: getattr(cfg, spec.name) for spec in fields(Sampling) if hasattr(cfg, spec.name)})


def changed(cfg: ChatConfig, name: str, text: str) -> ChatConfig:
    """The settings with one of them as a user types it. UserError for what it cannot be."""
    spec = next(spec for spec in fields(ChatConfig) if spec.name == name)
    kind: Any = type(spec.default)
    if kind is tuple:
        value: Any = tuple(text.split())
    elif not text:
        raise UserError(f"/settings {name}: expected a value, such as /settings {name} {_worded(spec.default)}")
    else:
        try:
            value = kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise UserError(f"/settings {name} {text}: expected {expected}") from None
    try:
        check_value(spec, value)
        return replace(cfg, **{name: value})
    except UserError as error:
        raise UserError(str(error).replace(f"--{name}", f"/settings {name}", 1)) from None


def _worded(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(text.replace("\n", "\\n") for text in value)
    return plain(value) if isinstance(value, int | float) else str(value)


def _pieces(reply: Iterator[str] | Reply, shown: Shown) -> Iterator[list[tuple[str, str]]]:
    """What is to be shown of an answer, piece by piece."""
    for text in reply:
        yield shown.add(text)
    yield shown.end()


def _short(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Within, Ctrl-C does nothing."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
