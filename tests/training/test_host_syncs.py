"""A training step waits for the device once, for its numbers; what DeepSpeed adds is counted apart."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from rwkv_bone.ops import cross_entropy
from tests.conftest import REPOSITORY
from tests.training import host_syncs
from tests.training.conftest import RENDEZVOUS

OURS = {("rwkv_bone", "module.py", "tolist"): 1}
# In its fp32 mode with clipping, by DeepSpeed 0.19.8. Stages 1 and 2: whether the norm is finite, once for the step and
# once for each parameter group that it clips (utils.py, is_invalid_grad_norm), and a constant that it puts on the device
# for each group (utils.py, mask_nan_or_inf_with_val_inplace). Stage 3: the same but once for the step.
STAGE_1 = {("deepspeed", "utils.py", "_local_scalar_dense"): 2, ("deepspeed", "utils.py", "upload"): 1}
STAGE_3 = {("deepspeed", "utils.py", "_local_scalar_dense"): 1, ("deepspeed", "stage3.py", "upload"): 1}
SETTLED = 2  # steps in which DeepSpeed's stage 3 still learns in which order parameters are used
WITHOUT_CLIPPING = STAGE_1 | {("deepspeed", "utils.py", "_local_scalar_dense"): 1}

RUNS = [
    ({"dataload": "pad", "micro_bsz": 2}, STAGE_1),
    ({"dataload": "pack", "ctx_len": 32}, STAGE_1),
    ({"dataload": "pack", "ctx_len": 32, "chunk_ctx": 8, "strategy": "deepspeed_stage_2"}, STAGE_1),
    ({"dataload": "pad", "micro_bsz": 2, "chunk_ctx": 4, "grad_clip": 0}, WITHOUT_CLIPPING),
    ({"dataload": "pack", "ctx_len": 32, "strategy": "deepspeed_stage_3", "grad_cp": 1}, STAGE_3),
    ({"dataload": "pack", "ctx_len": 32, "targets": "head"}, STAGE_1),
    ({"dataload": "get", "loss_mask": "none", "micro_bsz": 2, "ctx_len": 16, "peft": "lora", "lora_dropout": 0.1, "lora_r": 4}, STAGE_1),
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
    assert steps[2:4] == [{}, OURS | STAGE_1]


def test_two_processes_wait_no_more_often_than_one(job, tmp_path):
    flags = {"devices": 2, "dataload": "pack", "micro_bsz": 1, "ctx_len": 32, "epoch_count": 2, "epoch_save": 9}
    environment = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "src")))
    argv = job.argv({**flags, "proj_dir": job.folder / "syncs-two"})
    command = [sys.executable, host_syncs.__file__, tmp_path / "out", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = [Counter({tuple(key): count for *key, count in step}) for step in json.loads((tmp_path / "out").read_text())]
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
