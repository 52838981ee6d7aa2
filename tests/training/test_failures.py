"""A run that cannot go on stops with a sentence, on every rank, and keeps what was good."""

import contextlib
import errno
import json
import re
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.config.flags import parse_train
from rwkv_bone.data import BatchPlan
from rwkv_bone.errors import UserError
from rwkv_bone.training.log import read_log
from rwkv_bone.training.module import BadStep, TrainingModule, read_bad_steps
from rwkv_bone.training.prepare import load_data, plan_batches, prepare_model
from rwkv_bone.training.schedule import learning_rate
from tests.training.conftest import ROWS, adapter_of, largest_difference, log_of
from tests.training.runs import Killed, dying_after

ROUNDING = 2e-5  # of parameters that Adam has moved by about 1e-2 a step


@pytest.fixture(scope="module")
def nan_base(job):
    """A base whose embedding of the byte "6", which stands in some rows only, is finite, but no norm of it is."""
    state = {key: tensor.clone() for key, tensor in checkpoints.read_state(job.flags["load_model"]).items()}
    state["emb.weight"][ord("6")] = 3e38
    state["emb.weight"][ord("6"), ::2] *= -1
    path = job.folder / "nan.pth"
    checkpoints.write_state(path, state)
    return path


def bad_rows() -> list[int]:
    """Line numbers of the rows whose inputs hold a "6"."""
    return [number for number, row in enumerate(ROWS, 1) if "6" in "".join(row)]


def test_a_nan_loss_names_step_and_rows_and_keeps_the_parameters_before_it(job, nan_base, capsys):
    with pytest.raises(UserError) as stopped:
        job.run("nan", load_model=nan_base, micro_bsz=1, epoch_count=2, random_seed=1, max_bad_steps=0)
    folder = job.folder / "nan"
    taken = len(log_of(folder))
    assert taken >= 1, "the seed puts a bad row first: choose another"
    message = str(stopped.value)
    assert message.startswith(f"optimiser step {taken + 1}: the loss is not a finite number, from ")
    row = int(message.split("rows.jsonl:")[1].split(";")[0])
    assert row in bad_rows()
    saved = adapter_of(folder, f"rwkv-0-s{taken}.pth")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert f"rwkv-0-s{taken}.pth" in capsys.readouterr().out


@pytest.mark.parametrize(
    "stage, more",
    [
        pytest.param(1, {"micro_bsz": 1, "accumulate_grad_batches": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"micro_bsz": 2}, marks=pytest.mark.slow),
        (3, {"micro_bsz": 2}),
    ],
)
def test_two_processes_skip_the_same_steps_and_stop_together(job, nan_base, capsys, stage, more):
    """A bad row is read by one process alone, and comes once in each of three epochs."""
    flags = {"load_model": nan_base, "epoch_count": 3, "max_bad_steps": 2}
    alone, name = job.folder / f"alone-{stage}", f"nan-{stage}"
    with pytest.raises(UserError) as stopped:
        job.run(alone.name, **flags)
    skipped = [line for line in capsys.readouterr().out.splitlines() if "; the step was skipped (" in line]
    folder, done = job.ranks(name, devices=2, strategy=f"deepspeed_stage_{stage}", **(flags | more))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    steps = [r"optimiser step (\d+)", str(stopped.value)], [r"optimiser step (\d+)", done.stderr]
    ours, theirs = (re.findall(*one) for one in steps)
    assert ours == theirs and len(ours) == 3
    assert done.stderr.startswith(f"error: optimiser step {ours[0]}: the loss is not a finite number, from ")
    assert done.stderr.count("error:") == 1
    said = [line for line in done.stdout.splitlines() if "; the step was skipped (" in line]
    assert len(said) == len(skipped) == 2
    assert [line.split(", from ")[0] for line in said] == [line.split(", from ")[0] for line in skipped]
    states = [checkpoints.read_state(path / "resume.pth") for path in (folder, alone)]
    assert largest_difference(*states) < ROUNDING
    saved, expected = (checkpoints.read_metadata(path / "resume.pth") for path in (folder, alone))
    assert saved["step"] == expected["step"] == int(ours[0]) - 1
    assert [step for step, *_ in saved["bad_steps"]] == [int(step) for step in ours[1:]]


def test_an_error_while_a_batch_is_made_stops_the_run_with_its_text(job, monkeypatch):
    """Batches are made by a thread, whose exceptions nobody would see."""
    original = BatchPlan.batch

    def third_fails(self, epoch, step, micro, rank):
        if step == 2:
            raise UserError("rows.bin: the file has become shorter")
        return original(self, epoch, step, micro, rank)

    monkeypatch.setattr(BatchPlan, "batch", third_fails)
    with pytest.raises(UserError, match="rows.bin: the file has become shorter"):
        job.run("batch")
    assert len(log_of(job.folder / "batch")) == 2
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


class InfiniteGradient(torch.autograd.Function):
    """The loss unchanged, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


@contextlib.contextmanager
def spoilt(**steps):
    """In this context these steps are bad, by their last micro-batch: `s4="nan"`, a loss, or "gradient", which is one.

    The loss is spoilt and the gradient is not: DeepSpeed decides by the gradient alone, before we look at the loss.
    """
    original = TrainingModule._loss

    def spoil(self, batch, scale):
        loss, how = original(self, batch, scale), steps.get(f"s{self._step + 1}")
        if how is None or self._micro + 1 < self.plan.accumulate:
            return loss
        return InfiniteGradient.apply(loss) if how == "gradient" else loss + float(how)

    with mock.patch.object(TrainingModule, "_loss", spoil):
        yield


def by_hand(job, skipped, flags):
    """The trained parameters after a run that does not take the steps of these numbers, by plain PyTorch."""
    config = parse_train(job.argv({**flags, "proj_dir": job.folder / "by hand"}))
    torch.manual_seed(config.run.random_seed)
    prepared = prepare_model(config, torch.device("cpu"))
    dataset, _ = load_data(config, prepared.arch.vocab_size, config.data)
    plan, model = plan_batches(config, dataset), prepared.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), eps=1e-8, weight_decay=config.optim.weight_decay)
    total = plan.total_steps(config.run.epoch_count)
    for step in set(range(total)) - {number - 1 for number in skipped}:
        optimizer.zero_grad()
        for micro in range(plan.accumulate):
            batch = plan.batch(*plan.locate(step), micro, 0)
            packed = {"cu_seqlens": batch.cu_seqlens, "label_rows": batch.label_rows}
            (model(batch.ids, labels=batch.labels, **packed) / batch.window_tokens).backward()
        if config.optim.grad_clip:
            torch.nn.utils.clip_grad_norm_(trained, config.optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, config.optim)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


BAD = {"s1": "inf", "s4": "gradient", "s5": "nan"}
# fmt: off
VARIANTS = {
    "stage 1": {},
    "stage 1 without clipping": {"grad_clip": 0.0},
    "stage 2": {"strategy": "deepspeed_stage_2"},
    "stage 3": {"strategy": "deepspeed_stage_3"},
    "stage 3 without clipping": {"strategy": "deepspeed_stage_3", "grad_clip": 0.0},
    "stage 2 with offload": {"strategy": "deepspeed_stage_2_offload", "grad_clip": 0.0},
    "stage 3 with offload": {"strategy": "deepspeed_stage_3_offload"},
    "accumulation": {"micro_bsz": 1, "accumulate_grad_batches": 4},
    "accumulation with offload": {
        "micro_bsz": 2, "accumulate_grad_batches": 2, "strategy": "deepspeed_stage_2_offload",
    },
    "packed": {"dataload": "pack", "micro_bsz": 1, "ctx_len": 32},
    "chunks": {"chunk_ctx": 4},
}
# fmt: on


@pytest.mark.parametrize("name", VARIANTS)
def test_bad_steps_are_skipped_as_if_they_were_not_there_and_a_killed_run_knows_of_them(job, name, capsys):
    """The first step is bad, when there are no moments yet; the fourth again after the kill, and the fifth."""
    flags = {"epoch_count": 2, "save_steps": 1, **VARIANTS[name]}
    with spoilt(**BAD):
        whole = job.run(f"{name} whole", **flags)
        assert capsys.readouterr().out.count("; the step was skipped (") == 3
        killed = job.folder / f"{name} killed"
        with dying_after(4), pytest.raises(Killed):
            job.run(killed.name, **flags)
        assert checkpoints.read_metadata(killed / "resume.pth")["step"] == 3
        job.run(killed.name, resume=1, **flags)
    lines = log_of(whole)
    steps = len(lines)
    assert [line["step"] for line in lines if line["grad_norm"] is None] == [1, 4, 5] and steps > 5
    assert [line["step"] for line in lines if line["loss"] is None] == [1, 5]
    for file in ("resume.pth", "rwkv-1.pth"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()
    assert [[line[key] for key in ("step", "loss", "lr")] for line in log_of(killed)] == [
        [line[key] for key in ("step", "loss", "lr")] for line in lines
    ]
    bad = checkpoints.read_metadata(whole / "resume.pth")["bad_steps"]
    assert [step[:2] for step in bad] == [[1, "loss"], [4, "gradient"], [5, "loss"]]
    assert all("rows.jsonl:" in rows for _, _, rows in bad)
    assert largest_difference(adapter_of(whole, "rwkv-1.pth"), by_hand(job, (1, 4, 5), flags)) < ROUNDING


def test_one_bad_step_too_many_stops_at_the_last_good_one_and_names_all(job, capsys):
    """Also those of the processes before. The state then repeats every bad step since the last good one."""
    flags = {"epoch_count": 3, "max_bad_steps": 2}
    bad = {"s2": "nan", "s8": "gradient", "s9": "inf"}
    folder = job.folder / "too many"
    with spoilt(**bad):
        with dying_after(5), pytest.raises(Killed):
            job.run(folder.name, **flags)
        for _ in range(2):
            with pytest.raises(UserError, match="^optimiser step 9: the loss is not a finite number, from ") as stopped:
                job.run(folder.name, resume=1, **flags)
            message = r"optimiser step (\d): the (\w+) is not a finite number, from \S*rows.jsonl:\d"
            named = re.findall(message, str(stopped.value))
            assert named == [("9", "loss"), ("2", "loss"), ("8", "gradient")]
            assert "one more than --max_bad_steps 2 allows" in str(stopped.value)
            metadata = checkpoints.read_metadata(folder / "resume.pth")
            assert metadata["step"] == 7 and [step for step, *_ in metadata["bad_steps"]] == [2]
    assert capsys.readouterr().out.count("the parameters before the failed step, of step 7, are in") == 1
    job.run(folder.name, resume=1, **flags)
    with spoilt(s2="nan"):
        reference = job.run("one bad", **flags)
    for file in ("resume.pth", "rwkv-2.pth"):
        assert (folder / file).read_bytes() == (reference / file).read_bytes()


def test_a_run_whose_every_step_is_bad_is_told_to_look_at_its_base(job):
    with spoilt(s1="nan", s2="nan"), pytest.raises(UserError, match="No step of this run went well, so look first at"):
        job.run("every", max_bad_steps=1)
    folder = job.folder / "every"
    assert not list(folder.glob("*.pth"))
    assert [line["step"] for line in log_of(folder)] == [1]


def test_a_run_reads_its_log_with_skipped_steps_and_draws_it(job, capsys):
    with spoilt(s1="nan", s3="nan"):
        folder = job.run("log", draws=True, epoch_count=2)
    assert (folder / "loss.png").stat().st_size
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    losses = [line["loss"] for line in log_of(folder)]
    assert "loss not finite" in shown[0] and f"loss {losses[1]:.4f}" in shown[2]
    found, missing = read_log(folder / "train_log.jsonl", 6)
    assert [one["loss"] for one in found] == losses and not missing


def test_the_list_of_skipped_steps_in_a_state_is_checked():
    path = Path("resume.pth")
    assert read_bad_steps({}, path) == []
    steps = [BadStep(3, "loss", "a:1"), BadStep(7, "gradient", "a:2")]
    assert read_bad_steps(json.loads(json.dumps({"bad_steps": steps})), path) == steps
    for wrong in (3, {"3": "loss"}, [3], [[3, "loss"]], [[True, "loss", "a:1"]], [["3", "loss", "a:1"]]):
        with pytest.raises(UserError, match="resume.pth is not the state of a run of this program"):
            read_bad_steps({"bad_steps": wrong}, path)


def test_a_window_without_a_trained_token_stops_the_run(job, monkeypatch):
    original = BatchPlan.batch

    def second_is_masked(self, epoch, step, micro, rank):
        batch = original(self, epoch, step, micro, rank)
        if step == 1:
            batch.labels.fill_(-100)
            batch.window_tokens = 0
        return batch

    monkeypatch.setattr(BatchPlan, "batch", second_is_masked)
    with pytest.raises(UserError, match="optimiser step 2 has no trained token: every label of .*rows.jsonl:"):
        job.run("masked")
    assert (job.folder / "masked" / "rwkv-0-s1.pth").is_file()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_a_full_disk_stops_the_run_and_keeps_earlier_files(job, monkeypatch):
    original = checkpoints.save_tensors

    def full(path, state, metadata=None):
        if "s2" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, state, metadata)

    monkeypatch.setattr(checkpoints.files, "save_tensors", full)
    with pytest.raises(UserError, match="after step 2: .*rwkv-0-s2.pth could not be written: No space left on device"):
        job.run("full-disk", save_steps=1)
    folder = job.folder / "full-disk"
    assert [path.name for path in folder.glob("rwkv-*.pth")] == ["rwkv-0-s1.pth"]
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_a_warmup_longer_than_the_run_is_refused_before_training(job):
    with pytest.raises(UserError, match="--warmup_steps 3: the whole run has 3 optimiser steps"):
        job.run("warmup", warmup_steps=3)
    assert not (job.folder / "warmup" / "train_log.jsonl").exists()


def test_an_adapter_without_a_base_is_refused(job):
    with pytest.raises(UserError, match="--load_model is empty: an adapter needs a base model"):
        job.run("no-base", load_model="", n_layer=2, n_embd=32, vocab_size=256, head_size=16)
