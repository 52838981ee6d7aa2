"""Two evaluations on the same items, compared on the terminal."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_bone import commands
from rwkv_bone.config.checksum import sealed
from rwkv_bone.errors import UserError
from rwkv_bone.evaluation.answers import line_of
from rwkv_bone.evaluation.compare import compare
from tests.conftest import REPOSITORY
from tests.evaluation.answering import write_rows

ROWS = [{"question": f"{i} and 0?", "answer": f"#### {i}"} for i in range(1, 41)]


@pytest.fixture
def two(evaluations, capsys):
    """Of 40 items A has the first 20 right and B those from 9 to 31; B also has rows that A has not."""
    a, b = (write_rows(evaluations.folder / f"{n}.jsonl", rows) for n, rows in (("a", ROWS), ("b", ROWS[5:])))
    folders = []
    for name, path, right in (("A", a, range(1, 21)), ("B", b, range(9, 32))):
        evaluations.writes(lambda p, right=right: (p.split()[1] if int(p.split()[1]) in right else "none", "end"))
        folders.append(str(evaluations(name, task="gsm8k", data_file=path)))
    capsys.readouterr()
    return folders


def test_items_are_matched_by_what_they_ask_and_those_of_one_alone_are_named(two):
    text = "\n".join(compare(two))
    # In both: items 6 to 40. A alone right: 6, 7, 8; B alone: 21 to 31; both: 9 to 20; neither: 32 to 40.
    assert "35 items in both" in text and "left out: 5 items of A alone (rows 1, 2, 3, 4, 5)" in text
    table = [line.split() for line in text.splitlines()]
    assert ["A", "right", "12", "3", "15"] in table and ["A", "wrong", "11", "9", "20"] in table
    assert ["all", "23", "12", "35"] in table
    p = 2 * sum(math.comb(14, i) for i in range(4)) / 2**14
    assert f"3 right in A alone, 11 in B alone: p = {p:.3g}" in text
    assert "A           42.9 %" in text and "B           65.7 %" in text
    assert "B - A       +22.9 points (95 % interval +" in text
    back = "\n".join(compare(two[::-1]))
    assert "B - A       -22.9 points (95 % interval -" in back and "note: --data_file differs" in back


def test_what_cannot_be_compared_is_refused(two, evaluations, tmp_path):
    with pytest.raises(UserError, match="evaluations are compared two at a time"):
        list(compare([*two, two[0]]))
    with pytest.raises(UserError, match=r"nothing holds no evaluation \(no such folder\)"):
        list(compare([two[0], str(tmp_path / "nothing")]))
    path = write_rows(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b"}])
    text = str(evaluations("text", task="perplexity", data_file=path))
    with pytest.raises(UserError, match="expected the same task"):
        list(compare([two[0], text]))
    copy = str(shutil.copytree(text, tmp_path / "copy"))
    assert "B - A       +0.0000 nats per byte" in "\n".join(compare([text, copy]))
    with pytest.raises(UserError, match="that is the same folder twice"):
        list(compare([text, text + "/."]))
    other = write_rows(tmp_path / "o.jsonl", [{"question": "1 and 0?", "answer": "#### 7"}])
    evaluations.writes(lambda prompt: ("7", "end"))
    with pytest.raises(UserError, match="no item in common"):
        list(compare([two[0], str(evaluations("o", task="gsm8k", data_file=other))]))


def test_a_damaged_or_unfinished_folder_is_told_in_one_sentence(two):
    a, b = map(Path, two)
    config, answers = json.loads((a / "config.json").read_text()), (a / "answers.jsonl").read_bytes()
    record = json.loads(answers.splitlines()[0])

    def without(content, *names):
        return sealed({name: value for name, value in content.items() if name not in (*names, "crc32")})

    def refused(match, *, of=config, lines=answers, raw=None):
        (a / "config.json").write_text(json.dumps(of) if raw is None else raw)
        (a / "answers.jsonl").write_bytes(lines)
        for folders in ([a, b], [b, a]):
            with pytest.raises(UserError, match=match):
                list(compare(list(map(str, folders))))

    for name in ("answers", "settings", "model", "content"):
        refused(f"A/config.json: no '{name}' that can be read: .* --overwrite 1 begins anew", of=without(config, name))
    for name in ("task", "samples"):
        of = without({**config, "settings": {n: v for n, v in config["settings"].items() if n != name}})
        refused(f"A/config.json: its settings lack {name}", of=of)
    refused("A/config.json: damaged", of={**config, "answers": 41})
    refused("A/config.json: damaged", of=without({**config, "evaluation": 2}))
    refused("A/config.json: cannot be read", raw=json.dumps(config)[:99])
    refused("A holds the config.json of something else", of={"data": {}})
    refused("A has no answers yet", lines=b"")
    refused("A has no answers yet", lines=answers[:50])
    refused("A/answers.jsonl:1: no right: of another version", lines=line_of(without(record, "right")))
    refused("A/answers.jsonl:1: no hash, item: of", lines=line_of(without(record, "hash", "item")))
    (a / "answers.jsonl").unlink()
    with pytest.raises(UserError, match=r"A holds no evaluation \(it has no answers.jsonl\)"):
        list(compare(two))


def test_a_comparison_does_without_torch():
    code = "import sys, rwkv_bone.evaluation.compare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")})


def test_an_evaluation_that_goes_on_is_compared_as_far_as_it_is(two, evaluations):
    path = evaluations.folder / "A" / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:30]) + lines[30][:50])
    text = "\n".join(compare(two))
    assert "note: A is not finished: 30 of its items are answered" in text and "25 items in both" in text
    assert "left out: 10 items of B alone" in text


def test_of_several_samples_only_whole_items_are_compared(evaluations):
    path = write_rows(evaluations.folder / "s.jsonl", ROWS[:4])
    folders = []
    for name, right in (("A", 2), ("B", 4)):
        evaluations.writes(lambda p, right=right: (p.split()[1] if int(p.split()[1]) <= right else "none", "end"))
        folders.append(str(evaluations(name, task="gsm8k", data_file=path, samples=2, temperature=1.0)))
    text = "\n".join(compare(folders))
    assert "A           50.0 %, mean of samples" in text and "B - A       +50.0 points" in text
    answers = evaluations.folder / "B" / "answers.jsonl"
    answers.write_bytes(b"".join(answers.read_bytes().splitlines(keepends=True)[:5]))
    text = "\n".join(compare(folders))
    assert "gsm8k, 2 items in both" in text and "left out: 2 items of A alone (rows 3, 4)" in text


def test_the_script_and_the_command_know_evaluations_from_runs(two, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["rwkv-bone-compare", *two])
    assert commands.compare() == 0
    assert "McNemar's exact test: 3 right in A alone" in capsys.readouterr().out
    # The script's Python says what it is asked to run.
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    script = ["sh", str(REPOSITORY / "scripts" / "compare.sh")]
    for folders, module in ((two, "evaluation"), ([str(tmp_path)], "report")):
        environment = {"PATH": "/usr/bin:/bin", "RWKV_PYTHON": str(python)}
        words = subprocess.run([*script, *folders], env=environment, capture_output=True, text=True).stdout.split()
        assert words == ["-m", f"rwkv_bone.{module}.compare", "--typed", "--runs", *folders]
