"""Held-out data that is measured while a run trains: what is written, and that the steps stay what they were."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch

from rwkv_bone import load_model
from rwkv_bone.config import DataConfig
from rwkv_bone.config.checksum import sealed
from rwkv_bone.config.flags import parse_train
from rwkv_bone.config.sections import AUTO
from rwkv_bone.data import load_dataset
from rwkv_bone.errors import Interrupted, UserError
from rwkv_bone.inference.evaluate import heldout_loss
from rwkv_bone.models import RWKV
from rwkv_bone.training.heldout_sets import PROSE, cut, samples_within
from rwkv_bone.training.measurements import RECORD, Lines, read_lines
from rwkv_bone.training.measuring import ANSWERS, LOSSES, SAMPLES, Rhythm, rhythm
from tests.conftest import REPOSITORY
from tests.training.conftest import adapter_of, log_of

SAME_STEPS = ("step", "loss", "lr", "grad_norm", "tokens")


def lines_of(folder, name="measurements.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def files(job):
    """Held-out files: rows as those of training, rows with other fields, and a text."""
    rows = [{"prompt": f"{n} -> ", "response": str(n)[::-1]} for n in range(50, 56)]
    asked = [{"question": f"{n} + 1 = ", "answer": str(n + 1)} for n in range(3)]
    found = {}
    for name, content in {"rows": rows, "asked": asked}.items():
        found[name] = job.folder / f"held {name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in content))
    found["text"] = job.folder / "prose.txt"
    found["text"].write_text("It was the best of times, it was the worst of times. " * 8)
    return found


@pytest.mark.parametrize(
    "flags",
    [
        {"dataload": "pack", "micro_bsz": 2, "accumulate_grad_batches": 2},
        {"peft": "lora", "lora_r": 4, "lora_dropout": 0.5, "dataload": "pack"},
        {"chunk_ctx": 8, "train_parts": "ln"},
    ],
    ids=["accumulated", "dropout", "chunks"],
)
def test_the_steps_of_a_run_are_the_same_whether_it_measures_or_not(job, files, flags):
    name = "-".join(map(str, flags.values()))
    plain = job.run(f"plain {name}", epoch_count=2, **flags)
    held = {"eval_data": files["rows"], "eval_samples": 2, "eval_general": files["text"]}
    measured = job.run(f"measured {name}", epoch_count=2, eval_steps=1, **held, **flags)
    assert len(lines_of(measured)) == len(log_of(plain)) + 1
    for ours, theirs in zip(log_of(measured), log_of(plain), strict=True):
        assert {key: ours[key] for key in SAME_STEPS} == {key: theirs[key] for key in SAME_STEPS}
    found, expected = adapter_of(measured, "rwkv-1.pth"), adapter_of(plain, "rwkv-1.pth")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_each_line_has_the_losses_of_the_adapter_of_its_step(job, files):
    held = {"eval_steps": 1, "eval_samples": 2, "save_steps": 1, "eval_general": files["text"]}
    flags = {**held, "eval_field": "asked=question,answer"}
    argv = job.argv({**flags, "proj_dir": job.folder / "each line"})
    argv += ["--eval_data", str(files["rows"]), f"asked={files['asked']}"]
    from rwkv_bone.training.fit import fit

    fit(parse_train(argv))
    folder = job.folder / "each line"
    lines = lines_of(folder)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    data = DataConfig(data_file=("x",), ctx_len=64, tokenizer="bytes")
    asked = DataConfig(data_file=("x",), ctx_len=64, tokenizer="bytes", eval_field=("question", "answer"))
    sets = {
        "heldout": load_dataset(data, 256, str(files["rows"])),
        "asked": load_dataset(asked, 256, str(files["asked"])),
        "general": load_dataset(data, 256, str(files["text"])),
    }
    adapters = {0: None, 1: "rwkv-0-s1.pth", 2: "rwkv-0-s2.pth", 3: "rwkv-0.pth"}
    for line in lines:
        assert list(line["sets"]) == ["heldout", "asked", "general"]
        assert (line["main"], line["general"]) == ("heldout", "general")
        adapter = adapters[line["step"]] and folder / adapters[line["step"]]
        model = load_model(job.flags["load_model"], adapter=adapter, dtype=torch.float32, op="torch")
        for name, dataset in sets.items():
            loss, tokens = heldout_loss(model, dataset, micro_bsz=4)
            assert line["sets"][name]["tokens"] == tokens
            assert line["sets"][name]["loss"] == pytest.approx(loss, rel=1e-5)
    whole = json.loads((folder / "evaluation.json").read_text())
    for when, line in (("before", lines[0]), ("after", lines[-1])):
        assert line["sets"]["heldout"]["loss"] == whole[when]["loss"]
        assert line["sets"]["heldout"]["exact_match"] == whole[when]["exact_match"]
        assert line["sets"]["heldout"]["prompts"] == 2 and line["sets"]["general"]["prompts"] == 0
    samples = lines_of(folder, "samples.jsonl")
    assert [(one["step"], one["prompt"], one["expected"]) for one in samples] == [
        (step, f"{n} -> ", str(n)[::-1]) for step in range(4) for n in (50, 51)
    ]
    answers = [answer["got"] for answer in whole["after"]["answers"]]
    assert [one["text"] for one in samples[-2:]] == answers


def test_prompts_of_a_file_are_answered_at_each_measurement(job, files, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1 -> \n\n22 -> \n")
    flags = {"eval_data": files["rows"], "eval_samples": 0, "eval_general": "none", "eval_steps": 2}
    samples = lines_of(job.run("prompts", sample_prompts=prompts, **flags), "samples.jsonl")
    found = [(one["step"], one["set"], one["prompt"], one["expected"]) for one in samples]
    assert found == [(step, "prompts.txt", text, None) for step in (0, 2, 3) for text in ("1 -> ", "22 -> ")]
    prompts.write_text("\n")
    with pytest.raises(UserError, match="--sample_prompts .*prompts.txt holds no prompt"):
        job.run("no prompts", sample_prompts=prompts, **flags)
    with pytest.raises(UserError, match="--sample_prompts .*gone.txt cannot be read: No such file"):
        job.run("no prompts", sample_prompts=tmp_path / "gone.txt", **flags)
    with pytest.raises(UserError, match="--eval_general: .*gone.txt does not exist"):
        job.run("no prose", **(flags | {"eval_general": tmp_path / "gone.txt"}))


def test_prose_that_the_base_knows_nothing_of_is_left_out_with_a_line(job, files, capsys):
    folder = job.run("random base", eval_data=files["rows"], eval_samples=0, eval_steps=1)
    assert all(list(line["sets"]) == ["heldout"] and line["general"] is None for line in lines_of(folder))
    said = capsys.readouterr().out
    assert said.count("general   not measured: the base's loss on it") == 1
    assert f"no better than guessing ({math.log(256):.2f})" in said


COSTS = {"loss": 1.0, "samples": 1.0, "exact_match": 8.0}


@pytest.mark.parametrize(
    ("given", "total", "step", "costs", "expected"),
    [
        # 5 % of 1000 x 4 s are 200 s: 9 measurements between the ends take 9 x (1 + 1 + 8) s.
        (AUTO, 1000, 4.0, COSTS, (100, ANSWERS)),
        # 5 % of 1000 x 1 s are 50 s: too few for the answers.
        (AUTO, 1000, 1.0, COSTS, (100, SAMPLES)),
        # 10 s: 5 of 2 s each, at 167, 334, 501, 668, 835.
        (AUTO, 1000, 0.2, COSTS, (167, SAMPLES)),
        # 6 s: 3 with samples would be few, 6 of the losses alone fit.
        (AUTO, 1000, 0.12, COSTS, (143, LOSSES)),
        (AUTO, 1000, 0.01, COSTS, (0, LOSSES)),
        (AUTO, 7, 100.0, COSTS, (1, LOSSES + 1)),
        (AUTO, 1, 100.0, COSTS, (0, LOSSES)),
        (10, 1000, 0.01, COSTS, (10, SAMPLES)),
        (10, 1000, 100.0, COSTS, (10, ANSWERS)),
        (10, 10, 100.0, COSTS, (0, LOSSES)),
    ],
)  # fmt: skip
def test_measurements_are_about_ten_and_take_at_most_a_twentieth_of_the_time(given, total, step, costs, expected):
    found = rhythm(given, total, step, costs)
    assert found[:2] == expected
    count = len(range(found.every, total, found.every)) if found.every else 0
    cost = [0, 1.0, 2.0, 10.0][found.what]
    if given == AUTO:
        assert count <= 10 and count * cost <= 0.05 * total * step
        assert found.line
    else:
        assert bool(found.line) == (count * cost > 0.05 * total * step or not count)


def test_of_a_large_set_the_same_samples_are_measured_each_time_and_all_at_the_ends(job, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "many.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} -> ", "response": str(n)}) + "\n" for n in range(100, 400)))
    decided = Rhythm(1, LOSSES, "every step")
    monkeypatch.setattr("rwkv_bone.training.measuring.rhythm", lambda *_: decided)
    folder = job.run("large", eval_data=rows, eval_samples=0, eval_general="none")
    # Training reads 3 x 4 samples; 5 % of three times their tokens, for 4 measurements.
    first, *others = lines_of(folder)
    measured = first["sets"]["heldout"]
    assert measured["samples"] == 1 and all(line["sets"]["heldout"]["samples"] == 1 for line in others)
    assert all(line["data"] == first["data"] for line in others)
    whole = json.loads((folder / "evaluation.json").read_text())
    assert whole["before"]["tokens"] == 4 * 300 and measured["tokens"] == 4
    assert "1 of the 300 samples are measured while training, always the same" in capsys.readouterr().out
    # Of a run that goes on, twice as long, it stays the same sample.
    job.run("large", eval_data=rows, eval_samples=0, eval_general="none", epoch_count=2)
    assert lines_of(folder)[: len(others) + 1] == [first, *others]
    assert [(line["step"], line["data"]) for line in lines_of(folder)][-3:] == [(n, first["data"]) for n in (4, 5, 6)]
    folder = job.run("large, asked for", eval_data=rows, eval_samples=0, eval_general="none", eval_steps=2)
    assert {line["sets"]["heldout"]["samples"] for line in lines_of(folder)} == {300}


def test_a_part_is_spread_evenly_over_the_samples(job):
    dataset = load_dataset(parse_train(job.argv({})).data, 256)  # 11 rows
    lengths = [len(dataset[i].ids) for i in (0, 2, 5, 8)]
    assert [len(cut(dataset, 4)[i].ids) for i in range(4)] == lengths
    assert cut(dataset, 11) is dataset and cut(dataset, 99) is dataset
    mean = float(np.mean(dataset.lengths))
    assert [samples_within(dataset, tokens) for tokens in (0, 2.5 * mean, 99 * mean)] == [1, 2, 11]


def test_a_continued_run_goes_on_with_the_lines_up_to_its_state(job, files):
    flags = {"eval_data": files["rows"], "eval_samples": 1, "eval_general": files["text"], "eval_steps": 1}
    flags |= {"epoch_count": 2, "lr_schedule": "constant"}
    reference = lines_of(job.run("uninterrupted", **flags))
    runs = lines_of(folder := job.run("continued", **(flags | {"epoch_count": 1})))
    # What a kill leaves: lines beyond the state, half a line, a line that a disk has changed.
    path = folder / "measurements.jsonl"
    beyond = json.dumps(sealed({key: value for key, value in runs[-1].items() if key != "crc32"} | {"step": 5}))
    changed = path.read_text().splitlines()
    changed[1] = changed[1].replace('"tokens": ', '"tokens": 1')
    path.write_text("\n".join([*changed, beyond, beyond[:40]]) + "\n")
    # Every other step from here on: what lies beyond the state is not measured anew, and yet it goes.
    job.run("continued", **(flags | {"eval_steps": 2}))
    found = lines_of(folder)
    assert [line["step"] for line in found] == [0, 2, 3, 4, 6]
    losses = {line["step"]: {name: one["loss"] for name, one in line["sets"].items()} for line in reference}
    assert all({name: one["loss"] for name, one in line["sets"].items()} == losses[line["step"]] for line in found)
    samples = lines_of(folder, "samples.jsonl")
    assert [one["step"] for one in samples] == [0, 1, 2, 3, 4, 6]


def test_measurements_of_other_held_out_data_are_not_gone_on_with(job, files, capsys):
    flags = {"eval_samples": 0, "eval_general": files["text"], "eval_steps": 1}
    folder = job.run("other data", eval_data=files["rows"], epoch_count=1, **flags)
    capsys.readouterr()
    job.run("other data", eval_data=job.flags["data_file"], epoch_count=2, **flags)
    assert [line["step"] for line in lines_of(folder)] == [3, 4, 5, 6]
    assert "heldout is other data than before: measurements begin anew" in capsys.readouterr().out


def test_a_kill_between_a_step_and_its_measurement_loses_none(job, files):
    from tests.training.runs import Killed

    flags = {"eval_data": files["rows"], "eval_samples": 0, "eval_general": "none", "eval_steps": 2, "save_steps": 2}
    from rwkv_bone.training.heldout import HeldOut

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        record = HeldOut.record

        def die(self, trainer, module, step, **how):
            if step == 2:
                raise Killed
            return record(self, trainer, module, step, **how)

        patch.setattr(HeldOut, "record", die)
        job.run("killed", **flags)
    folder = job.run("killed", **flags)
    assert [line["step"] for line in lines_of(folder)] == [0, 2, 3]


def test_a_file_that_cannot_be_written_spares_the_run_and_is_whole_once_it_can(tmp_path):
    said = []
    path = tmp_path / "gone" / "lines.jsonl"
    record = {"seconds": 1.0, "sets": {}, "main": "a", "general": None, "best": False, "every": 1}
    record |= {"data": {}, "costs": {}}
    path.parent.write_text("a file where a folder should be")
    lines = Lines(path, [], said.append)
    lines.begin()
    lines.add([{"step": 1, **record}])
    assert len(said) == 1 and "lacks lines" in said[0]
    path.parent.unlink()
    lines.add([{"step": 2, **record}])
    lines.add([{"step": 2, **record, "best": True}])
    lines.add([{"step": 3, **record}])
    found = read_lines(path, RECORD, 3)
    assert [(one["step"], one["best"]) for one in found] == [(1, False), (2, True), (3, False)]
    assert [one["step"] for one in read_lines(path, RECORD, 1)] == [1]


def test_the_bundled_general_text_is_of_the_held_out_corpus_which_no_base_of_ours_was_trained_on():
    rows = (REPOSITORY / "assets" / "corpus_heldout.jsonl").read_text().splitlines()
    general = PROSE.read_text().splitlines()
    assert [json.loads(row) for row in general] == [json.loads(row) for i, row in enumerate(rows) if i % 5 in (0, 2)]
    assert 20_000 < len(PROSE.read_bytes()) < 30_000


def test_the_bundled_base_is_measured_on_the_general_text_whatever_the_fields_of_the_data(job, files):
    """Its loss on prose is far below guessing, and what it learns here makes it forget."""
    flags = {"load_model": REPOSITORY / "assets" / "rwkv7-tiny.pth", "bone_r": 32, "precision": "bf16", "op": "auto"}
    flags |= {"eval_data": files["rows"], "eval_samples": 0, "eval_steps": 2, "data_type": "sft", "loss_mask": "last"}
    before, _, after = (line["sets"]["general"] for line in lines_of(job.run("bundled", **flags)))
    assert 1.0 < before["loss"] < 2.0 and after["loss"] > before["loss"]
    assert before["tokens"] == after["tokens"] > 900


def test_a_signal_ends_a_measurement_between_two_steps_and_the_run_makes_it_good(job, files, monkeypatch):
    """It is sent in the first forward pass after step 2; none follows."""
    forward, passes = RWKV.forward, []

    def send(self, *args, **kwargs):
        if not self.training and (job.folder / "signal" / "rwkv-0-s2.pth").exists():
            passes.append(len(passes))
            if len(passes) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, **kwargs)

    flags = {"eval_data": files["rows"], "eval_samples": 1, "eval_general": files["text"], "eval_steps": 2}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RWKV, "forward", send)
        job.run("signal", save_steps=2, **flags)
    assert len(passes) == 1
    folder = job.folder / "signal"
    assert [line["step"] for line in lines_of(folder)] == [0] and len(log_of(folder)) == 2
    job.run("signal", save_steps=2, **flags)
    assert [line["step"] for line in lines_of(folder)] == [0, 2, 3]
