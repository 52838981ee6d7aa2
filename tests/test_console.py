"""Output never ends a program: pipes, terminals, disks and encodings may fail, and the work goes on."""

import ast
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from fcntl import ioctl
from pathlib import Path
from struct import pack
from termios import TIOCSWINSZ

import pytest

from rwkv_bone.console import counted
from tests.conftest import python_path

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
# Says 3,000 lines and then writes the file DONE, which is its work.
WORKS = """
from rwkv_bone.errors import exit_status, UserError
def body():
    for n in range(3000):
        print("line", n)
    open("DONE", "w").write("all of it")
"""
SHOWN = "sys.exit(exit_status(body, shows=True))"


def program(body: str, ending: str = "sys.exit(exit_status(body))") -> list[str]:
    return [sys.executable, "-c", f"import sys, os\n{body}\n{ending}"]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": python_path(), **extra}


def run(folder: Path, command: list[str], redirected: str = "", **extra: str) -> subprocess.CompletedProcess:
    """The command in this folder, its output redirected as a shell writes it."""
    words = ["sh", "-c", f'"$@" {redirected}', "sh", *command]
    return subprocess.run(words, cwd=folder, env=environment(**extra), capture_output=True, text=True, timeout=60)


def into_closed_pipe(folder: Path, command: list[str]) -> tuple[int, str]:
    """(exit status, stderr) of the command, whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=folder, env=environment(), stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    return done.returncode, done.stderr.decode()


def on_terminal(folder: Path, command: list[str], columns: int, resized: int | None = None) -> list[str]:
    """What is drawn, one string for each time that the cursor went to the left, on a terminal of so many columns.

    resized: its columns after the first output.
    """
    process, master = pty.fork()
    if process == 0:
        os.chdir(folder)
        signal.alarm(60)
        os.read(0, 1)  # until the terminal has its size
        os.execve(command[0], command, environment())
    ioctl(master, TIOCSWINSZ, pack("HHHH", 24, columns, 0, 0))
    os.write(master, b"\n")
    seen = b""
    while True:
        try:
            got = os.read(master, 65536)
        except OSError:  # the other side has ended
            break
        seen += got
        if resized is not None and b"drawn" in seen:
            ioctl(master, TIOCSWINSZ, pack("HHHH", 24, resized, 0, 0))
            os.write(master, b"\n")
            resized = None
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, seen.decode()
    os.close(master)
    return [part for part in re.split(r"[\r\n]+", seen.decode()) if part.strip()]


def test_work_whose_reader_has_gone_is_done_without_a_word(tmp_path):
    assert into_closed_pipe(tmp_path, program(WORKS)) == (0, "")
    assert (tmp_path / "DONE").read_text() == "all of it"


def test_a_program_that_only_shows_ends_with_its_reader_as_other_programs_do(tmp_path):
    assert into_closed_pipe(tmp_path, program(WORKS, SHOWN)) == (128 + signal.SIGPIPE, "")
    assert not (tmp_path / "DONE").exists()


def test_the_preview_ends_with_its_reader(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a row"}\n' * 20)
    command = [sys.executable, "-c", "import sys; from rwkv_bone.commands import preview; sys.exit(preview())"]
    assert into_closed_pipe(tmp_path, [*command, "--data_file", "rows.jsonl", "--tokenizer", "bytes"]) == (141, "")


def test_an_output_that_is_asked_not_to_wait_does_not(tmp_path):
    says = "from rwkv_bone.errors import exit_status\ndef body():\n    print('now'); os._exit(0)"
    assert run(tmp_path, program(says), "| cat", PYTHONUNBUFFERED="").stdout == ""
    assert run(tmp_path, program(says), "| cat", PYTHONUNBUFFERED="1").stdout == "now\n"


@needs_full
def test_a_full_disk_under_the_output_is_said_and_work_goes_on(tmp_path):
    done = run(tmp_path, program(WORKS), ">/dev/full")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert done.stderr == "warning: standard output could not be written (No space left on device)\n"
    assert (tmp_path / "DONE").is_file()


@needs_full
def test_a_full_disk_ends_a_program_that_only_shows_with_a_sentence(tmp_path):
    done = run(tmp_path, program(WORKS, SHOWN), ">/dev/full")
    assert done.returncode == 2
    assert done.stderr == "error: standard output could not be written: No space left on device\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_closed_at_the_start_cost_only_what_they_would_have_said(tmp_path, closed):
    # What is opened next must not get the number of a closed stream: print would write into the user's file.
    opens = "def body():\n    file = open('DONE', 'w'); file.write('data'); file.flush()\n"
    opens += (
        "    print('said', file=sys.stdout); print('said', file=sys.stderr); os.system('echo said; echo said >&2')\n"
    )
    opens += "    assert file.fileno() > 2\n"
    done = run(tmp_path, program(f"from rwkv_bone.errors import exit_status\n{opens}"), closed)
    assert done.returncode == 0
    assert (tmp_path / "DONE").read_text() == "data"


def test_a_users_mistake_keeps_its_status_where_nobody_can_read_it(tmp_path):
    fails = "from rwkv_bone.errors import exit_status, UserError\ndef body(): raise UserError('wrong')"
    assert run(tmp_path, program(fails), "2>&-").returncode == 2
    assert run(tmp_path, program(fails), "2>/dev/full").returncode == 2


def test_lost_output_is_kept_in_the_file_for_it_from_the_first_lost_line_on(tmp_path):
    keeps = "from rwkv_bone import console\nfrom rwkv_bone.errors import exit_status\nfrom pathlib import Path\n"
    keeps += "def body():\n    print('before', flush=True)\n"
    keeps += "    console.keep_lost_output(Path('output.txt'))\n    print('after')\n"
    status, errors = into_closed_pipe(tmp_path, program(keeps))
    assert status == 0
    assert (
        errors
        == "warning: standard output could not be written (Broken pipe): what it would have said is in output.txt\n"
    )
    assert (tmp_path / "output.txt").read_text().splitlines() == [
        "(standard output could not be written: Broken pipe. It would have said:)", "before", "after",
    ]  # fmt: skip
    assert run(tmp_path, program(keeps), "| cat; rm output.txt; ls").stdout == "before\nafter\n"


def test_a_pipe_that_somebody_made_non_blocking_is_waited_for(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    many = program(WORKS.replace("3000", "30000"))  # more than a pipe holds
    process = subprocess.Popen(many, cwd=tmp_path, env=environment(), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    select.select([reader], [], [])
    time.sleep(0.5)  # it is full by now
    with os.fdopen(reader) as file:
        assert file.read().splitlines() == [f"line {n}" for n in range(30000)]
    assert process.communicate()[1] == b"" and process.returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "cp1252", "ascii:strict", "utf-8"])
def test_a_character_that_the_encoding_lacks_is_shown_as_its_number(tmp_path, encoding):
    text = "\u4f60 \u00df \u2013 \U0001f600 \\udcff"
    says = "from rwkv_bone.errors import exit_status, UserError\n"
    says += f"def body():\n    print('{text}')\n    raise UserError('{text}')\n"
    done = subprocess.run(
        program(says), env=environment(PYTHONIOENCODING=encoding), cwd=tmp_path, capture_output=True, timeout=60
    )
    name = encoding.partition(":")[0]
    expected = "\u4f60 \u00df \u2013 \U0001f600 \udcff".encode(name, "backslashreplace")
    assert (done.returncode, done.stdout, done.stderr) == (2, expected + b"\n", b"error: " + expected + b"\n")


BAR = """
from rwkv_bone.errors import exit_status
from rwkv_bone import console
def body():
    with console.progress_bar(40, "w\u00f6rking on \u4f60\u597d.jsonl", delay=0, mininterval=0) as bar:
        for n in range(40):
            bar.update()
            if n == 5:
                print("drawn"); input()
            if n == 20:
                console.say("a line of its own")
"""


def columns_of(text: str) -> int:
    return sum(1 + (c >= "\u1100") for c in text)


@pytest.mark.parametrize("columns", [0, 10, 40, 80, 300])
def test_a_bar_fits_a_terminal_of_any_width(tmp_path, columns):
    drawn = on_terminal(tmp_path, program(BAR), columns, resized=columns)
    bars = [text for text in drawn if "drawn" not in text and text != "a line of its own"]
    assert len(bars) > 20 and "a line of its own" in drawn
    # A terminal that says 0 knows no width.
    assert max(map(columns_of, bars)) < (columns or 80)
    assert bars[-1].startswith("100%")


def test_a_bar_follows_a_terminal_that_becomes_narrower(tmp_path):
    drawn = on_terminal(tmp_path, program(BAR), 120, resized=50)
    widths = [columns_of(text) for text in drawn]
    assert widths[1] == 119 and max(widths[-20:]) == 49


def test_a_bar_that_is_no_terminals_writes_nothing(tmp_path):
    done = subprocess.run(program(BAR), env=environment(), cwd=tmp_path, input="\n", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "drawn\na line of its own\n", "")


def test_counts_have_their_noun():
    assert [counted(n, "step") for n in (0, 1, 2, 1200)] == ["0 steps", "1 step", "2 steps", "1,200 steps"]
    assert [counted(n, "pass", "passes") for n in (1, 2)] == ["1 pass", "2 passes"]


def test_no_bar_is_drawn_before_its_time_since_nobody_would_clear_it():
    """tqdm draws at once where a description is set, and at its end clears only a bar whose delay was over."""
    package = Path(__file__).resolve().parents[1] / "src" / "rwkv_bone"
    found = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "attr", "")
            if isinstance(node, ast.Call) and name in ("set_description_str", "set_description", "refresh"):
                found.append((path.name, {word.arg: ast.unparse(word.value) for word in node.keywords}.get("refresh")))
    assert len(found) >= 3 and {refresh for _, refresh in found} == {"False"}
