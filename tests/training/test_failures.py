"""A run that cannot go on stops with a sentence, on every rank, and keeps what was good."""

import errno
import threading

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.data import BatchPlan
from rwkv_bone.errors import UserError
from rwkv_bone.training import module as module_file
from tests.training.conftest import ROWS, adapter_of, largest_difference, log_of


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
        job.run("nan", load_model=nan_base, micro_bsz=1, epoch_count=2, random_seed=1)
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


def test_two_processes_stop_together_and_tell_it_once(job, nan_base):
    folder, done = job.start("nan-2", load_model=nan_base, devices=2, strategy="deepspeed_stage_3", micro_bsz=6)
    assert done.returncode == 2
    assert done.stderr.startswith("error: optimiser step 1: the loss is not a finite number, from ")
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert not list(folder.glob("rwkv-*.pth"))


@pytest.mark.parametrize("grad_clip", [1.0, 0.0])
@pytest.mark.parametrize("strategy", ["1", "2", "3", "2_offload", "3_offload"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_bad_loss_with_a_good_gradient_takes_no_step(job, monkeypatch, strategy, value, grad_clip):
    """DeepSpeed decides by the gradient alone, before we look at the loss: so a bad loss must spoil the gradient."""
    name, flags = f"{strategy}-{grad_clip}", {"strategy": f"deepspeed_stage_{strategy}", "grad_clip": grad_clip}
    original = module_file.TrainingModule._loss

    def third_step_breaks(self, batch, scale):
        loss = original(self, batch, scale)
        return loss + float(value) if self._step == 2 else loss

    monkeypatch.setattr(module_file.TrainingModule, "_loss", third_step_breaks)
    with pytest.raises(UserError, match="optimiser step 3: the loss is not a finite number, from .*rows.jsonl:"):
        job.run(f"bad-{name}-{value}", **flags)
    monkeypatch.undo()
    folder = job.folder / f"bad-{name}-{value}"
    assert len(log_of(folder)) == 2
    reference = job.folder / f"good-{name}"
    if not reference.exists():
        job.run(reference.name, save_steps=2, **flags)
    ours, expected = (adapter_of(one, "rwkv-0-s2.pth") for one in (folder, reference))
    assert largest_difference(ours, expected) == 0


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


def test_an_infinite_gradient_under_a_finite_loss_takes_no_step(job, monkeypatch):
    original = module_file.TrainingModule.training_step

    def third_step_breaks(self, batch, index):
        loss = original(self, batch, index)
        return InfiniteGradient.apply(loss) if index == 2 else loss

    monkeypatch.setattr(module_file.TrainingModule, "training_step", third_step_breaks)
    with pytest.raises(UserError, match="optimiser step 3: the gradient is not a finite number, from .*rows.jsonl:"):
        job.run("gradient", grad_clip=0)
    monkeypatch.undo()
    saved = adapter_of(job.folder / "gradient", "rwkv-0-s2.pth")
    job.run("gradient-reference", grad_clip=0, save_steps=2)
    assert largest_difference(saved, adapter_of(job.folder / "gradient-reference", "rwkv-0-s2.pth")) == 0


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
