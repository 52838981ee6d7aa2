"""One gradient, however a window of samples is cut: accumulation, processes and ZeRO stages give one adapter.

Two real processes, on the CPU, started by Lightning from `python train.py`.
"""

import json
import shlex
import subprocess

import pytest
import torch

from tests.training.conftest import adapter_of, largest_difference, log_of

STEPS = 3
ROUNDING = 2e-5  # of parameters that Adam has moved by about 1e-2 a step


@pytest.fixture(scope="module")
def whole(job):
    """The reference: one process, each window in one forward pass."""
    return job.run("whole")


def assert_same_run(folder, reference, adapter_file="rwkv-0.pth"):
    ours, theirs = log_of(folder), log_of(reference)
    assert len(ours) == len(theirs) == STEPS
    for key in ("step", "epoch", "lr", "tokens", "trained_tokens"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-5)
    adapter = adapter_of(folder, adapter_file)
    assert all(tensor.dtype == torch.float32 and tensor.abs().max() > 0 for tensor in adapter.values())
    assert largest_difference(adapter, adapter_of(reference, adapter_file)) < ROUNDING


@pytest.mark.parametrize("micro_bsz, accumulate", [(2, 2), (1, 4)])
def test_accumulation_gives_the_gradient_of_the_whole_window(job, whole, micro_bsz, accumulate):
    folder = job.run(f"accumulate-{accumulate}", micro_bsz=micro_bsz, accumulate_grad_batches=accumulate)
    assert_same_run(folder, whole)


@pytest.fixture(scope="module")
def stages(job):
    """{stage: (proj_dir, finished process)} of runs on two processes.

    Stage 3 with recomputation, which is where frozen parameters broke checkpointing for others, and with accumulation.
    """
    variants = {
        1: {"micro_bsz": 2},
        2: {"micro_bsz": 2},
        3: {"micro_bsz": 1, "accumulate_grad_batches": 2, "grad_cp": 1, "eval_samples": 2},
    }
    measured = {"eval_data": job.flags["data_file"], "eval_samples": 0}
    return {
        stage: job.start(f"stage-{stage}", devices=2, strategy=f"deepspeed_stage_{stage}", **(measured | variant))
        for stage, variant in variants.items()
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_save_the_adapter_of_one(whole, stages, stage):
    folder, done = stages[stage]
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, whole)


def test_the_command_printed_last_merges_the_adapter(stages):
    folder, done = stages[1]
    (command,) = [line.removeprefix("next ") for line in done.stdout.splitlines() if line.startswith("next ")]
    merged = subprocess.run(shlex.split(command), capture_output=True, text=True)
    assert merged.returncode == 0, merged.stderr
    assert (folder / "merged.pth").is_file()


def test_held_out_numbers_are_the_same_at_every_stage(stages):
    reports = [json.loads((stages[stage][0] / "evaluation.json").read_text()) for stage in (1, 2, 3)]
    for when in ("before", "after"):
        assert [r[when]["loss"] for r in reports] == pytest.approx([reports[0][when]["loss"]] * 3, rel=1e-5)
    assert len(reports[2]["after"]["answers"]) == 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_print_once_and_without_noise(stages, stage):
    done = stages[stage][1]
    assert done.stderr == ""
    starts = [line.split()[0] for line in done.stdout.splitlines() if line and not line.startswith(" ")]
    once = ["after", "chat", "device", "kernel", "memory", "model", "next", "results", "steps"]
    once += ["heldout", "loss,", "tokens", "took"]  # the table at the end
    always = {*once, "adapter", "data", "saving", "before", "step", "measured", "held-out"}
    # Whether samples are answered and the general text is measured depends on the time that they take.
    assert always <= set(starts) <= always | {"sample", "general", "forgotten"}
    assert sorted(start for start in starts if start in once) == sorted(once)


@pytest.mark.slow
def test_two_processes_at_stage_3_train_on_a_quantised_base_as_one_does(job):
    reference = job.run("quantised-whole", quant="nf4")
    folder, done = job.ranks("quantised-3", quant="nf4", devices=2, micro_bsz=2, strategy="deepspeed_stage_3")
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, reference)


@pytest.mark.slow
def test_an_adapted_head_trains_at_stage_3_on_ranks_of_unequal_numbers_of_trained_tokens(job, tmp_path):
    """The head goes through its rows in chunks, here two of one rank's and one of the other's in each step."""
    rows = [{"prompt": f"{n} -> ", "response": "abcde" * (300 if n == 0 else 2)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"data_file": tmp_path / "rows.jsonl", "targets": "head", "ctx_len": 2048, "epoch_count": STEPS}
    reference = job.run("head-whole", **flags)
    folder, done = job.ranks("head-3", devices=2, micro_bsz=2, strategy="deepspeed_stage_3", **flags)
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, reference, "rwkv-2.pth")
