"""What each process holds of the base, and when: at ZeRO stage 3 its share, and at no moment the whole."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from rwkv_bone import allocator, checkpoints
from rwkv_bone.adapters import ADAPTERS, AdapterSettings, inject
from rwkv_bone.models import build, load_base_into
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.place import place
from rwkv_bone.training.strategy import KeepDtypes
from tests.conftest import clean_environment, python_path, random_model
from tests.training.conftest import adapter_of, largest_difference, log_of

MEASURE = """
import json, sys, threading, time
from pathlib import Path

import deepspeed
import torch

from rwkv_bone.config.flags import parse_train
from rwkv_bone.training import fit, module

def private():
    # Without the pages of the mapped file: processes share these, and the system drops them when it needs memory.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

def watch():
    global largest
    while loading:
        largest = max(largest, private())
        time.sleep(0.002)

def begins(self):
    global loading
    loading = False
    thread.join()
    held = private()
    found = {"held": held - before, "largest": max(largest, held) - before}
    if torch.cuda.is_available():
        found["largest_on_device"] = torch.cuda.max_memory_allocated()
    Path(f"rank-{self.global_rank}.json").write_text(json.dumps(found))

torch.set_num_threads(1)
module.TrainingModule.on_train_start = begins
largest = before = private()
loading = True
thread = threading.Thread(target=watch, daemon=True)
thread.start()
fit.fit(parse_train(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """(path, bytes of the model in fp32, bytes of its largest tensor): three wide layers in bf16, random."""
    path = tmp_path_factory.mktemp("wide") / "base.pth"
    low_rank = {"w": 96, "a": 96, "v": 64, "g": 256}
    arch = replace(random_model().arch, n_embd=2048, n_head=32, head_size=64, dim_ffn=4096, n_layer=3, vocab_size=256)
    with torch.device("meta"):
        shapes = {key: t.shape for key, t in build(replace(arch, low_rank=low_rank), op="torch").state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.rand(shape, generator=generator).sub_(0.5).mul_(0.05) for key, shape in shapes.items()}
    sizes = [tensor.nbytes for tensor in state.values()]
    checkpoints.write_state(path, {key: tensor.bfloat16() for key, tensor in state.items()})
    return path, sum(sizes), max(sizes)


@pytest.fixture(scope="module")
def measured(job, wide, tmp_path_factory):
    """measured(strategy): two processes take one step in fp32. ([{held, largest: bytes} of each], proj_dir)"""
    runs = {}

    def run(strategy, **flags):
        if strategy in runs:
            return runs[strategy]
        folder = tmp_path_factory.mktemp(strategy)
        (folder / "measure.py").write_text(MEASURE)
        flags = {"load_model": wide[0], "strategy": strategy, "devices": 2, "epoch_steps": 1, "micro_bsz": 2} | flags
        command = [sys.executable, folder / "measure.py", *job.argv(flags | {"proj_dir": folder / "out"})]
        environment = clean_environment()
        # With this setting glibc returns freed memory to the system; otherwise it would keep pieces of this size.
        environment |= {"PYTHONPATH": python_path(), "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(flags["devices"])]
        runs[strategy] = found, folder / "out"
        return runs[strategy]

    return run


LIBRARIES = 90e6  # what a run needs beside its model, before its first step


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_at_stage_1_every_process_holds_the_base(measured, wide):
    _, whole, _ = wide
    for process in measured("deepspeed_stage_1")[0]:
        assert whole < process["held"] < whole + LIBRARIES


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("strategy", ["deepspeed_stage_3", "deepspeed_stage_3_offload"])
def test_at_stage_3_a_process_holds_its_share_and_at_no_moment_the_base(measured, wide, strategy):
    _, whole, largest_tensor = wide
    processes, folder = measured(strategy)
    for process in processes:
        assert whole / 2 < process["held"] < whole / 2 + LIBRARIES
        assert process["largest"] < whole / 2 + LIBRARIES + 2 * largest_tensor < 0.9 * whole
    reference = measured("deepspeed_stage_1")[1]
    assert log_of(folder)[0]["loss"] == pytest.approx(log_of(reference)[0]["loss"], rel=1e-5)


@pytest.mark.gpu
def test_with_offload_the_base_never_comes_to_the_device_whole(measured, wide):
    _, in_fp32, largest = wide
    flags = {"accelerator": "gpu", "devices": 1, "precision": "bf16", "micro_bsz": 4}
    (process,), _ = measured("deepspeed_stage_3_offload", **flags)
    assert process["largest_on_device"] < 0.4 * in_fp32 / 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_of_two_devices_neither_ever_holds_the_base(measured, wide):
    _, in_fp32, _ = wide
    for process in measured("deepspeed_stage_3", accelerator="gpu", precision="bf16")[0]:
        assert process["largest_on_device"] < 0.8 * in_fp32 / 2


@pytest.mark.parametrize("train", [{}, {"train_parts": "[emb, ln]", "peft": "pissa", "lora_r": 4}, {"peft": "none"}])
def test_at_stage_3_deepspeed_is_handed_a_model_in_parts(job, monkeypatch, train):
    """A model that is not in parts is moved to each device as a whole."""
    left = []
    initialize = deepspeed.initialize

    def look(*args, model, **options):
        left.extend(parameter for parameter in model.parameters() if parameter.numel())
        return initialize(*args, model=model, **options)

    monkeypatch.setattr(deepspeed, "initialize", look)
    flags = {"lr_init": 1e-3, "weight_decay": 0.1, **train}
    name = train.get("peft", "bone")
    folder = job.run(f"parts-{name}", strategy="deepspeed_stage_3", **flags)
    assert not left
    reference = job.run(f"whole-{name}", **flags)
    assert largest_difference(adapter_of(folder), adapter_of(reference)) < 2e-5


@pytest.fixture
def mapped(tiny_checkpoint):
    """mapped(kind, dtype): a model with an adapter, not placed yet; its base is mapped from a file in that dtype."""

    def make(kind="bone", dtype=torch.bfloat16):
        base = checkpoints.load_base(tiny_checkpoint(dtype=dtype))
        arch, state = base.arch, base.state
        with torch.device("meta"):
            model = build(arch, op="torch")
        load_base_into(model, state)
        inject(model, settings=AdapterSettings(kind, 4), train_parts=["ln", "state"])
        return model

    return make


def addresses(model):
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_frozen_base_takes_the_dtype_and_all_else_is_fp32(mapped, kind):
    model = mapped(kind)
    place(model, torch.device("cpu"), torch.bfloat16)
    base = {"emb.weight", "blocks.0.att.w1", "blocks.1.att.r_k", "blocks.1.ffn.key.weight", "head.weight"}
    fp32 = {f"blocks.0.att.key.{name}" for name in (*ADAPTERS[kind].parameter_names, *ADAPTERS[kind].frozen_names)}
    fp32 |= {"blocks.0.ln1.weight", "ln_out.bias", "blocks.1.att.time_state"}
    for name in base | fp32:
        assert model.get_parameter(name).dtype == (torch.bfloat16 if name in base else torch.float32), name


def test_what_needs_no_other_dtype_stays_mapped_and_what_is_trained_does_not(mapped):
    model = mapped(dtype=torch.float32)
    model.requires_grad_(True).emb.requires_grad_(False)
    before = addresses(model)
    place(model, torch.device("cpu"), torch.float32)
    assert {name for name, address in addresses(model).items() if address == before[name]} == {"emb.weight"}


def test_each_parameter_is_partitioned_before_the_next_is_copied(mapped):
    model = mapped()
    before, done = addresses(model), []

    def partition(parameter):
        # Every other parameter is either in parts already or still mapped.
        left = {name: p for name, p in model.named_parameters() if p.numel()}
        copied = [name for name, p in left.items() if p.data_ptr() != before[name]]
        assert len(copied) == 1 and left[copied[0]] is parameter
        parameter.data = parameter.new_empty(0)
        done.append(copied[0])

    place(model, torch.device("cpu"), torch.float32, partition)
    assert done == list(before)


def test_a_run_on_the_cpu_settles_the_allocator_once_before_its_first_step(job, monkeypatch):
    said, step = [], TrainingModule.training_step

    def training_step(module, *rest):
        said.append("step")
        return step(module, *rest)

    for name in ("keep", "trim_after_step", "give_back"):
        monkeypatch.setattr(allocator, name, partial(said.append, name))
    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    job.run("settled", epoch_steps=2, accumulate_grad_batches=2)
    window = ["step", "step", "trim_after_step"]
    assert said == ["keep", *window, *window, "give_back"]


def test_at_stage_3_no_more_than_two_blocks_are_whole_when_backward_begins(job, tmp_path, monkeypatch):
    """By DeepSpeed's defaults the whole of every model below 10^9 parameters was."""
    model = random_model(n_layer=6, n_embd=320, dim_ffn=960, head_size=64, vocab_size=256, dtype=torch.bfloat16)
    checkpoints.write_state(tmp_path / "base.pth", model.state_dict())
    found, backward = [], KeepDtypes.backward

    def look(self, tensor, module, *rest, **options):
        parts = [p for p in module.parameters() if not p.ds_persist]
        found.append(sum(p.ds_numel for p in parts if p.ds_status == ZeroParamStatus.AVAILABLE))
        backward(self, tensor, module, *rest, **options)

    monkeypatch.setattr(KeepDtypes, "backward", look)
    job.run("whole-blocks", load_model=tmp_path / "base.pth", strategy="deepspeed_stage_3", grad_cp=1, micro_bsz=2)
    block = sum(p.numel() for p in model.blocks[1].parameters())
    # The first step has no order of modules yet to fetch ahead by.
    assert len(found) >= 3 and max(found) <= 2 * block
