"""`--help` of every program ends with three examples, and each is a command line that the program takes."""

import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from rwkv_bone.config import flags
from rwkv_bone.conversion import convert
from rwkv_bone.data import prepare, preview
from rwkv_bone.hf.flags import IGNORED_FLAGS, HfConfig

REPOSITORY = Path(__file__).resolve().parents[2]
# The files beside the bundled ones that examples may name.
FILES = ("my-model.pth", "mine.jsonl", "pairs.jsonl", "chat.jsonl", "theirs.pth", "models/my-model")
MADE = ("out/", "merged.", "a.jsonl", "b.jsonl.gz", "stories.parquet")  # results, and files of the reader's own


def section(config, ignored=()):
    return lambda argv: flags.parse_section("program", "", config, argv, ignored)


# program -> (what prints its help, its parser)
PROGRAMS = {
    "python train.py": (lambda: runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__"), flags.parse_train),
    "python merge.py": (lambda: runpy.run_path(str(REPOSITORY / "merge.py"), run_name="__main__"), flags.parse_merge),
    "python train_hf.py": (
        lambda: runpy.run_path(str(REPOSITORY / "train_hf.py"), run_name="__main__"),
        section(HfConfig, IGNORED_FLAGS),
    ),
    "sh scripts/convert.sh": (convert.main, section(convert.ConvertConfig)),
    "sh scripts/preview_data.sh": (lambda: preview.parse(["--help"]), preview.parse),
    "sh scripts/prepare_data.sh": (prepare.main, section(prepare.PrepareConfig)),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_ends_with_a_few_examples_that_the_program_takes(program, capsys, monkeypatch, tmp_path):
    shutil.copy(REPOSITORY / "assets" / "rwkv7-tiny.pth", tmp_path / "my-model.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [program, "--help"])
    show_help, parse = PROGRAMS[program]
    with pytest.raises(SystemExit) as stop:
        show_help()
    text = capsys.readouterr().out
    assert stop.value.code == 0 and not any(words in text for words in ("so many", "so few"))

    lines = text.rpartition("\nexamples:\n")[2].rstrip("\n").split("\n")
    comments, commands, gaps = lines[::3], lines[1::3], lines[2::3]
    assert 3 <= len(commands) <= 4 and gaps == [""] * (len(commands) - 1)
    assert all(comment.startswith("  # ") for comment in comments)
    for command in commands:
        assert command.startswith(f"  {program} ") and len(command) <= 122
        words = shlex.split(command.removeprefix(f"  {program} "))
        assert parse(words)
        for word in words:
            if word.startswith("assets/"):
                assert (REPOSITORY / word).is_file()
            elif "/" in word or "." in word:
                assert word in FILES or word.startswith(MADE) or float(word)
