"""benchmarks/step.py: the step it times is a training step, its counts are right, and a wrong step shows no speed."""

import importlib.util
import json
import math
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timing
from rwkv_bone.models import EVERY_BLOCK
from tests.conftest import REPOSITORY

TINY = ["--size", "tiny", "--bsz", "2", "--ctx", "32", "--r", "8", "--steps", "2"]


@pytest.fixture
def step(monkeypatch):
    """The program as a module; `step.run(*words)` is its exit status."""
    spec = importlib.util.spec_from_file_location("step_benchmark", REPOSITORY / "benchmarks" / "step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(timing, "MATRIX", {"cpu": 64, "cuda": 1024})
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 2**16, "cuda": 2**24})

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["step.py", *TINY, *words])
        return module.main()

    module.run = run
    return module


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("words", [[], ["--documents", "5", "--kind", "lora"], ["--grad_cp", "0", "--kind", "bat"]])
def test_a_row_holds_what_was_measured(step, tmp_path, device, words):
    rows = tmp_path / "rows.jsonl"
    assert step.run("--device", device, "--json", str(rows), *words) == 0
    (row,) = map(json.loads, rows.read_text().splitlines())
    numbers = ("seconds", "matmul_tflops", "copy_gb_per_s", "share_of_matmul", "share_of_copy", "kept_mb")
    assert all(row[name] > 0 for name in numbers)
    assert row["tokens_per_s"] == pytest.approx(64 / row["seconds"])
    assert abs(row["loss"][0] - math.log(256)) < 1 and row["loss"][1] < row["loss"][0]
    assert row["spread"][0] <= row["seconds"] <= row["spread"][1]
    of_cuda = ("peak_allocated_mb", "peak_reserved_mb", "kernel_launches", "host_syncs")
    assert all((row[name] is None) == (device == "cpu") for name in of_cuda)
    if device == "cuda":
        assert row["peak_reserved_mb"] >= row["peak_allocated_mb"] > row["kept_mb"] and row["kernel_launches"] > 50


def test_the_operations_of_a_step_are_those_that_torch_counts(step):
    device = torch.device("cpu")
    model = step.random_model("tiny", "cpu", step.AdapterSettings("lora", 1), device)
    ids, labels, _ = step.random_batch(256, 1, 64, 0, device)
    model.emb.weight.requires_grad_(True)  # otherwise nothing flows back through the first layer's projections
    with FlopCounterMode(display=False) as counted:
        model(ids, labels=labels).backward()
    frozen = [p for p in model.parameters() if not p.requires_grad and p.dim() == 2]
    # More, by the adapter of rank 1 and by operators that are no products.
    assert 1 <= counted.get_total_flops() / (4 * sum(p.numel() for p in frozen) * 64) < 1.15


def test_recomputing_blocks_keeps_less_for_backward(step):
    device = torch.device("cpu")
    model = step.random_model("tiny", "cpu", step.AdapterSettings("bone", 8), device)
    ids, labels, _ = step.random_batch(256, 2, 64, 0, device)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    whole = step.kept_bytes(lambda: model(ids, labels=labels), weights)
    less = step.kept_bytes(lambda: model(ids, labels=labels, recompute=EVERY_BLOCK), weights)
    # At least each block's input in bf16; of two layers much more without recomputing.
    assert 2 * 2 * 64 * 64 * 2 <= less < whole / 4


@pytest.mark.parametrize("wrong", ["a weight is not a number", "a layer gets no gradient"])
def test_a_wrong_step_shows_no_speed(step, monkeypatch, tmp_path, capsys, wrong):
    make = step.random_model

    def broken(*args):
        model = make(*args)
        if wrong == "a weight is not a number":
            model.ln_out.weight.data[0] = float("nan")
        else:
            model.blocks[1].ffn.value.weight.data.zero_()  # what is before it in the channel mix cannot learn
            model.blocks[1].ffn.value.bone.requires_grad_(False)
        return model

    monkeypatch.setattr(step, "random_model", broken)
    assert step.run("--device", "cpu", "--json", str(tmp_path / "rows.jsonl")) == 1
    said = capsys.readouterr()
    assert said.out == "" and not (tmp_path / "rows.jsonl").exists()
    gradient = "no gradient, or one that is not finite: blocks.1.ffn.key"
    assert ("the loss is not finite" if "number" in wrong else gradient) in said.err
