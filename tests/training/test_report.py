"""What to type next, as the run itself was started."""

import shlex
import sys
from pathlib import Path

import pytest

from rwkv_bone.training.report import program, script


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed(folder): the installed command rwkv-bone-train runs, which lies there beside the other commands."""

    def run_from(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train", "merge", "chat"):
            command = folder / f"rwkv-bone-{name}"
            command.write_text("#!/bin/sh\n")
            command.chmod(0o755)
        monkeypatch.setattr(sys, "argv", [str(folder / "rwkv-bone-train"), "--proj_dir", "out"])

    monkeypatch.chdir(tmp_path)
    return run_from


@pytest.mark.parametrize("name", ["train", "merge"])
def test_an_installed_command_names_the_other_commands_as_they_are_typed(installed, tmp_path, monkeypatch, name):
    installed(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert program(f"{name}.py", "--output", "a b") == f"rwkv-bone-{name} --output 'a b'"


def test_an_installed_command_that_the_shell_does_not_find_is_given_with_its_path(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    installed(tmp_path / "bin")
    assert program("merge.py") == "bin/rwkv-bone-merge"
    # Another installation comes first in PATH.
    installed(tmp_path / "elsewhere")
    installed(tmp_path / "bin")
    assert program("merge.py") == "bin/rwkv-bone-merge"


def test_a_script_names_the_script_beside_it_and_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "my copy" / "train.py")])
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    command = shlex.split(program("merge.py", "--output", "x"))
    assert Path(command[0]).resolve() == Path("/usr/bin/python3").resolve()
    assert command[1:] == ["my copy/merge.py", "--output", "x"]


def test_the_chat_is_named_as_it_can_be_run(installed, tmp_path, monkeypatch):
    """By a checkout's script, by the installed command, or as a module where neither is there."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my copy"
    monkeypatch.setattr(sys, "argv", [str(folder / "train.py")])
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert shlex.split(script("chat.sh", "--adapter", "a b"))[1:] == ["-m", "rwkv_bone.chat", "--adapter", "a b"]
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "chat.sh").touch()
    assert shlex.split(script("chat.sh", "--adapter", "a b")) == ["sh", "my copy/scripts/chat.sh", "--adapter", "a b"]
    installed(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert script("chat.sh", "--adapter", "a b") == "rwkv-bone-chat --adapter 'a b'"
