"""What is measured before and after training, within the memory of training."""

import json

import pytest
import torch

from rwkv_bone import load_model
from rwkv_bone.config.flags import parse_train
from rwkv_bone.data import load_dataset
from rwkv_bone.inference.evaluate import heldout_loss
from rwkv_bone.models import RWKV
from rwkv_bone.training.module import TrainingModule


def test_held_out_loss_is_computed_in_the_chunks_of_training(job, monkeypatch):
    """No more tokens run at once than in training, and the result is the same."""
    forward, widths = RWKV.forward, []

    def spy(self, ids, *args, labels=None, **kwargs):
        if labels is not None and not self.training:
            widths.append(ids.shape[1])
        return forward(self, ids, *args, labels=labels, **kwargs)

    monkeypatch.setattr(RWKV, "forward", spy)
    flags = {"eval_data": job.flags["data_file"], "eval_samples": 0, "epoch_steps": 1, "overwrite": 1}
    measured = {}
    for chunk in (0, 8):
        widths.clear()
        folder = job.run(f"chunk{chunk}", chunk_ctx=chunk, **flags)
        measured[chunk] = json.loads((folder / "evaluation.json").read_text())
        assert widths and (max(widths) == 8 if chunk else max(widths) > 8)
    for when in ("before", "after"):
        whole, chunked = (measured[chunk][when]["loss"] for chunk in (0, 8))
        assert chunked == pytest.approx(whole, rel=1e-5)


def test_held_out_loss_is_that_of_the_saved_adapter_and_dropout_is_for_training_alone(job, monkeypatch):
    step, modes = TrainingModule.training_step, []

    def spy(self, batch, index):
        modes.append(self.training and self.model.training)
        return step(self, batch, index)

    monkeypatch.setattr(TrainingModule, "training_step", spy)
    rows = job.flags["data_file"]
    flags = {"peft": "lora", "lora_r": 4, "lora_dropout": 0.5, "eval_data": rows, "eval_samples": 0, "lr_init": 0.05}
    folder = job.run("dropout", **flags)
    measured = json.loads((folder / "evaluation.json").read_text())
    data = parse_train(job.argv(flags)).data
    model = load_model(job.flags["load_model"], adapter=folder / "rwkv-0.pth", dtype=torch.float32, op="torch")
    expected, tokens = heldout_loss(model, load_dataset(data, 256), micro_bsz=4)
    assert measured["after"]["tokens"] == tokens
    assert measured["after"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - measured["before"]["loss"]) > 1e-3
    assert modes == [True] * 3


def test_what_was_measured_before_is_taken_up_only_for_the_same_data(job, tmp_path):
    flags = {"eval_data": job.flags["data_file"], "eval_samples": 1, "epoch_count": 1}
    folder = job.run("same data", **flags)
    before = json.loads((folder / "evaluation.json").read_text())["before"]
    job.run("same data", **(flags | {"resume": 1, "epoch_count": 2}))
    assert json.loads((folder / "evaluation.json").read_text())["before"] == before
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "5 -> ", "response": "5"}) + "\n")
    job.run("same data", **(flags | {"resume": 1, "epoch_count": 3, "eval_data": other}))
    again = json.loads((folder / "evaluation.json").read_text())["before"]
    assert (before["step"], again["step"]) == (0, 6) and again["tokens"] == 2
