"""A results folder is read as it is: whole, half-written or damaged."""

import json

import numpy as np
import pytest

from rwkv_bone.report.run import Run, holds_run, read
from tests.report.made import EXPECTED, PROMPT, make, measurement, sealed, step_record, write_lines

FILES = ("config.json", "train_log.jsonl", "measurements.jsonl", "samples.jsonl", "warnings.jsonl", "preview.json")


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "a run", steps=40, every=10)


def test_everything_in_the_files_is_there(folder):
    run = read(folder)
    assert run.problems == ["evaluation.json is missing: its answers are not known"]
    assert run.columns["loss"].tolist() == [step_record(step)["loss"] for step in range(1, 41)]
    assert np.isnan(run.columns["peak_reserved_mb"]).all() and run.total_steps == 40 and run.state == "done"
    assert [one.step for one in run.measurements] == [0, 10, 20, 30, 40]
    assert (run.main, run.general) == ("heldout", "general")
    assert [one.right for one in run.answers if one.prompt == PROMPT] == [False, False, False, True, True]
    assert run.warnings[0]["step"] == 40 and run.setting("bone_r", 0) == 64


def test_the_best_is_the_lowest_after_training_began(tmp_path):
    folder = make(tmp_path / "run", steps=3)
    write_lines(
        folder / "measurements.jsonl", [measurement(0, 1.0, 2.0), measurement(2, 1.5, 2.5), measurement(3, 1.7, 2.25)]
    )
    run = read(folder)
    assert run.best() == (2, 1.5) and run.forgotten() == 0.25


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_leaves_the_others(folder, name):
    (folder / name).unlink()
    run = read(folder)
    assert holds_run(folder) and (run.config or run.columns)
    named = [problem for problem in run.problems if problem.startswith(name)]
    assert len(named) == (0 if name in ("samples.jsonl", "warnings.jsonl") else 1)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b'{"a": 1}', b"[" * 5000, b"7\nnull\n"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_holds_something_else_leaves_the_others(folder, name, content):
    (folder / name).write_bytes(content)
    run = read(folder)
    assert run.config if name != "config.json" else len(run.steps) == 40
    if content == b"7\nnull\n":
        wrong = "2 of 2 lines damaged" if name.endswith("l") else "cannot be read"
        assert [problem for problem in run.problems if problem.startswith(name) and wrong in problem]


def test_a_folder_where_a_file_should_be_is_told(folder):
    (folder / "train_log.jsonl").unlink()
    (folder / "train_log.jsonl").mkdir()
    assert any(problem.startswith("train_log.jsonl cannot be read") for problem in read(folder).problems)


def test_a_changed_bit_of_a_line_costs_that_line_and_is_told(folder):
    path = folder / "train_log.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[6] = lines[6].replace('"loss": 1', '"loss": 9')
    path.write_text("".join(lines))
    run = read(folder)
    assert run.steps.tolist() == [step for step in range(1, 41) if step != 7]
    assert "train_log.jsonl: 1 of 40 lines damaged, and left out here" in run.problems
    assert "train_log.jsonl lacks 1 step of 40: so do the curves" in run.problems


def test_a_last_line_that_is_being_written_is_no_damage(folder):
    path = folder / "train_log.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    run = read(folder)
    assert run.last_step == 39 and not [problem for problem in run.problems if "train_log" in problem]


def test_a_line_written_by_another_program_with_the_right_checksum_counts(folder):
    """The checksum is of the content, whatever the spaces."""
    path = folder / "train_log.jsonl"
    record = sealed(step_record(41))
    path.write_text(path.read_text() + json.dumps(record, separators=(",", ":")) + "\n")
    assert read(folder).last_step == 41


def test_a_line_of_a_version_without_checksums_counts(folder):
    path = folder / "train_log.jsonl"
    path.write_text("".join(json.dumps(step_record(step)) + "\n" for step in (1, 2)))
    assert read(folder).steps.tolist() == [1, 2]


def test_a_loss_that_is_no_finite_number_is_never_the_best(folder):
    bad = measurement(20, 0.5, 2.0)
    bad["sets"]["heldout"]["loss"] = None
    write_lines(folder / "measurements.jsonl", [measurement(0, 1.0, 2.0), bad, measurement(40, 0.7, 2.0)])
    assert read(folder).best() == (40, 0.7) and len(read(folder).measurements) == 3


def test_a_step_that_was_skipped_is_no_number(folder):
    write_lines(
        folder / "train_log.jsonl", [step_record(1), step_record(2) | {"loss": None, "grad_norm": None}, step_record(3)]
    )
    assert np.isnan(read(folder).columns["loss"]).tolist() == [False, True, False]


def test_a_run_that_measured_before_and_after_alone_has_these_two(folder):
    (folder / "measurements.jsonl").unlink()
    answers = [{"prompt": PROMPT, "expected": EXPECTED, "got": EXPECTED}]
    one = {"tokens": 5, "exact_match": 1.0, "answers": answers}
    content = {"data": "abc", "before": one | {"step": 0, "loss": 2.0}, "after": one | {"step": 40, "loss": 0.5}}
    (folder / "evaluation.json").write_text(json.dumps(sealed(content)))
    run = read(folder)
    assert run.losses(run.main) == [(0, 2.0), (40, 0.5)] and run.data == "abc"
    assert [one.right for one in run.answers] == [True, True]


def test_before_and_after_are_those_of_the_whole_set_where_a_part_is_measured_while_training(folder):
    one = {"tokens": 4 * 6970, "exact_match": 1.0, "answers": []}
    content = {"data": "abc", "before": one | {"step": 0, "loss": 2.5}, "after": one | {"step": 40, "loss": 0.5}}
    (folder / "evaluation.json").write_text(json.dumps(sealed(content)))
    run = read(folder)
    assert (run.first(), run.last(), run.share_measured()) == ((0, 2.5), (40, 0.5), 0.25)
    assert len(run.losses("heldout")) == 5 and {one.prompt for one in run.answers} == {PROMPT, "41 in words: "}
    content["after"]["step"] = 30
    (folder / "evaluation.json").write_text(json.dumps(sealed(content)))
    assert read(folder).last() == run.losses("heldout")[-1]


def test_settings_that_were_changed_by_hand_are_told(folder):
    config = json.loads((folder / "config.json").read_text())
    config["adapter"]["bone_r"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    run = read(folder)
    assert run.setting("bone_r", 0) == 8 and run.setting("bone_r", "") == ""
    assert "config.json was changed after the run wrote it, or is damaged: it is shown as it is" in run.problems


def test_a_run_without_held_out_data_lacks_nothing(tmp_path):
    folder = make(tmp_path / "run", steps=5)
    config = json.loads((folder / "config.json").read_text())
    config.pop("crc32")
    config["data"]["eval_data"] = ""
    (folder / "config.json").write_text(json.dumps(sealed(config)))
    for name in ("measurements.jsonl", "samples.jsonl"):
        (folder / name).unlink()
    assert read(folder).problems == []


def test_an_empty_folder_is_a_run_of_nothing(tmp_path):
    run = read(tmp_path)
    assert isinstance(run, Run) and run.last_step == 0 and run.best() is None and not holds_run(tmp_path)
