"""A run that was stopped and continued is the run that was not: the same parameters to the bit, the same log."""

import json
import os
import re
import shutil
import signal
import socket
import time
from dataclasses import fields

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.config import changes
from rwkv_bone.config.flags import SECTIONS, parse_train
from rwkv_bone.config.saved import from_json
from rwkv_bone.errors import Interrupted, StoppedAtOnce, UserError
from rwkv_bone.training import resume, resume_file
from rwkv_bone.training.log import StepLog
from tests.training.conftest import ROWS, adapter_of, largest_difference, log_of
from tests.training.runs import Killed, dying_after

# 11 rows, 4 a step: steps 3 and 6 end an epoch, step 4 is in the middle of the second.
TWO_EPOCHS = {"epoch_count": 2, "save_steps": 1}
TRUE_FIELDS = ("step", "epoch", "loss", "lr", "tokens", "trained_tokens", "grad_norm")


@pytest.fixture
def killed(job):
    """Train, and stop without warning when step `after` is logged but not saved; returns proj_dir."""

    def train(name, after, **flags):
        with dying_after(after), pytest.raises(Killed):
            job.run(name, **flags)
        return job.folder / name

    return train


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def numbers(folder):
    """The log without the fields for time and memory, which differ from run to run."""
    return [{field: line[field] for field in TRUE_FIELDS} for line in log_of(folder)]


def assert_same_to_the_bit(folder, reference, last="rwkv-1.pth"):
    assert numbers(folder) == numbers(reference)
    assert {path.name for path in folder.glob("rwkv-*.pth")} == {path.name for path in reference.glob("rwkv-*.pth")}
    assert largest_difference(adapter_of(folder, last), adapter_of(reference, last)) == 0
    ours, theirs = (checkpoints.read_state(path / "resume.pth") for path in (folder, reference))
    assert largest_difference(ours, theirs) == 0


def assert_same_files(folder, reference):
    """The very bytes: neither the folder nor the time nor the process is in a file."""
    for name in ("resume.pth", *(path.name for path in reference.glob("rwkv-*"))):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name


# fmt: off
VARIANTS = {
    "stage 1": {},
    "stage 2": {"strategy": "deepspeed_stage_2"},
    "stage 3": {"strategy": "deepspeed_stage_3", "grad_cp": 1},
    "stage 2 with offload": {"strategy": "deepspeed_stage_2_offload"},
    "stage 3 with offload": {"strategy": "deepspeed_stage_3_offload"},
    "accumulation": {"micro_bsz": 1, "accumulate_grad_batches": 4},
    "packed": {"dataload": "pack", "micro_bsz": 1, "ctx_len": 32},
    "bat and base parts in bf16": {
        "bone_mode": "bat", "train_parts": "[ln, time]", "precision": "bf16", "weight_decay": 0.1,
    },
    "dropout": {"peft": "lora", "lora_r": 4, "lora_dropout": 0.5},
    "pissa": {"peft": "pissa", "lora_r": 4},
    "initial state": {"peft": "state"},
    "every weight of a bf16 base": {"peft": "none", "precision": "bf16", "lr_init": 1e-3},
    "every weight at stage 3": {"peft": "none", "precision": "bf16", "lr_init": 1e-3, "strategy": "deepspeed_stage_3"},
    "chunks with a cut gradient": {"chunk_ctx": 4, "bptt_chunks": 1},
}
# fmt: on


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_killed_in_the_middle_of_an_epoch_ends_as_if_it_had_not_been(job, killed, name):
    flags = TWO_EPOCHS | VARIANTS[name]
    reference = job.run(f"{name} whole", **flags)
    folder = killed(f"{name} killed", after=5, **flags)
    assert len(log_of(folder)) == 5 and checkpoints.read_metadata(folder / "resume.pth")["step"] == 4
    job.run(folder.name, **flags)
    assert_same_to_the_bit(folder, reference)
    assert_same_files(folder, reference)


@pytest.fixture(scope="module")
def halfway(job):
    """{name: proj_dir}: the first of two epochs at a constant rate, as a run of its own; `whole`: both in one run."""
    flags = TWO_EPOCHS | {"lr_schedule": "constant", "save_steps": 0, "eval_data": job.flags["data_file"]}
    return {
        "flags": flags,
        "half": job.run("half", **(flags | {"epoch_count": 1})),
        "whole": job.run("resume-whole", **flags),
    }


@pytest.fixture
def half(halfway, tmp_path):
    """A copy of the half run, to continue: paths in a resume file are relative to its folder."""
    return shutil.copytree(halfway["half"], tmp_path / "half")


def first_line(said):
    """Of what the run says: the notes on its command line come before."""
    return next(line for line in said.splitlines() if not line.startswith("note: "))


def go_on(job, folder, **flags):
    return job.run(folder, resume=1, **flags)


def test_more_epochs_continue_a_finished_run_and_the_new_schedule_is_said(job, halfway, half, capsys):
    go_on(job, half, **halfway["flags"])
    assert_same_to_the_bit(half, halfway["whole"])
    said = capsys.readouterr().out
    assert first_line(said) == f"resume    continues the run in {half} after step 3 of 6, from resume.pth"
    assert "--epoch_count 1 became 2: the schedule now ends at step 6, so that the next learning rate is 0.01" in said
    assert "step 6/6  epoch 2/2" in said


def test_held_out_before_is_that_of_the_beginning(job, halfway, half, capsys):
    go_on(job, half, **halfway["flags"])
    ours, theirs = (json.loads((folder / "evaluation.json").read_text()) for folder in (half, halfway["whole"]))
    assert ours == theirs
    assert [ours[when]["step"] for when in ("before", "after")] == [0, 6]
    assert "measured when the run began" in capsys.readouterr().out


def test_other_held_out_data_is_measured_where_the_run_stands(job, halfway, half, tmp_path):
    rows = tmp_path / "other.jsonl"
    rows.write_text(json.dumps({"prompt": "5 -> ", "response": "5"}) + "\n")
    go_on(job, half, **(halfway["flags"] | {"eval_data": rows}))
    report = json.loads((half / "evaluation.json").read_text())
    assert [report[when]["step"] for when in ("before", "after")] == [3, 6]


def test_the_folders_own_settings_serve_when_no_others_are_given(halfway, half):
    from rwkv_bone.training.fit import fit

    fit(parse_train(["--resume", "1", "--proj_dir", str(half), "--epoch_count", "2"]))
    assert_same_to_the_bit(half, halfway["whole"])
    assert from_json((half / "config.json").read_text()).run.resume == "auto"


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_another_stage_and_accumulation_continue_it_to_rounding(job, halfway, half, strategy, capsys):
    go_on(job, half, **(halfway["flags"] | {"strategy": strategy, "micro_bsz": 2, "accumulate_grad_batches": 2}))
    assert largest_difference(adapter_of(half, "rwkv-1.pth"), adapter_of(halfway["whole"], "rwkv-1.pth")) < 2e-5
    assert [line["loss"] for line in log_of(half)] == pytest.approx(
        [line["loss"] for line in log_of(halfway["whole"])], rel=1e-5
    )
    assert (
        "1 device x 1 forward pass x micro_bsz 4 became 1 device x 2 forward passes x micro_bsz 2: the same "
        "samples a step, equal up to rounding"
    ) in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            {"lr_init": 2e-2, "bone_r": 4},
            "half holds a run of other settings: --bone_r was 8 and is now 4; --lr_init was 0.01 and is now 0.02. "
            r"Nothing there was changed.*--resume_with lr_init goes on with the new values \(--bone_r cannot change in "
            r"a run\); another --proj_dir begins a new run, --overwrite 1 replaces this one$",
        ),
        ({"train_parts": "ln"}, "--train_parts was empty and is now ln"),
        ({"micro_bsz": 2}, "a step was 1 device x 1 forward pass x micro_bsz 4; now it is 1 .* x micro_bsz 2"),
        ({"overwrite": 1}, "--overwrite 1 has no effect with --resume 1"),
    ],
)  # fmt: skip
def test_what_determines_the_run_may_not_change(job, halfway, half, flags, message):
    before = (half / "resume.pth").read_bytes()
    with pytest.raises(UserError, match=message):
        go_on(job, half, **(halfway["flags"] | flags))
    assert (half / "resume.pth").read_bytes() == before


def test_every_setting_that_is_free_to_change_exists():
    names = {spec.name for section in SECTIONS.values() for spec in fields(section)}
    assert changes.FREE | changes.ON_PURPOSE < names and not changes.FREE & changes.ON_PURPOSE - {"data_file"}


def test_chunks_may_change_unless_they_cut_the_gradient(job):
    def saved(**flags):
        config = parse_train(job.argv(flags))
        return resume.Saved(job.folder / "resume.pth", 1, job.folder / "rwkv-0.pth", config, {})

    saved(chunk_ctx=4).check_settings(parse_train(job.argv({"chunk_ctx": 8})))
    with pytest.raises(UserError, match="--chunk_ctx was 4 and is now 8"):
        saved(chunk_ctx=4, bptt_chunks=1).check_settings(parse_train(job.argv({"chunk_ctx": 8, "bptt_chunks": 1})))


@pytest.mark.parametrize("dataload, allowed", [("pad", True), ("pack", False), ("get", False)])
def test_how_a_step_is_cut_may_change_only_where_the_samples_stay(dataload, allowed):
    cut = resume.Cut(devices=2, accumulate=2, micro_bsz=4)
    assert cut.same_samples(resume.Cut(1, 2, 8), dataload) == allowed
    assert cut.same_samples(resume.Cut(4, 1, 4), dataload) == (dataload != "get")
    assert not cut.same_samples(resume.Cut(1, 2, 4), dataload)


def test_other_data_and_another_base_are_refused(job, halfway, half, tmp_path):
    rows = [*ROWS[:-1], (ROWS[-1][0], "00")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in rows))
    with pytest.raises(
        UserError, match="--data_file holds other samples .rows.jsonl, now rows.jsonl; fingerprint .*half began with"
    ):
        go_on(job, half, **(halfway["flags"] | {"data_file": data}))
    state = {key: tensor + 1 for key, tensor in checkpoints.read_state(job.flags["load_model"]).items()}
    checkpoints.write_state(tmp_path / "base.pth", state)
    with pytest.raises(
        UserError, match="--load_model holds other weights .base.pth, now base.pth; fingerprint .*half began with"
    ):
        go_on(job, half, **(halfway["flags"] | {"load_model": tmp_path / "base.pth"}))


def test_the_same_data_and_base_may_have_moved(job, halfway, half, tmp_path):
    moved = {name: shutil.copy(job.flags[name], tmp_path / f"moved-{name}{job.flags[name].suffix}")
             for name in ("load_model", "data_file")}  # fmt: skip
    go_on(job, half, **(halfway["flags"] | moved))
    assert largest_difference(adapter_of(half, "rwkv-1.pth"), adapter_of(halfway["whole"], "rwkv-1.pth")) == 0


def test_where_there_is_nothing_to_continue_it_says_what_there_is(job, halfway, half, tmp_path):
    with pytest.raises(UserError, match="nowhere has no config.json, so there is no run to continue: check --proj_dir"):
        go_on(job, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (half / "resume.pth").unlink()
    with pytest.raises(
        UserError, match="half has no resume.pth.*: only rwkv-0.pth, to start a new run from .* with --peft_load"
    ):
        go_on(job, half, **halfway["flags"])
    (half / "rwkv-0.pth").unlink()
    with pytest.raises(UserError, match="half has no resume.pth.*: without --resume 1 a run begins there"):
        go_on(job, half, **halfway["flags"])


@pytest.mark.parametrize("resume", ["auto", 1])
def test_a_complete_run_is_said_to_be_and_left_alone(job, halfway, half, resume, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in half.iterdir()}
    job.run(half, **(halfway["flags"] | {"epoch_count": 1, "resume": resume}))
    said = capsys.readouterr().out
    assert first_line(said) == f"resume    the run in {half} is complete: 3 of 3 optimiser steps"
    measured = json.loads((half / "evaluation.json").read_text())
    assert f"after     loss {measured['after']['loss']:.4f} nats per token" in said
    assert f"--peft_checkpoint {half}/rwkv-0.pth --output {half}/merged.pth" in said and "model     " not in said
    assert said.endswith("nothing is left to do; a larger --epoch_count trains longer\n")
    assert {path.name: path.stat().st_mtime_ns for path in half.iterdir()} == before


@pytest.mark.parametrize("name, half_of_it", [("rwkv-0.pth", True), ("rwkv-0.pth", False), ("rwkv-0.json", True)])
def test_the_adapter_of_a_complete_run_is_written_again_if_it_was_damaged(job, halfway, half, name, half_of_it, capsys):
    before = (half / name).read_bytes()
    (half / name).write_bytes(before[: len(before) // 2] if half_of_it else b"")
    job.run(half, **(halfway["flags"] | {"epoch_count": 1}))
    assert "resume    rwkv-0.pth was lost or damaged: it is written again, from resume.pth" in capsys.readouterr().out
    assert (half / name).read_bytes() == before


@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_3"])
def test_a_run_stopped_in_its_last_measurement_makes_it_up(job, halfway, half, strategy, capsys):
    path = half / "evaluation.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({key: report[key] for key in ("data", "before")}))
    (half / "loss.png").unlink()
    go_on(job, half, **(halfway["flags"] | {"epoch_count": 1, "strategy": strategy}))
    assert json.loads(path.read_text()) == report
    assert (half / "loss.png").is_file() and "\nresults " in capsys.readouterr().out


@pytest.fixture
def files(half):
    """What the folder holds: {name: bytes}."""
    return lambda: {path.name: path.read_bytes() for path in half.iterdir()}


@pytest.mark.parametrize("left", ["log and config", "empty adapter and state"])
def test_where_a_run_has_saved_nothing_the_next_one_begins_anew(job, halfway, half, left, capsys):
    for name in ("resume.pth", "rwkv-0.pth"):
        (half / name).unlink()
        if left.startswith("empty"):
            (half / name).touch()
    (half / "mine.txt").write_text("mine")
    job.run(half, **(halfway["flags"] | {"epoch_count": 1}))
    said = capsys.readouterr().out
    assert first_line(said) == f"resume    a run in {half} ended before it saved anything: this one begins anew"
    assert_same_files(half, halfway["half"])
    assert numbers(half) == numbers(halfway["half"]) and (half / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", ["auto", "1"])
def test_results_without_a_state_are_kept_and_it_is_said_what_can_be_done(job, halfway, half, files, resume):
    shutil.copy(half / "rwkv-0.pth", half / "rwkv-10.pth")
    (half / "resume.pth").unlink()
    before, newest = files(), re.escape(str(half / "rwkv-10.pth"))
    with pytest.raises(UserError, match=f"no resume.pth.*start a new run from {newest} with --peft_load"):
        job.run(half, **(halfway["flags"] | {"resume": resume}))
    assert files() == before


@pytest.mark.parametrize("resume", ["never", 0, "false"])
def test_with_never_a_folder_of_results_is_refused(job, halfway, half, files, resume):
    before = files()
    with pytest.raises(
        UserError, match=r"holds the results of an earlier run \(rwkv-0.pth\), and --resume (never|0) keeps"
    ):
        job.run(half, **(halfway["flags"] | {"resume": resume}))
    assert files() == before


def test_overwrite_replaces_an_unfinished_run(job, halfway, half, capsys):
    job.run(half, **(halfway["flags"] | {"epoch_count": 1, "overwrite": 1}))
    assert "resume    " not in capsys.readouterr().out
    assert_same_files(half, halfway["half"])


def test_the_learning_rate_changes_on_purpose_and_stays_changed(job, halfway, half, killed, capsys):
    flags = halfway["flags"] | {"lr_init": 5e-3}
    with pytest.raises(UserError, match="--lr_init was 0.01 and is now 0.005.*--resume_with lr_init goes on"):
        job.run(half, **flags)
    killed(half, after=4, resume_with="[lr_init, grad_clip]", **flags)
    said = capsys.readouterr().out
    assert "resume    --lr_init 0.01 became 0.005, from step 4 on\n" in said
    assert "resume    --resume_with grad_clip: it has not changed\n" in said
    assert "so that the next learning rate is 0.005 instead of 0.01" in said
    state = checkpoints.read_metadata(half / "resume.pth")
    config = from_json((half / "config.json").read_text())
    assert (state["step"], state["config"]["optim"]["lr_init"], config.optim.lr_init) == (3, 5e-3, 5e-3)
    assert config.run.resume_with == ()
    job.run(half, **flags)  # it need not be named again
    assert [line["lr"] for line in log_of(half)] == [1e-2] * 3 + [5e-3] * 3
    with pytest.raises(UserError, match="--lr_init was 0.005 and is now 0.01"):
        job.run(half, **halfway["flags"])


def test_a_mended_row_is_taken_up_and_the_next_start_need_not_be_told(job, halfway, half, killed, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    rows = [*ROWS[:-1], (ROWS[-1][0], "00")]
    data.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in rows))
    flags = halfway["flags"] | {"data_file": data}
    with pytest.raises(UserError, match="--resume_with data_file goes on with these samples"):
        job.run(half, **flags)
    killed(half, after=4, resume_with="data_file", **flags)
    assert (
        "resume    --data_file holds other samples than before: from step 4 on the order is that of the new ones\n"
        in (capsys.readouterr().out)
    )
    job.run(half, **flags)
    assert [line["step"] for line in log_of(half)] == [1, 2, 3, 4, 5, 6]
    # The mended row is read: the losses are those of the new samples.
    assert [line["trained_tokens"] for line in log_of(half)] != [
        line["trained_tokens"] for line in log_of(halfway["whole"])
    ]


def test_the_same_data_is_said_to_be_the_same(job, halfway, half, capsys):
    job.run(half, **(halfway["flags"] | {"epoch_count": 1, "resume_with": "data_file"}))
    assert "resume    --resume_with data_file: the samples have not changed\n" in capsys.readouterr().out


def test_resume_with_needs_a_run_to_continue(job, halfway, tmp_path):
    with pytest.raises(
        UserError, match="--resume_with: .*new has no resume.pth.*without --resume_with a run begins there"
    ):
        job.run(tmp_path / "new", resume_with="lr_init", **halfway["flags"])
    assert not (tmp_path / "new").exists()


def test_a_longer_epoch_on_purpose_repeats_no_sample(job, halfway, half, capsys):
    """Epochs are counted in steps then; the order of the samples goes on through the passes as before."""
    job.run(half, **(halfway["flags"] | {"epoch_count": 1, "epoch_steps": 6, "resume_with": "epoch_steps"}))
    assert "resume    --epoch_steps 0 became 6, from step 4 on\n" in capsys.readouterr().out
    assert largest_difference(adapter_of(half, "rwkv-0.pth"), adapter_of(halfway["whole"], "rwkv-1.pth")) == 0


@pytest.mark.parametrize("damage", ["lines lost", "deleted", "not text"])
def test_a_run_goes_on_without_its_log_and_its_measurement(job, halfway, half, damage, capsys):
    log, measured = half / "train_log.jsonl", half / "evaluation.json"
    if damage == "deleted":
        log.unlink()
        measured.unlink()
    else:
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:2]) if damage[0] == "l" else b"\xff\x00\n")
        measured.write_text(measured.read_text()[:-20])
    go_on(job, half, **halfway["flags"])
    kept = 2 if damage == "lines lost" else 0
    output = capsys.readouterr().out
    assert f"resume    {log} lacks {3 - kept} step{'s' * (kept < 2)} of 3: so does the loss curve" in output
    assert [line["step"] for line in log_of(half)] == [*range(1, kept + 1), *range(4, len(log_of(half)) + 4 - kept)]
    assert len(log_of(half)) >= kept + 3 and (half / "loss.png").is_file()
    assert f"{measured} is damaged" in output or damage == "deleted"
    assert ", after step 3" in output and "after" in json.loads(measured.read_text())


def test_a_run_that_began_from_an_adapter_goes_on_without_its_file(job):
    start = job.run("start", save_steps=1)
    adapter = shutil.copy(start / "rwkv-0.pth", job.folder / "start.pth")
    whole = job.run("started whole", peft_load=adapter, epoch_count=2)
    folder = job.run("started", peft_load=adapter, epoch_count=1)
    os.unlink(adapter)
    job.run("started", peft_load=adapter, epoch_count=2, resume=1)
    assert [line["step"] for line in log_of(folder)] == [line["step"] for line in log_of(whole)]
    # The first epoch of the one had another schedule: its parameters differ, and its start does not.
    assert log_of(folder)[0]["loss"] == log_of(whole)[0]["loss"]


def test_another_number_of_threads_is_recorded_and_said(job, capsys):
    folder = job.run("threads")
    assert checkpoints.read_metadata(folder / "rwkv-0.pth")["threads"] == 1
    assert "1 thread; " in capsys.readouterr().out
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        job.run("threads", resume=1, epoch_count=2)
    finally:
        torch.set_num_threads(before)
    output = capsys.readouterr().out
    assert "2 threads; " in output
    said = "resume    1 thread became 2: equal up to rounding (OMP_NUM_THREADS=1 gives the same again)"
    assert said in output
    assert checkpoints.read_metadata(folder / "rwkv-1.pth")["threads"] == 2


def failing_at(monkeypatch, step, error):
    """Let the write of the resume file after `step` fail in the middle, in a run that saves each step."""
    original, written = resume_file.write_tensors, []

    def write(path, layout, tensors, metadata):
        written.append(path)
        if len(written) == step:
            path.write_bytes(b"half a file")
            next(iter(tensors))
            raise error
        original(path, layout, tensors, metadata)

    monkeypatch.setattr(resume_file, "write_tensors", write)


def test_a_kill_while_the_state_is_written_leaves_the_one_before(job, monkeypatch):
    reference = job.run("state whole", **TWO_EPOCHS)
    with monkeypatch.context() as patch:
        failing_at(patch, 3, Killed())
        patch.setattr(os, "unlink", lambda *_, **__: None)  # a killed process tidies nothing up
        with pytest.raises(Killed):
            job.run("state killed", **TWO_EPOCHS)
    folder = job.folder / "state killed"
    assert checkpoints.read_metadata(folder / "resume.pth")["step"] == 2
    assert (folder / "rwkv-0.pth").is_file()
    (left,) = folder.glob(".resume.*")
    left.rename(folder / ".resume.pth.1.partial.pth")  # of another process
    job.run(folder.name, resume=1, **TWO_EPOCHS)
    assert_same_to_the_bit(folder, reference)
    assert not list(folder.glob(".*"))


def test_a_full_disk_stops_the_run_and_keeps_the_state_before(job, monkeypatch):
    failing_at(monkeypatch, 2, OSError(28, "No space left on device"))
    with pytest.raises(UserError, match="after step 2: .*resume.pth could not be written: No space left on device"):
        job.run("state full", **TWO_EPOCHS)
    assert checkpoints.read_metadata(job.folder / "state full" / "resume.pth")["step"] == 1


@pytest.fixture
def signalled(monkeypatch):
    """signalled(step, times) makes this process send itself Ctrl-C, `times` times, when `step` is logged."""
    # A shell that starts tests in the background has them ignore Ctrl-C, and so would the run.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def at(step, times, number=signal.SIGINT):
        original = StepLog.on_train_batch_end

        def interrupt(self, trainer, module, *rest):
            original(self, trainer, module, *rest)
            if module.window_finished() and module.window.step == step:
                for _ in range(times):
                    signal.raise_signal(number)

        monkeypatch.setattr(StepLog, "on_train_batch_end", interrupt)

    yield at
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_the_step_under_way_and_says_how_to_go_on(job, signalled, capfd):
    signalled(step=2, times=1)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as stopped:
        job.run("ctrl-c")
    folder = job.folder / "ctrl-c"
    assert stopped.value.signum == signal.SIGINT
    assert str(stopped.value).startswith(
        f"interrupted; the last step saved is 2, in {folder}/rwkv-0-s2.pth\ngo on with: "
    )
    assert str(stopped.value).endswith(f"train.py --resume 1 --proj_dir {folder}")
    assert "stopping after this step, to save it (once more: at once)" in capfd.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert checkpoints.read_metadata(folder / "resume.pth")["step"] == len(log_of(folder)) == 2


def test_a_terminal_that_closes_sends_several_signals_and_the_step_is_saved(job, signalled):
    signalled(step=2, times=3, number=signal.SIGHUP)
    # Otherwise a run that does not hear the signal would end these tests.
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        with pytest.raises(Interrupted) as stopped:
            job.run("hangup")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stopped.value.signum == signal.SIGHUP
    assert (job.folder / "hangup" / "rwkv-0-s2.pth").is_file() and len(log_of(job.folder / "hangup")) == 2


def test_a_signal_that_the_run_was_started_to_ignore_is_ignored(job, signalled):
    signalled(step=2, times=3, number=signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        folder = job.run("nohup")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(log_of(folder)) == 3 and (folder / "rwkv-0.pth").is_file()


def test_ctrl_c_in_the_last_step_leaves_only_the_measurement_to_do(job, signalled, monkeypatch):
    flags = {"eval_data": job.flags["data_file"]}
    signalled(step=3, times=1)
    with pytest.raises(Interrupted, match="the last step saved is 3, in .*rwkv-0.pth"):
        job.run("ctrl-c last", **flags)
    monkeypatch.undo()
    assert "after" not in json.loads((job.folder / "ctrl-c last" / "evaluation.json").read_text())
    folder = job.run("ctrl-c last", resume=1, **flags)
    assert json.loads((folder / "evaluation.json").read_text())["after"]["step"] == 3


def test_a_second_ctrl_c_leaves_at_once(job, signalled, capsys):
    signalled(step=2, times=2)
    with pytest.raises(StoppedAtOnce) as stopped:
        job.run("ctrl-c twice", save_steps=1)
    assert stopped.value.signum == signal.SIGINT
    assert "stopped at once; the last step saved is 1, in " in capsys.readouterr().out
    assert checkpoints.read_metadata(job.folder / "ctrl-c twice" / "resume.pth")["step"] == 1


# Enough steps that the signal comes while they run.
LONG = {"devices": 2, "strategy": "deepspeed_stage_3", "micro_bsz": 2, "epoch_count": 8, "epoch_save": 9}


@pytest.fixture(scope="module")
def terminated(job):
    """Two processes at stage 3, of which one is sent SIGTERM after a few steps: (proj_dir, exit status, stderr)."""
    folder = job.folder / "terminated"
    log, deadline = folder / "train_log.jsonl", time.monotonic() + 300
    with job.launch(folder.name, **LONG) as process:
        try:
            while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) >= 4):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=300)
        finally:
            process.kill()
    return folder, process.returncode, errors


def test_sigterm_to_one_process_stops_all_after_the_same_step(terminated):
    folder, status, errors = terminated
    assert status == 128 + signal.SIGTERM
    step = len(log_of(folder))
    assert 4 <= step < 24 and checkpoints.read_metadata(folder / "resume.pth")["step"] == step
    assert [path.name for path in folder.glob("rwkv-*.pth")] == [f"rwkv-{(step - 1) // 3}-s{step}.pth"]
    assert errors.splitlines()[1] == "stopping after this step, to save it (once more: at once)"
    assert errors.count("interrupted; the last step saved is ") == 1 and "Traceback" not in errors


@pytest.fixture(scope="module")
def not_terminated(job):
    folder, done = job.ranks("not terminated", **LONG)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_continue_as_if_they_had_not_been_stopped(job, terminated, not_terminated, tmp_path):
    folder = shutil.copytree(terminated[0], tmp_path / "terminated")
    _, done = job.start(folder, resume=1, **LONG)
    assert done.returncode == 0, done.stderr
    (extra,) = folder.glob("rwkv-*-s*.pth")
    extra.unlink()
    assert_same_to_the_bit(folder, not_terminated, "rwkv-7.pth")
    assert done.stderr == ""


@pytest.mark.slow
def test_a_machine_that_does_not_see_the_folder_continues_the_run_with_the_one_that_does(
    job, terminated, not_terminated, tmp_path
):
    """Parameters, moments, settings and measurement all come from the first machine."""
    folder, nowhere = shutil.copytree(terminated[0], tmp_path / "terminated"), tmp_path / "nowhere"
    flags = LONG | {"devices": 1, "num_nodes": 2}
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [job.launch(path, environment=there | {"NODE_RANK": str(rank)}, **flags)
             for rank, path in enumerate((folder, nowhere))]  # fmt: skip
    try:
        said = [node.communicate(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert f"resume    continues the run in {folder} after step " in said[0][0] and not nowhere.exists()
    (extra,) = folder.glob("rwkv-*-s*.pth")
    extra.unlink()
    assert_same_to_the_bit(folder, not_terminated, "rwkv-7.pth")


def test_one_process_continues_what_two_began_to_rounding(terminated, not_terminated, tmp_path, killed):
    step = len(log_of(terminated[0]))
    folder = shutil.copytree(terminated[0], tmp_path / "terminated")
    killed(folder, after=step + 3, resume=1, **(LONG | {"devices": 1, "strategy": "auto", "micro_bsz": 4}))
    for field in ("loss", "grad_norm"):
        assert [line[field] for line in log_of(folder)[step:]] == pytest.approx(
            [line[field] for line in log_of(not_terminated)[step : step + 3]], rel=1e-5
        )
