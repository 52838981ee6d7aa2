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
    monkeypatch.setattr(module, "CHECKED_TOKENS", 20)
    monkeypatch.setattr(timing, "MATRIX", {"cpu": 64, "cuda": 1024})
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 2**16, "cuda": 2**24})

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["step.py", *TINY, *words])
        return module.main()

    module.run = run
    return module


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("words", ["", "--documents 5 --kind lora", "--grad_cp 0 --kind bat --precision fp32"])
def test_a_row_holds_what_was_measured(step, tmp_path, device, words):
    rows = tmp_path / "rows.jsonl"
    assert step.run("--device", device, "--json", str(rows), *words.split()) == 0
    (row,) = map(json.loads, rows.read_text().splitlines())
    numbers = ("seconds", "matmul_tflops", "copy_gb_per_s", "share_of_matmul", "share_of_copy", "kept_mb")
    assert all(row[name] > 0 for name in numbers)
    assert row["share_of_matmul"] < row["share_of_adapted_matmul"] and row["peak_mb"] > row["kept_mb"]
    assert row["tokens_per_s"] == pytest.approx(64 / row["seconds"])
    assert abs(row["loss"][0] - math.log(256)) < 1 and row["loss"][1] < row["loss"][0]
    assert row["spread"][0] <= row["seconds"] <= row["spread"][1]
    assert (row["processor_seconds"] is None) == (device == "cuda")
    of_cuda = ("peak_allocated_mb", "peak_reserved_mb", "kernel_launches", "host_syncs")
    assert all((row[name] is None) == (device == "cpu") for name in of_cuda)
    if device == "cuda":
        assert row["peak_reserved_mb"] >= row["peak_allocated_mb"] > row["kept_mb"] and row["kernel_launches"] > 50


@pytest.mark.parametrize("kind", ["bone", "bat", "lora"])
def test_the_operations_of_a_step_are_those_that_torch_counts(step, kind):
    args = step.completed(step.parser().parse_args([*TINY, "--kind", kind, "--grad_cp", "0"]))
    timed = step.Step(args, "cpu", torch.device("cpu"))
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **others: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        timed()
    # More where backward makes a low-rank product again.
    assert 1 <= counted.get_total_flops() / sum(timed.operations()) < 1.08
    with FlopCounterMode(display=False) as counted:
        timed.products()()
    assert counted.get_total_flops() == timed.operations()[0]


def test_recomputing_blocks_keeps_less_for_backward(step):
    device = torch.device("cpu")
    model = step.random_model(step.SIZES["tiny"], "cpu", step.AdapterSettings("bone", 8), device)
    ids, labels, _ = step.random_batch(256, 2, 64, 0, device)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    whole = step.kept_bytes(lambda: model(ids, labels=labels), weights)
    less = step.kept_bytes(lambda: model(ids, labels=labels, recompute=EVERY_BLOCK), weights)
    # At least each block's input in bf16; of two layers much more without recomputing.
    assert 2 * 2 * 64 * 64 * 2 <= less < whole / 4


@pytest.mark.parametrize("wrong", ["a weight is not a number", "a layer gets no gradient", "a layer is wrong"])
def test_a_wrong_step_shows_no_speed(step, monkeypatch, tmp_path, capsys, wrong):
    make, made = step.random_model, []

    def broken(*args):
        made.append(model := make(*args))
        if wrong == "a layer is wrong":
            model.blocks[1].att.register_forward_hook(lambda _, inputs, outputs: (2 * outputs[0], *outputs[1:]))
        elif len(made) == 1:  # what is compared with float64 before
            return model
        elif wrong == "a weight is not a number":
            model.ln_out.weight.data[0] = float("nan")
        else:
            model.blocks[1].ffn.value.weight.data.zero_()  # what is before it in the channel mix cannot learn
            model.blocks[1].ffn.value.bone.requires_grad_(False)
        return model

    monkeypatch.setattr(step, "random_model", broken)
    assert step.run("--device", "cpu", "--json", str(tmp_path / "rows.jsonl")) == 1
    said = capsys.readouterr()
    assert said.out == "" and not (tmp_path / "rows.jsonl").exists()
    words = {
        "a weight is not a number": "the loss is not finite",
        "a layer gets no gradient": "no gradient, or one that is not finite: blocks.1.ffn.key",
        "a layer is wrong": "gradients of a smaller model:",
    }
    assert words[wrong] in said.err
