"""The conversation in a terminal: keys are typed into a pseudo-terminal, and what it shows is read."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from rwkv_bone.chat.flags import ChatConfig
from rwkv_bone.chat.lines import History
from rwkv_bone.chat.screen import Style
from rwkv_bone.chat.talk import Talk, changed
from rwkv_bone.errors import UserError
from tests.chat.scripted import has_read, scripted_voice
from tests.conftest import REPOSITORY, python_path

LIMIT = 120  # seconds
# A conversation with the scripted model in place of one that is loaded. Its second answer waits in the middle.
PROGRAM = """
import sys, time
from rwkv_bone.chat import load
from tests.chat.scripted import scripted_voice
def slowly(count):
    if decoder.texts[0].startswith(" Slow") and count > 8:
        time.sleep(0.05)
voice = scripted_voice("world", " Hello \\x1b[31mred\\x1b[0m\\x07.|", on_step=slowly)
decoder = voice.decoder
read = decoder.read
def reading(ids, state=None):
    text = bytes(ids).decode()
    decoder.texts[0] = " Slow" + "ly" * 2000 if "slow" in text else " Hello \\x1b[31mred\\x1b[0m\\x07.|"
    decoder.texts[0] = f" {len(text.split(chr(10)))} lines.|" if "paste" in text else decoder.texts[0]
    return read(ids, state)
decoder.read = reading
load.load_voices = lambda cfg: [voice]
from rwkv_bone.chat.main import main
from rwkv_bone.errors import exit_status
sys.argv[1:] = ["--load_model", "scripted.pth"]
sys.exit(exit_status(lambda: main("chat"), shows=True))
"""


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, folder):
        self.screen = ""
        environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        environment |= {
            "PYTHONPATH": python_path(),
            "XDG_STATE_HOME": str(folder),
            "TERM": "xterm-256color",
        }
        self._master, slave = pty.openpty()
        command = [sys.executable, "-c", PROGRAM]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=REPOSITORY,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: _take_terminal(slave),
        )
        os.close(slave)

    def wait_for(self, pattern: str, again: str = "") -> str:
        """What was shown up to the first match; the next call begins after it.

        again: typed once more where nothing comes: input() misses a Ctrl-C between its prompt and its wait for a key.
        """
        end = time.monotonic() + LIMIT
        while not (found := re.search(pattern, self.screen)):
            rest = max(0, end - time.monotonic())
            ready, _, _ = select.select([self._master], [], [], min(rest, 5) if again else rest)
            if not ready and again and rest:
                self.type(again)
                continue
            assert ready, f"{pattern!r} did not come; the screen: {self.screen!r}"
            try:
                piece = os.read(self._master, 1 << 16)
            except OSError:  # the program has ended
                piece = b""
            assert piece, f"{pattern!r} did not come before the end; the screen: {self.screen!r}"
            self.screen += piece.decode("utf-8", "replace")
        shown, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return shown

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def status(self) -> int:
        return self.process.wait(LIMIT)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._master)


def _take_terminal(slave: int) -> None:
    import fcntl
    import termios

    # A shell that starts tests in the background has them ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


PROMPT = r"> "


def test_a_conversation_in_a_terminal(tmp_path):
    terminal = Terminal(tmp_path)
    try:
        start = terminal.wait_for(PROMPT)
        assert "template  world (--template): turns are kept" in start
        assert "\x1b[?2004h" in start  # asks the terminal to mark what is pasted
        # Ctrl-C where nothing is written says how to leave, and does not.
        terminal.type("\x03")
        terminal.wait_for("Ctrl-D or /quit leaves", again="\x03")
        terminal.wait_for(PROMPT)
        # What would command the terminal is shown.
        terminal.type("hi\r")
        assert "\x1b[31m" not in terminal.wait_for(r"\\x1b\[31mred\\x1b\[0m\\x07\.")
        terminal.wait_for(PROMPT)
        # An answer is shown while it is written. Ctrl-C ends it, and the conversation goes on.
        terminal.type("slow\r")
        terminal.wait_for("Slowlyly")
        terminal.type("\x03")
        terminal.wait_for(r"stopped: what is written stays in the conversation")
        terminal.wait_for(PROMPT)
        # A paste of several lines, which the terminal marks, is one message.
        terminal.type("\x1b[200~paste one\nand two\nand three\x1b[201~")
        terminal.type("\r")
        terminal.wait_for("7 lines")  # two blank ones before, two after, and the mark of the answer
        terminal.wait_for(PROMPT)
        terminal.type('"""a paste\rof these lines\r"""\r')
        terminal.wait_for("[0-9]+ lines")
        terminal.wait_for(PROMPT)
        terminal.type("/undo\r")
        terminal.wait_for("taken back: a paste of these lines; 3 turns left")
        terminal.wait_for(PROMPT)
        terminal.type("\x04")
        assert terminal.status() == 0
    finally:
        terminal.close()
    history = tmp_path / "rwkv_bone" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    messages = History.__new__(History)
    messages.path = history
    assert messages.messages() == ["hi", "slow", "paste one\nand two\nand three", "a paste\nof these lines", "/undo"]


class Typed:
    """Messages that are there already."""

    def __init__(self, *messages):
        self.messages = list(messages)

    def message(self) -> str:
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)


def talk(*messages: str, voices=None, **settings) -> Talk:
    cfg = ChatConfig(load_model="scripted.pth", temperature=0.0, **settings)
    made = Talk(cfg, voices or [scripted_voice("world", " Hello.|")], Typed(*messages), Style("never"))
    made.run()
    return made


def test_commands_do_what_they_say(tmp_path, capsys):
    path = tmp_path / "a talk"
    made = talk(
        "hi", "/settings temperature 0.7", "/settings stop a\\nb", "/system Be kind.", "/system", "hi", f"/save {path}",
        "/reset", f"/load {path}", "/retry", "/settings", "//hi", "/help", "/quit", "not read",
    )  # fmt: skip
    out = " ".join(capsys.readouterr().out.split())
    assert (made.cfg.temperature, made.cfg.stops) == (0.7, ("a\nb",))
    assert made.sessions[0].sampling.temperature == 0.7 and made.sessions[0].stops == ("a\nb",)
    assert f"{path}.pth: 1 turn" in out and "system: Be kind." in out
    assert "the state before this turn is not kept" in out  # of a turn that was loaded
    assert has_read(made.sessions[0].state) == (
        "System: Be kind.\n\nUser: hi\n\nAssistant: Hello.\n\nUser: /hi\n\nAssistant: Hello."
    )
    assert "temperature 0.7" in out and "/retry" in out
    assert made.lines.messages == ["not read"]


@pytest.mark.parametrize(
    "message,sentence",
    [
        ("/sav x", "/sav is no command: did you mean /save?"),
        ("/etc/passwd", "/etc/passwd is no command: /help lists them"),
        ("/settings top_p 2", "/settings top_p 2: expected"),
        ("/settings temperature hot", "/settings temperature hot: expected a number"),
        ("/settings template g1", "/settings template: expected one of temperature"),
        ("/settings max_new", "/settings max_new: expected a value"),
        ("/save", "name a file"),
        ("/load nowhere.pth", "checkpoint nowhere.pth does not exist"),
        ("/undo", "there is no turn to take back"),
    ],
)
def test_a_mistake_is_a_sentence_and_the_conversation_goes_on(message, sentence, capsys):
    made = talk(message, "hi")
    out = " ".join(capsys.readouterr().out.split())
    assert f"error: {sentence}" in out
    assert [turn.message for turn in made.sessions[0].turns] == ["hi"]


def test_a_setting_that_cannot_be_leaves_all_as_it_was():
    cfg = ChatConfig(load_model="m.pth")
    with pytest.raises(UserError, match=r"/settings seed -1"):
        changed(cfg, "seed", "-1")
    assert changed(cfg, "seed", "7") == replace(cfg, seed=7)
    assert changed(cfg, "stop", "") == cfg


def two_voices():
    return [
        replace_name(scripted_voice("world", " One two three four.|"), "tuned"),
        replace_name(scripted_voice("world", " Five.\nSix.|"), "base"),
    ]


def replace_name(voice, name):
    decoder = voice.decoder
    voice = replace(voice, name=name)
    voice.__dict__["decoder"] = decoder
    return voice


def test_two_models_answer_in_columns_or_one_after_the_other(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "130")
    made = talk("hi", "/undo", voices=two_voices())
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("tuned"))
    assert [re.split(r"\s+\|  ", line) for line in lines[at : at + 3]] == [
        ["tuned", "base"],
        ["One two three four.", "Five."],
        ["", "Six."],
    ]
    assert [session.turns for session in made.sessions] == [[], []]
    monkeypatch.setenv("COLUMNS", "80")
    made = talk("hi", voices=two_voices())
    out = capsys.readouterr().out
    assert "tuned\nOne two three four.\nbase\nFive.\nSix.\n" in out
    assert [has_read(session.state) for session in made.sessions] == [
        "User: hi\n\nAssistant: One two three four.",
        "User: hi\n\nAssistant: Five.\nSix.",
    ]


@pytest.mark.parametrize("thinking,shown", [("dim", "Hm.\n\nYes.\n\nHello."), ("hide", "Hello.")])
def test_thinking_is_shown_apart_or_hidden(thinking, shown, capsys):
    talk("hi", voices=[scripted_voice("g1-think", ">\nHm.\n\nYes.\n</think>\nHello.|")], thinking=thinking)
    assert f"\n{shown}\n" in re.sub(r"\n\n\n+", "\n\n", capsys.readouterr().out)


def test_the_history_is_the_users_own_and_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    history = History()
    for number in range(3):
        history.add(f"message\n{number}")
    assert history.messages() == ["message\n0", "message\n1", "message\n2"]
    history.path.chmod(0o644)
    history.add("x")
    assert history.path.stat().st_mode & 0o777 == 0o600
    assert history.path.parent.stat().st_mode & 0o777 == 0o700
    history.path.write_bytes(b'"whole"\n"cut\n\xff\n17\n')
    assert history.messages() == ["whole"]
    history.path.write_text("".join(f'"{number}"\n' for number in range(2500)))
    assert history.messages()[0] == "1500" and len(history.path.read_text().splitlines()) == 1000
