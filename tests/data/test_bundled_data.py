"""The bundled data is what its scripts and its README say."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_bone.data import load_dataset

ASSETS = Path(__file__).resolve().parents[2] / "assets"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ASSETS / name).read_text(encoding="ascii").splitlines()]


def test_the_script_writes_the_bundled_task_again(tmp_path):
    shutil.copy(ASSETS / "make_task.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "make_task.py"], check=True)
    for name in ("numbers_train.jsonl", "numbers_heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (ASSETS / name).read_bytes()


def in_digits(words: str) -> int:
    """Numbers in words read back, by a rule of its own: add words up, multiply by hundred and thousand."""
    values = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    table = {word: value for value, word in enumerate(f"{values} seventeen eighteen nineteen".split())}
    table |= {word: 10 * i for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
    total = part = 0
    for word in re.split("[ -]", words):
        if word == "thousand":
            total, part = 1000 * part, 0
        elif word == "hundred":
            part *= 100
        else:
            part += table[word]
    return total + part


def test_the_task_is_right_and_its_held_out_numbers_are_new():
    train, held_out = rows("numbers_train.jsonl"), rows("numbers_heldout.jsonl")
    assert (len(train), len(held_out)) == (3000, 200)
    numbers = [[int(row["prompt"].removesuffix(" in words: ")) for row in part] for part in (train, held_out)]
    for part, found in zip((train, held_out), numbers, strict=True):
        assert [in_digits(row["response"]) for row in part] == found
    assert len({*numbers[0], *numbers[1]}) == 3200
    assert set(range(100)) <= set(numbers[0])


@pytest.mark.parametrize(("name", "ctx_len"), [("numbers_train.jsonl", 80), ("corpus_train.jsonl", 4096)])
def test_the_bundled_data_loads_uncut(config, name, ctx_len):
    dataset = load_dataset(config(str(ASSETS / name), tokenizer="auto", ctx_len=ctx_len), 256)
    assert len(dataset) == len(rows(name))
    assert not any("cut" in line or "left out" in line for line in dataset.summary_lines())


def test_the_corpus_parts_do_not_overlap():
    train, held_out = rows("corpus_train.jsonl"), rows("corpus_heldout.jsonl")
    assert len(held_out) > 50
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}
