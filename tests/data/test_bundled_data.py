"""The bundled data is what its scripts and its README say."""

import json
import os
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


def test_the_script_writes_the_preference_sets_again(tmp_path):
    """Sets have another order in another process: what is written does not depend on it."""
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, ASSETS / "make_preferences.py", tmp_path], check=True, env=environment)
    written = sorted(path.name for path in tmp_path.iterdir())
    names = ("preferences_heldout.jsonl", "preferences_train.jsonl")
    assert written == [*names, "voices_heldout.jsonl", "voices_prompts.txt", "voices_train.jsonl"]
    for name in written:
        assert (tmp_path / name).read_bytes() == (ASSETS / name).read_bytes()


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_of_two_numbers_the_chosen_is_right_and_the_rejected_wrong_and_as_long(part):
    pairs = rows(f"preferences_{part}.jsonl")
    assert [(row["prompt"], row["chosen"]) for row in pairs] == [
        (row["prompt"], row["response"]) for row in rows(f"numbers_{part}.jsonl")
    ]
    for row in pairs:
        number, other = int(row["prompt"].removesuffix(" in words: ")), row["rejected"]
        assert in_digits(row["chosen"]) == number
        assert in_digits(other) != number or other == row["chosen"].replace("-", " ") != row["chosen"]
    chosen, rejected = (sum(len(row[name]) for row in pairs) for name in ("chosen", "rejected"))
    assert abs(chosen - rejected) / chosen < 0.01


def test_voices_are_the_novels_and_the_addresses_and_held_out_beginnings_are_new():
    corpus = [row["text"] for row in rows("corpus_train.jsonl")]
    border = next(i for i, text in enumerate(corpus) if text.startswith("To the Congress of the United States: Once"))
    novel, addresses = " ".join(corpus[:border]), " ".join(corpus[border:])
    train, held_out = rows("voices_train.jsonl"), rows("voices_heldout.jsonl")
    assert (len(train), len(held_out)) == (393, 52)
    for row in train + held_out:
        assert row["prompt"] + row["chosen"] in novel and row["prompt"] + row["rejected"] in addresses
    prompts = {row["prompt"] for row in train}
    assert not prompts & {row["prompt"] for row in held_out}
    assert not prompts & {f"{line.strip()} " for line in (ASSETS / "voices_prompts.txt").read_text().splitlines()}
