"""A training step waits for the device once, for its numbers; what DeepSpeed adds is counted apart."""

import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv_bone.config import ModelConfig
from rwkv_bone.data import Batch
from rwkv_bone.models import NOTHING
from rwkv_bone.ops import cross_entropy
from rwkv_bone.training.module import Fetched, TrainingModule
from rwkv_bone.training.signals import StopOnSignal
from tests.conftest import clean_environment, python_path
from tests.training import host_syncs

OURS = {("rwkv_bone", "module.py", "tolist"): 1}
# On one device stages 1 and 2 wait for nothing else (training/zero.py). What DeepSpeed 0.19.8 does in its fp32 mode
# with clipping: at stages 1 and 2 on several devices it asks whether the norm is finite, once for the step and once for
# each parameter group that it clips (utils.py:233), and puts a constant on the device for each group (utils.py:887). At
# stage 3 it asks once, and puts a constant there for each group (stage3.py:2483).
# Not seen on a CPU: at stage 3 it waits for the reduction at the end of each backward pass (stage3.py:1414), and on
# several GPUs at stages 1 and 2, with overlap_comm, at each bucket (stage_1_and_2.py:2413). With the optimiser's state
# offloaded, stages 1 and 2 ask two questions for each trained tensor (stage_1_and_2.py:1792 and 1929).
STAGE_1 = {("deepspeed", "utils.py", "_local_scalar_dense"): 2, ("deepspeed", "utils.py", "upload"): 1}
STAGE_3 = {("deepspeed", "utils.py", "_local_scalar_dense"): 1, ("deepspeed", "stage3.py", "upload"): 1}
SETTLED = 2  # steps in which DeepSpeed's stage 3 still learns in which order parameters are used

RUNS = [
    ({"dataload": "pad", "micro_bsz": 2}, {}),
    ({"dataload": "pack", "ctx_len": 32}, {}),
    ({"dataload": "pack", "ctx_len": 32, "chunk_ctx": 8, "strategy": "deepspeed_stage_2"}, {}),
    ({"dataload": "pad", "micro_bsz": 2, "chunk_ctx": 4, "grad_clip": 0}, {}),
    ({"dataload": "pack", "ctx_len": 32, "strategy": "deepspeed_stage_3", "grad_cp": 1}, STAGE_3),
    ({"dataload": "pack", "ctx_len": 32, "targets": "head"}, {}),
    ({"dataload": "get", "loss_mask": "none", "ctx_len": 16, "peft": "lora", "lora_dropout": 0.1}, {}),
]


def run_counted(job, name, **flags) -> list[Counter]:
    with host_syncs.each_step() as steps:
        job.run(name, **({"micro_bsz": 1} | flags))
    return steps


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_a_step_waits_for_the_device_once_and_where_deepspeed_does(job, number):
    flags, deepspeeds = RUNS[number]
    steps = run_counted(job, f"syncs-{number}", **flags)
    assert len(steps) >= 3
    for step in steps[SETTLED:]:
        assert step == OURS | deepspeeds


def test_of_the_forward_passes_of_a_step_only_the_last_waits(job):
    steps = run_counted(job, "syncs-accumulated", dataload="pack", ctx_len=32, accumulate_grad_batches=2)
    assert steps[2:4] == [{}, OURS]


@pytest.mark.slow
def test_two_processes_wait_no_more_often_than_one(job, tmp_path):
    flags = {"devices": 2, "dataload": "pack", "micro_bsz": 1, "ctx_len": 32, "epoch_count": 2, "epoch_save": 9}
    environment = clean_environment()
    environment["PYTHONPATH"] = python_path()
    argv = job.argv({**flags, "proj_dir": job.folder / "syncs-two"})
    command = [sys.executable, host_syncs.__file__, tmp_path / "out", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out").read_text())
    steps = [Counter({tuple(key): count for *key, count in step}) for step in found]
    assert len(steps) >= 4
    for step in steps[SETTLED:]:
        assert step == OURS | STAGE_1


def test_what_waits_is_counted():
    """The counter itself: each of these waits for a GPU."""
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    waits = {
        "_local_scalar_dense": [lambda: x[0].item(), lambda: float(x[0]), lambda: bool(mask[0]), lambda: int(x[1]) + 0],
        "tolist": [lambda: x.tolist()],
        "cpu": [lambda: x.cpu()],
        "nonzero": [lambda: mask.nonzero(), lambda: cross_entropy.labelled(x.long())],
        "masked_select": [lambda: x.masked_select(mask)],
        "index": [lambda: x[mask]],
        "upload": [lambda: torch.tensor([1, 2], device=x.device)],
    }
    for what, calls in waits.items():
        for call in calls:
            with host_syncs.HostSyncs() as syncs:
                call()
            assert sorted(kind for *_, kind in syncs.found.elements()) == [what]
    with host_syncs.HostSyncs() as syncs:
        (x + 1).to("cpu", non_blocking=True)[torch.arange(2)].sum()
    assert not syncs.found


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize("pack", [False, True])
def test_a_step_reads_no_value_of_what_is_on_the_device(chunk, pack):
    """A batch on the "meta" device has none: where chunks are cut must come from its twin in the CPU's memory."""
    ids = torch.arange(24).view(1, 24) if pack else torch.arange(24).view(2, 12)
    bounds = torch.tensor([0, 5, 24]) if pack else None
    batch = Batch(ids, ids, torch.arange(24), [], 24, 24, ids.shape[1], bounds)
    seen = []

    def model(part, *, labels, label_rows, cu_seqlens, **_):
        seen.append((part.shape[1], label_rows.is_meta, cu_seqlens is not None and cu_seqlens.is_meta))
        loss = part.new_zeros((), dtype=torch.float32)
        return (loss, []) if chunk else loss

    running = ModelConfig("base.pth", chunk_ctx=chunk)
    module = SimpleNamespace(model=model, running=running, recompute=NOTHING)
    TrainingModule._run(module, batch.to("meta"), l2wrap=0.0, loss_scale=1 / 24)
    lengths = [part.shape[1] for part in (ids.split(chunk, 1) if chunk else [ids])]
    assert seen == [(length, True, pack) for length in lengths]


PAIRS = Path(__file__).resolve().parents[2] / "assets" / "preferences_heldout.jsonl"
ANSWERS = {"data_file": PAIRS, "sft_split": "[:12]", "ctx_len": 64}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    [{}, {"chunk_ctx": 8}, {"targets": "head"}, {"task": "dpo"} | ANSWERS, {"task": "kto"} | ANSWERS],
    ids=["plain", "chunks", "head", "dpo", "kto"],
)
def test_on_a_gpu_no_line_of_ours_waits_for_it(job, monkeypatch, flags):
    """PyTorch itself warns of each operation that waits; the one fetch of a step does not count as such."""
    original = StopOnSignal.on_train_batch_start

    def start(self, trainer, module, batch, index):
        # The last step saves, the first ones build things.
        watched = SETTLED <= index < module.total_steps - 1
        torch.cuda.set_sync_debug_mode("warn" if watched else "default")
        original(self, trainer, module, batch, index)

    monkeypatch.setattr(StopOnSignal, "on_train_batch_start", start)
    flags = {"accelerator": "gpu", "dataload": "pack", "micro_bsz": 1, "ctx_len": 32} | flags
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            job.run(f"gpu-{flags.get('task', '')}-" + "-".join(flags), **flags)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ours = [f"{warning.filename}:{warning.lineno}" for warning in caught if "rwkv_bone" in warning.filename]
    assert not ours


@pytest.mark.gpu
def test_on_a_gpu_numbers_are_read_while_later_work_still_runs():
    fetched = Fetched(torch.arange(6.0, device="cuda").view(2, 3))
    torch.cuda._sleep(10**10)
    done = torch.cuda.current_stream().record_event()
    assert fetched.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert not done.query()
