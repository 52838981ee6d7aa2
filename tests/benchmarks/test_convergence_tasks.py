"""benchmarks/convergence: the rows of the generated tasks are right, and none is in two files."""

import json
import random
import re
from pathlib import Path

import pytest

from benchmarks.convergence import problems, style, tasks
from rwkv_bone.data import load_tokenizer
from rwkv_bone.errors import UserError

ADAPTED = "blinkdl-reverse/rwkv7-reverse-L2-D32-ft.pth"


def rows(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every task, the reverse model's file being an empty one."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / ADAPTED).parent.mkdir()
    (folder / ADAPTED).touch()
    return {name: tasks.load_task(name, folder / "data", folder) for name in tasks.TASKS}


@pytest.mark.parametrize("name", tasks.TASKS)
def test_no_held_out_row_is_trained_or_chosen_by(made, name):
    task = made[name]
    train, heldout = rows(task.train_file), rows(task.heldout_file)
    prompts = [row["prompt"] for row in train + heldout]
    assert len(set(prompts)) == len(prompts)
    assert len(heldout) >= max(task.heldout, task.answers)
    # Enough is left for every step to have new rows, or nearly.
    assert len(train) - task.development >= 0.95 * task.steps * task.samples


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_same_files_are_written_every_time(made, name, tmp_path):
    (tmp_path / ADAPTED).parent.mkdir()
    (tmp_path / ADAPTED).touch()
    again = tasks.load_task(name, tmp_path / "data", tmp_path)
    for file in ("train_file", "heldout_file", "text_file"):
        assert Path(getattr(again, file)).read_bytes() == Path(getattr(made[name], file)).read_bytes()


def test_rows_have_different_prompts_however_few_there_are():
    made = tasks.distinct(lambda draw: {"prompt": draw.randrange(9), "response": draw.random()}, 9)
    assert sorted(row["prompt"] for row in made) == list(range(9))


def test_an_equation_is_that_of_its_problem_and_evaluates_to_the_answer():
    draw, operations = random.Random(3), set()
    for _ in range(500):
        row = problems.problem(draw)
        text, equation = row["prompt"], row["response"]
        assert re.fullmatch(r"\d+([-+*]\d+)+", equation)
        assert eval(equation) == row["answer"] >= 0
        operations.add(len(re.findall(r"[-+*]", equation)))
        # The numbers of the text, in its order, and the signs that its words ask for.
        assert re.findall(r"\d+", text) == re.findall(r"\d+", equation)
        assert equation.count("-") == len(re.findall(r"gives|are lost", text))
        assert equation.count("+") == len(re.findall(r"brings|finds|come\.", text))
        assert equation.count("*") == len(re.findall(r"bags|boxes", text))
    assert operations == {1, 2, 3}


@pytest.mark.parametrize(
    "sentence, headline",
    [
        ("The old man went to the sea, and slept.", "Old Man Went To Sea, & Slept"),
        ("I saw an island.", "I Saw Island"),
        ("What then remains?", "What Then Remains?"),
        ("He loved Andrew and A SHIP.", "He Loved Andrew & SHIP"),
    ],
)
def test_a_headline_follows_its_rules(sentence, headline):
    assert style.headline(sentence) == headline


def test_digits_are_reversed_and_read_with_the_models_own_ids(made):
    task = made["reverse"]
    for file, shortest, longest in ((task.train_file, 22, 30), (task.heldout_file, 22, 30), (task.text_file, 10, 14)):
        for row in rows(file):
            digits = row["prompt"].removesuffix(",")
            assert row["response"] == "".join(reversed(digits)) and shortest <= len(digits) <= longest
    tokenizer = load_tokenizer(task.tokenizer, 12)
    assert tokenizer.encode("0123456789,#") == list(range(12))
    assert tokenizer.decode([3, 10, 1]) == "3,1" and tokenizer.eod == 11


def test_the_reverse_task_says_which_file_it_lacks(tmp_path):
    for models in (None, tmp_path):
        with pytest.raises(UserError, match=rf"reverse needs {ADAPTED}.*--models"):
            tasks.load_task("reverse", tmp_path, models)
