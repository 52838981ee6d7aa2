"""planning/plan.py: what is said before a run, against the run itself, and that nothing is written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_bone import checkpoints, run_lock
from rwkv_bone.cluster.join import join
from rwkv_bone.cluster.watch import Watch
from rwkv_bone.config.flags import parse_train
from rwkv_bone.data import cache, part
from rwkv_bone.errors import UserError
from rwkv_bone.planning import lines, steps
from rwkv_bone.planning import plan as plan_module
from rwkv_bone.planning.heldout import Costs
from rwkv_bone.planning.steps import Timed
from rwkv_bone.planning.timing import Times
from rwkv_bone.training import guard
from rwkv_bone.training.memory import GB, count
from rwkv_bone.training.prepare import prepare_model
from tests.conftest import REPOSITORY, random_model
from tests.training.conftest import log_of


def config_of(job, **flags):
    return parse_train(job.argv({"plan": 1, **flags}))


def planned(job, capsys, **flags) -> str:
    """What `--plan 1` prints."""
    config = config_of(job, **flags)
    capsys.readouterr()
    with join(config) as world, Watch(world, 60) as watch:
        plan_module.plan(config, watch)
    return capsys.readouterr().out


def tree(*folders: Path) -> dict:
    """Every file and folder: content and time of change."""
    paths = [path for folder in folders for path in (folder, *sorted(folder.rglob("*")))]
    return {path: (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns) for path in paths}


@pytest.fixture
def untimed(monkeypatch):
    """No steps are taken; what they would have shown is made up."""
    held = Costs(whole=0.5, loss=0.25, answers=2.0, samples=0.125)
    made = Timed(Times(0.001, 7, 0.02, 3.0), start=4.0, held=held, peak=1.0, reference=9.0, referred=11)
    monkeypatch.setattr(plan_module, "take_steps", lambda *_: made)
    return made


def test_a_plan_takes_steps_and_leaves_every_file_and_folder_as_it_was(job, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(part, "SMALL", 0)  # so that a run would keep the tokens beside the data
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("rows.jsonl", "held.jsonl"):
        (data / name).write_bytes(Path(job.flags["data_file"]).read_bytes())
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(cache, "_of_user", lambda: tmp_path / "home" / "data")
    before = tree(tmp_path)
    said = planned(
        job, capsys, proj_dir=tmp_path / "new", data_file=data / "rows.jsonl", eval_data=data / "held.jsonl",
        grad_cp="1", epoch_count=3,
    )  # fmt: skip
    assert "s a step" in said and "not kept" in said
    assert tree(tmp_path) == before


def test_a_plan_says_what_the_run_then_does(job, capsys):
    said = planned(job, capsys, proj_dir=job.folder / "after", epoch_count=2)
    folder = job.run("after", epoch_count=2)
    ran = capsys.readouterr().out
    for label in ("model", "device", "kernel", "adapter", "data", "steps"):
        of_plan = [line for line in said.splitlines() if line.startswith(label)]
        assert of_plan and of_plan == [line for line in ran.splitlines() if line.startswith(label)]
    assert f"for {len(log_of(folder))} steps" in said


def test_it_is_told_what_a_start_would_find_in_the_folder(job, capsys, untimed):
    folder = job.run("there", epoch_count=1)
    assert f"the run in {folder} is complete" in planned(job, capsys, proj_dir=folder)
    assert f"the run in {folder} has 3 steps left, after step 3" in planned(job, capsys, proj_dir=folder, epoch_count=2)
    said = planned(job, capsys, proj_dir=folder, bone_r=4)
    assert "the run itself would be refused: --proj_dir" in said and "--bone_r was 8 and is now 4" in said
    with run_lock.held(folder):
        before = tree(folder)
        assert f"a run is in progress in {folder}" in planned(job, capsys, proj_dir=folder)
        assert tree(folder) == before


def test_a_run_that_does_not_fit_is_neither_loaded_nor_timed_and_is_told_what_to_change(job, capsys, monkeypatch):
    def never(*_, **options):
        assert options.get("empty"), "the model got memory"
        return prepare_model(*_, **options)

    monkeypatch.setattr(plan_module, "prepare_model", never)
    monkeypatch.setattr(steps, "prepare_model", never)
    monkeypatch.setattr(plan_module, "memory_there", lambda *_: 2**20)
    said = planned(job, capsys, proj_dir=job.folder / "large")
    assert "time      not measured, since the run does not fit now" in said
    assert "a step" not in said.partition("time      ")[2]
    assert "change    " in said


def test_a_model_of_any_size_is_counted_without_memory(job, capsys, monkeypatch):
    monkeypatch.setattr(guard, "total_memory", lambda: 8 * GB)
    sizes = {"load_model": "", "n_layer": 61, "n_embd": 4096, "vocab_size": 65536, "tokenizer": "bytes", "peft": "none"}
    job = type(job)(job.folder, {name: value for name, value in job.flags.items() if name != "bone_r"})
    said = planned(job, capsys, proj_dir=job.folder / "huge", **sizes)
    # 13.2e9 parameters, each with its value and two moments in fp32.
    assert "every weight: 13,237,526,528 of 13,237,526,528" in said
    assert "adapter       49.3 GB" in said and "it would be refused" in said


@pytest.mark.parametrize("flags", [
    {"peft": "bone"}, {"peft": "bone", "bone_mode": "bat"}, {"peft": "bone", "quant": "int8"}, {"peft": "lora"},
    {"peft": "lora", "lora_dropout": 0.1, "quant": "nf4"}, {"peft": "pissa"}, {"peft": "state"}, {"peft": "none"},
    {"peft": "bone", "train_parts": "ln time"},
], ids=lambda flags: " ".join(map(str, flags.values())))  # fmt: skip
@pytest.mark.parametrize("version", [5, 6, 7])
def test_the_model_without_memory_is_counted_as_the_one_that_is_trained(tmp_path, version, flags):
    base = tmp_path / "base.pth"
    checkpoints.write_state(base, random_model(version=version, vocab_size=256, dtype=torch.bfloat16).state_dict())
    words = [word for name, value in flags.items() for word in (f"--{name}", *str(value).split())]
    words += (
        ["--bone_r", "8"]
        if flags["peft"] == "bone"
        else ["--lora_r", "4"]
        if flags["peft"] in ("lora", "pissa")
        else []
    )
    config = parse_train(["--load_model", str(base), "--data_file", "none.jsonl", "--op", "torch", *words])
    real = prepare_model(config, torch.device("cpu"))
    empty = prepare_model(config, torch.device("meta"), empty=True)
    assert all(parameter.device.type == "meta" for parameter in empty.model.parameters())
    assert count(empty.model) == count(real.model)
    assert empty.output.keys == real.output.keys and empty.output.dtypes == real.output.dtypes


def test_the_time_of_a_run_adds_up(job, capsys, untimed):
    """11 rows padded, 4 a step: 3 steps of 12 positions a row at most, here 1 ms a position."""
    said = planned(job, capsys, proj_dir=job.folder / "sum", epoch_count=200, eval_split=0.3, eval_steps=100)
    steps_ = int(re.search(r"steps +(\d+) optimiser", said)[1])
    step = float(re.search(r"time +([\d.]+) s a step", said)[1])
    whole = re.search(r"time +(\S+) in all: (\S+) to start, (\S+) for", said)
    total, start, train = (int(m) * 60 + int(s) for m, s in (text.split(":") for text in whole.groups()))
    assert start == 7 and train == pytest.approx(steps_ * step, rel=0.05, abs=1)
    # Before and after all of it, and every 100 steps a part, without the answers, which would take too long.
    between = (steps_ - 1) // 100
    assert between > 2 and f"for {between + 2} measurements" in said
    assert total == pytest.approx(start + train + 9 + 2 * (0.5 + 2.0 + 0.125) + between * 0.375, abs=2)


def test_the_reference_of_a_preference_run_is_timed_and_nothing_is_kept(job, capsys):
    rows = [{"prompt": f"{i} -> ", "completion": str(i)[::-1], "label": i % 3 > 0} for i in range(30, 60)]
    data = job.folder / "labelled.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    folder = job.folder / "labels"
    said = planned(job, capsys, proj_dir=folder, data_file=data, task="kto", eval_split=0.3)
    (line,) = [line for line in said.splitlines() if line.startswith("reference ")]
    units = re.search(r"(\d+) answers, \d+ good", said)[1]
    assert f"the log-probabilities of {units} answers and of held-out ones" in line
    assert "for the reference, " in said and not folder.exists()
    assert "reference" not in planned(job, capsys, proj_dir=folder)


def test_lines_are_broken_between_words_and_keep_their_column():
    line = f"data      {'word ' * 30}/{'a/path/that/is/never/cut/' * 4}"
    parts = lines.broken(line, 80)
    assert all(len(part) <= 80 for part in parts[:-1]) and len(parts) > 2
    assert all(part.startswith(lines.INDENT) for part in parts[1:])
    assert " ".join(parts).split() == line.split()
    assert lines.broken("short", 80) == ["short"]


def test_a_mistake_is_refused_by_a_plan_as_by_the_run(job, capsys):
    for flags, words in (
        ({"data_file": job.folder / "missing.jsonl"}, "missing.jsonl"),
        ({"load_model": job.folder / "missing.pth"}, "missing.pth"),
        ({"targets": "att.nothing"}, "--targets att.nothing"),
        ({"warmup_steps": 1000}, "--warmup_steps"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            planned(job, capsys, proj_dir=job.folder / "wrong", **flags)
    assert not (job.folder / "wrong").exists()


def test_a_plan_loads_no_library_that_the_run_does_not():
    """Else it would count their memory and the time of their import as the run's."""
    said = (
        "import sys, rwkv_bone.planning.plan; print([n for n in ('torch._dynamo', 'transformers') if n in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", said],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")},
    )
    assert found.stdout == "[]\n", found.stderr


@pytest.mark.slow
def test_two_processes_plan_together_and_write_nothing(job):
    folder, done = job.start("two", plan=1, devices=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout and "s a step" in done.stdout
    assert done.stdout.count("time ") == 2 and not folder.exists()
