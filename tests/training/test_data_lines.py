"""What a run says about its data, in its header and for held-out rows, and what a continued run compares."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rwkv_bone.config import RunConfig
from rwkv_bone.config.flags import parse_train
from rwkv_bone.data import BatchPlan, load_dataset
from rwkv_bone.data.fingerprint import data_fingerprint
from rwkv_bone.errors import UserError
from rwkv_bone.training import resume
from rwkv_bone.training.disk import unused_saves

PAIR = {"prompt": "p", "response": "r" * 9}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def said(job, tmp_path_factory):
    """(lines of a run whose data and held-out data lose something, the two files)."""
    folder = tmp_path_factory.mktemp("lines")
    data = write(folder / "data.jsonl", [*[{**PAIR, "note": "x"}] * 8, {"prompt": "p", "response": "r" * 70}])
    held = write(folder / "held.jsonl", [PAIR, PAIR, {"prompt": "p"}])
    lines: list[str] = []
    flags = {"ctx_len": 20, "bad_rows": "skip", "epoch_steps": 1, "eval_samples": 0, "micro_bsz": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        job.run("said", data_file=data, eval_data=held, **flags)
    return lines, data, held


def test_a_warning_has_a_line_of_its_own_in_the_header(said):
    lines, data, _ = said
    (cut,) = [line for line in lines if "cut at" in line]
    lost = 71 - 20
    assert cut.startswith(f"warning: {data}: cut at --ctx_len 20: 1 sample, {lost} tokens left out, ")
    assert cut.endswith(f"{lost / (8 * 10 + 71):.1%} of the trained tokens")
    assert f"data      {data}: fields not used: note (8 rows)" in lines


@pytest.mark.parametrize("dataload", ["pad", "get"])
def test_what_was_lost_and_not_used_is_said_once_where_the_run_splits_its_own_data(tmp_path, dataload, capsys, job):
    rows = [{"prompt": f"p{i}", "response": "r" * 9, "note": "x"} for i in range(20)]
    data = write(tmp_path / "data.jsonl", [*rows, {"prompt": "p"}])
    flags = {"dataload": dataload, "bad_rows": "skip", "epoch_steps": 1, "eval_samples": 0, "micro_bsz": 2}
    flags |= {"loss_mask": "none", "ctx_len": 8} if dataload == "get" else {}
    job.run(f"once-{dataload}", data_file=data, eval_data="", eval_split=0.3, **flags)
    text = capsys.readouterr().out
    assert "fields not used: note (20 rows)" in text and "skipped (--bad_rows skip), no field 'response': 1 row" in text
    # Windows of the training data are one dataset, and the whole rows that are held out another.
    count = {"pad": 1, "get": 2}[dataload]
    assert text.count("fields not used") == text.count("(--bad_rows skip)") == count


def test_held_out_data_says_what_it_lost_too(said):
    lines, _, held = said
    skipped = f"warning: {held}: skipped (--bad_rows skip), no field 'response': 1 row ({held}:3), 33.3% of the rows"
    assert skipped in lines


def test_a_run_shorter_than_a_pass_says_what_share_it_reads(said):
    lines, _, _ = said
    (line,) = [line for line in lines if "these steps read" in line]
    share = float(line.split("read ")[1].split("%")[0])
    assert 0 < share < 100 and line.strip().startswith("these steps read") and "--epoch_count" in line


@pytest.mark.parametrize(
    ("settings", "steps", "warnings"),
    [
        ({"save_steps": 5}, 6, []),
        ({"save_steps": 6}, 6, ["--save_steps 6 saves nothing: the whole run has 6 optimiser steps"]),
        ({"epoch_save": 2, "epoch_count": 2}, 6, []),
        ({"epoch_save": 3, "epoch_count": 2}, 6, ["--epoch_save 3 saves the end alone: the run has 2 epochs"]),
    ],
)
def test_saves_that_a_run_never_reaches_are_named(settings, steps, warnings):
    assert list(unused_saves(RunConfig(**settings), steps)) == warnings


def test_saves_that_the_run_never_reaches_are_a_warning(job, capsys):
    job.run("saves", save_steps=10)
    lines = capsys.readouterr().out.splitlines()
    assert "warning: --save_steps 10 saves nothing: the whole run has 3 optimiser steps" in lines


@pytest.fixture
def saved(job):
    """Factory: (what a run left that had this fingerprint, the metadata of a run with another)."""

    def make(then: str, now: str) -> tuple[resume.Saved, dict]:
        about = {"architecture": {}, "base": "b"}
        config = parse_train(job.argv({}))
        return resume.Saved(job.folder / "r.pth", 1, job.folder / "0.pth", config, about | {"data": then}), about | {
            "data": now
        }

    return make


def test_one_changed_character_in_three_thousand_rows_is_noticed_every_time(saved, tmp_path, job):
    rows = [{"prompt": f"{i} in words: ", "response": f"number {i}"} for i in range(3000)]
    config = replace(parse_train(job.argv({})).data, data_file=(write(tmp_path / "rows.jsonl", rows),))
    before = data_fingerprint(load_dataset(config, 256))
    for place in np.random.default_rng(0).integers(0, 3000, 8).tolist():
        changed = [*rows[:place], rows[place] | {"response": f"Number {place}"}, *rows[place + 1 :]]
        write(tmp_path / "rows.jsonl", changed)
        earlier, now = saved(before, data_fingerprint(load_dataset(config, 256)))
        with pytest.raises(UserError, match="--data_file holds other samples .*not what the run in"):
            earlier.check(now, parse_train(job.argv({})))
    write(tmp_path / "rows.jsonl", rows)
    earlier, now = saved(before, data_fingerprint(load_dataset(config, 256)))
    earlier.check(now, parse_train(job.argv({})))


def test_a_run_of_version_0_2_0_goes_on_and_says_that_its_data_cannot_be_compared(saved, job):
    config = parse_train(job.argv({}))
    dataset = load_dataset(config.data, 256)
    plan, now = BatchPlan(dataset, micro_bsz=4), data_fingerprint(dataset)
    said = {}
    for then in ("0123456789abcdef0123456789abcdef", now):
        earlier, metadata = saved(then, now)
        earlier.check(metadata, config)
        said[then] = [line for line in earlier.notes(config, plan, 1, metadata) if "cannot be compared" in line]
    assert [len(lines) for lines in said.values()] == [1, 0]
    earlier, metadata = saved("0123456789abcdef0123456789abcdef", now)
    with pytest.raises(UserError, match="--load_model holds other weights"):
        earlier.check(metadata | {"base": "other"}, config)
