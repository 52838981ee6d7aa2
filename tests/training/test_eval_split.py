"""`--eval_split`: held-out samples out of the training data."""

import json

import pytest

from rwkv_bone.config.flags import parse_train
from rwkv_bone.errors import UserError
from rwkv_bone.training.prepare import load_data
from tests.training.conftest import ROWS

FLAGS = ["--load_model", "base.pth", "--eval_split", "0.3", "--ctx_len", "32"]


def rows_of(dataset) -> list[list[int]]:
    return [dataset[index].ids.tolist() for index in range(len(dataset))]


@pytest.fixture
def data(tmp_path):
    """Each row twice, so that a prompt could be on both sides."""
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in ROWS]
    file.write_text("".join(lines * 2))
    return file


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_two_sides_are_disjoint_and_together_all_of_the_data(data, seed):
    config = parse_train([*FLAGS, "--data_file", str(data), "--random_seed", str(seed)])
    train, held = (rows_of(dataset) for dataset in load_data(config, 256, config.data))
    assert train and held and len(train) + len(held) == 2 * len(ROWS)
    assert not {tuple(row) for row in train} & {tuple(row) for row in held}


def test_random_windows_of_the_stream_hold_no_token_of_the_held_out_documents(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": chr(65 + n) * 20}) + "\n" for n in range(20)))
    config = parse_train([*FLAGS, "--data_file", str(file), "--dataload", "get"])
    train, held = load_data(config, 256, config.data)
    assert train.windows and not held.windows
    letters = set(train.tokens[0 : len(train.tokens)].tolist()) - {0}
    assert letters and not letters & {token for row in rows_of(held) for token in row}


def test_data_with_a_single_prompt_cannot_be_split(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    with pytest.raises(UserError, match="--eval_split"):
        config = parse_train([*FLAGS, "--data_file", str(file)])
        load_data(config, 256, config.data)


def test_a_run_measures_the_held_out_samples_before_and_after(job, data):
    folder = job.run("split", data_file=data, eval_split=0.3, eval_data="", eval_samples=2, overwrite=1)
    measured = json.loads((folder / "evaluation.json").read_text())
    assert measured["before"]["loss"] != measured["after"]["loss"]
    answers = measured["after"]["answers"]
    assert len(answers) == 2 and {(answer["prompt"], answer["expected"]) for answer in answers} <= set(ROWS)
