"""Training on each device gives what the plainest run on the processor gives: stage 1, PyTorch's operators, fp32.

The runs of a device share a process. Without a GPU the same runs go over the processor's own kernels.
"""

import json

import pytest
import torch

from rwkv_bone import checkpoints, load_model
from rwkv_bone.config import MergeConfig
from rwkv_bone.conversion.merge import merge_files
from tests.training.conftest import Run, adapter_of, largest_difference, log_of

DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
ROUNDING = 2e-5  # of parameters that Adam has moved by about 1e-2 a step
EVAL_SAMPLES = 3

# What a run computes: its reference is run with these flags on the processor.
# fmt: off
PROBLEMS = {
    "bone": {},
    "packed": {"dataload": "pack", "micro_bsz": 1, "ctx_len": 32},
    "nf4": {"quant": "nf4"},
    "bat": {"bone_mode": "bat"},
    "lora": {"peft": "lora", "lora_r": 4},
    "pissa": {"peft": "pissa", "lora_r": 4},
    "initial state": {"peft": "state"},
    "every weight": {"peft": "none", "lr_init": 1e-3},
}
# How: none of these changes what is computed. name: (problem, flags)
VARIANTS = {
    "stage 1": ("bone", {}),
    "stage 2": ("bone", {"strategy": "deepspeed_stage_2"}),
    "stage 3": ("bone", {"strategy": "deepspeed_stage_3"}),
    "stage 2 with offload": ("bone", {"strategy": "deepspeed_stage_2_offload"}),
    "stage 3 with offload": ("bone", {"strategy": "deepspeed_stage_3_offload"}),
    "accumulation": ("bone", {"micro_bsz": 1, "accumulate_grad_batches": 4}),
    "recomputed blocks at stage 3": ("bone", {"strategy": "deepspeed_stage_3", "grad_cp": 1}),
    "chunks": ("bone", {"chunk_ctx": 8}),
    "packed": ("packed", {}),
    "packed, in chunks, at stage 3": ("packed", {"chunk_ctx": 8, "strategy": "deepspeed_stage_3"}),
    "nf4": ("nf4", {}),
    "nf4 at stage 3": ("nf4", {"strategy": "deepspeed_stage_3", "grad_cp": 1}),
    "bat": ("bat", {}),
    "lora": ("lora", {}),
    "pissa": ("pissa", {}),
    "initial state": ("initial state", {}),
    "every weight at stage 2": ("every weight", {"strategy": "deepspeed_stage_2"}),
}
# Killed after step 5 of 6 or more, each of which is saved: the last saved one is 4.
INTERRUPTED = {
    "bf16, bat, packed": {
        "precision": "bf16", "bone_mode": "bat", "dataload": "pack", "micro_bsz": 1, "ctx_len": 32, "train_parts": "ln",
    },
    "dropout at stage 3 with offload": {
        "strategy": "deepspeed_stage_3_offload", "peft": "lora", "lora_r": 4, "lora_dropout": 0.5,
    },
}
# fmt: on
TWO_EPOCHS = {"epoch_count": 2, "save_steps": 1}


@pytest.fixture(scope="module")
def base(job):
    """The job's base in fp32, so that what a merge writes is exact."""
    path = job.folder / "base-of-devices.pth"
    state = checkpoints.read_state(job.flags["load_model"])
    checkpoints.write_state(path, {key: tensor.float() for key, tensor in state.items()})
    return path


@pytest.fixture(scope="module")
def flags(job, base):
    return {"load_model": base, "eval_data": job.flags["data_file"], "eval_samples": EVAL_SAMPLES}


@pytest.fixture(scope="module")
def expected(job, flags):
    """Factory: the folder of a problem's reference run."""
    folders = {}

    def run(problem: str):
        if problem not in folders:
            folders[problem] = job.run(f"expected {problem}", **(flags | PROBLEMS[problem]))
        return folders[problem]

    return run


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


def runs_of(name: str, device: str, flags: dict) -> list[Run]:
    """What must be run for the tests of one name; the first makes its folder."""
    if name in VARIANTS:
        problem, how = VARIANTS[name]
        return [Run(name, flags | PROBLEMS[problem] | how, f"{device} {name}")]
    how = flags | TWO_EPOCHS | INTERRUPTED[name]
    return [
        Run(f"{name}, whole", how, f"{device} {name}, whole"),
        Run(f"{name}, killed", how, f"{device} {name}", dies_after=5),
        Run(f"{name}, continued", how | {"resume": 1}, f"{device} {name}"),
    ]


@pytest.fixture(scope="module")
def runs(request, job, flags, device):
    """Factory: the folder of a run on the device, which must have ended well. Only what is asked for is run."""
    here = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    named = [item.callspec.params for item in here if item.callspec.params.get("device") == device]
    names = dict.fromkeys(params["name"] for params in named if "name" in params)
    wanted = {run.name: run for name in names for run in runs_of(name, device, flags)}
    outcome = job.batch(device, list(wanted.values()))

    def folder(name: str):
        assert outcome[name] is None, outcome[name]
        return job.folder / wanted[name].folder

    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_training_gives_the_adapter_of_the_plainest_run(runs, expected, name):
    ours, theirs = runs(name), expected(VARIANTS[name][0])
    for key in ("loss", "grad_norm"):
        found, wanted = ([line[key] for line in log_of(folder)] for folder in (ours, theirs))
        assert found == pytest.approx(wanted, rel=2e-5)
    tensors = adapter_of(ours)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert largest_difference(tensors, adapter_of(theirs)) < ROUNDING


@pytest.mark.parametrize("name", ["stage 1", "stage 3 with offload", "nf4"])
def test_what_is_measured_before_and_after_is_the_same(runs, expected, name):
    ours, theirs = (
        json.loads((folder / "evaluation.json").read_text()) for folder in (runs(name), expected(VARIANTS[name][0]))
    )
    for when in ("before", "after"):
        assert ours[when]["loss"] == pytest.approx(theirs[when]["loss"], rel=2e-5)
        assert len(ours[when]["answers"]) == EVAL_SAMPLES
        assert ours[when]["answers"] == theirs[when]["answers"]
    assert ours["after"]["loss"] < ours["before"]["loss"]


@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_killed_run_ends_as_if_it_had_not_been_to_the_bit(runs, name):
    whole, killed = runs(f"{name}, whole"), runs(f"{name}, killed")
    assert runs(f"{name}, continued") == killed
    losses, expected = ([line["loss"] for line in log_of(folder)] for folder in (killed, whole))
    assert len(losses) > 5 and losses == expected
    assert largest_difference(adapter_of(killed, "rwkv-1.pth"), adapter_of(whole, "rwkv-1.pth")) == 0
    ours, theirs = (checkpoints.read_state(folder / "resume.pth") for folder in (killed, whole))
    assert largest_difference(ours, theirs) == 0


@pytest.mark.parametrize("name", ["stage 3", "bat", "lora", "nf4"])
def test_the_merged_model_answers_as_base_and_adapter_do(runs, base, device, name, tmp_path):
    merged, adapter = tmp_path / "merged.pth", runs(name) / "rwkv-0.pth"
    merge_files(MergeConfig(str(base), str(adapter), str(merged)))
    ids = torch.tensor([list(b"41 -> 14 and more of it")], device=device)
    with torch.no_grad():
        found = load_model(merged, device=device)(ids)
        live = load_model(base, adapter=adapter, device=device)(ids)
        before = load_model(base, device=device)(ids)
    torch.testing.assert_close(found, live, rtol=0, atol=1e-4 * float(live.abs().max()))
    assert (live - before).norm() > 1e-2 * live.norm()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_gpus_train_the_adapter_of_one_processor(job, flags, expected, stage):
    how = flags | {"accelerator": "gpu", "op": "auto", "devices": 2, "micro_bsz": 2}
    folder, done = job.start(f"two gpus {stage}", strategy=f"deepspeed_stage_{stage}", **how)
    assert done.returncode == 0, done.stderr
    assert largest_difference(adapter_of(folder), adapter_of(expected("bone"))) < ROUNDING
