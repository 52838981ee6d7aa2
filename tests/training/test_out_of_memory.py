"""training/out_of_memory.py: what a user reads when memory runs out, and that its figures and its advice hold."""

import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_bone.config.flags import parse_train
from rwkv_bone.errors import UserError
from rwkv_bone.models import EVERY_BLOCK
from rwkv_bone.training import fit as fit_module
from rwkv_bone.training.heldout import HeldOut
from rwkv_bone.training.memory import GAPS, GB, RESERVE, Run, count, needs, parts
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.out_of_memory import Change, Plan, changes, explained, ran_out, size_text, together
from rwkv_bone.training.recompute import decide
from tests.conftest import random_model
from tests.test_memory_page import memory
from tests.training.conftest import log_of

ARCH = memory.shape(7, 32, 2560, 65536)


def exhaust() -> None:
    """Ask PyTorch's allocator for more than this process may have."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    mapped = int(status.split("VmSize:")[1].split()[0]) * 1024
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**28, limits[1]))
    try:
        torch.empty(2**30, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def plan_of(*flags: str, there: float | None = 8 * GB, device: str = "cuda", ranks: int = 1, **running) -> Plan:
    words = ["--load_model", "base.pth", "--data_file", "rows.jsonl", "--dataload", "pad", *flags]
    config = parse_train(words)
    counted = memory.counted(ARCH, "bone", config.adapter.bone_r)
    run = Run(config.data.ctx_len, config.data.micro_bsz, config.model.quant, device=device, ranks=ranks, **running)
    return Plan(config, ARCH, counted, run, there)


def named(plan: Plan) -> dict[str, Change]:
    return {next(iter(change.settings)): change for change in changes(plan)}


def test_an_allocators_errors_are_told_from_all_others():
    with pytest.raises(RuntimeError) as cpu:
        exhaust()
    with pytest.raises(MemoryError) as python:
        bytearray(2**62)
    for error in (cpu.value, python.value, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")):
        assert ran_out(error) and "out of memory" in str(explained(error))
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("x"), OSError(28, "No space")):
        assert not ran_out(error) and explained(error) is None


def test_every_figure_is_the_formulas_for_the_settings_beside_it():
    flags = ("--micro_bsz", "8", "--ctx_len", "1024", "--accumulate_grad_batches", "3", "--bone_r", "256")
    plan = plan_of(*flags, accumulate=3)
    found = named(plan)
    counted, run = plan.count, plan.run
    half = memory.counted(ARCH, "bone", int(found["bone_r"].settings["bone_r"]))
    expected = {
        "grad_cp": (counted, replace(run, recompute=EVERY_BLOCK)),
        "micro_bsz": (counted, replace(run, micro_bsz=1, accumulate=24)),
        "chunk_ctx": (counted, replace(run, chunk_ctx=int(found["chunk_ctx"].settings["chunk_ctx"]))),
        "ctx_len": (counted, replace(run, ctx_len=int(found["ctx_len"].settings["ctx_len"]))),
        "quant": (counted, replace(run, quant=str(found["quant"].settings["quant"]))),
        "bone_r": (half, run),
    }
    text = str(explained(MemoryError(), plan))
    for name, (counted, run) in expected.items():
        size = needs(ARCH, counted, run).total * (1 + GAPS) + RESERVE
        shown = re.search(rf"--{re.escape(str(found[name]).lstrip('-'))} +(\d+\.\d) GB", text)
        assert shown and float(shown[1]) == pytest.approx(size / GB, abs=0.051), name
    assert found["micro_bsz"].settings == {"micro_bsz": 1, "accumulate_grad_batches": 24}


def test_what_frees_most_is_named_first_and_what_frees_nothing_not_at_all():
    found = changes(plan_of("--micro_bsz", "8", "--ctx_len", "2048"))
    sizes = [change.plan.size for change in found]
    assert len(found) > 4 and sizes == sorted(sizes) and sizes[-1] < plan_of("--micro_bsz", "8").size * 8


@pytest.mark.parametrize("there", [8, 16, 30])
def test_a_number_is_lowered_no_further_than_is_needed(there):
    plan = plan_of("--micro_bsz", "8", "--ctx_len", "2048", there=there * GB)
    rows = int(named(plan)["micro_bsz"].settings["micro_bsz"])
    sizes = {r: replace(plan, run=replace(plan.run, micro_bsz=r, accumulate=8 // r)).size for r in (1, 2, 4)}
    fitting = [r for r, size in sizes.items() if size <= there * GB]
    assert rows == max(fitting, default=1)


def test_of_a_run_at_its_lowest_settings_nothing_is_advised():
    flags = ("--micro_bsz", "1", "--ctx_len", "128", "--quant", "nf4", "--bone_r", "8", "--grad_cp", "1")
    plan = plan_of(*flags, recompute=EVERY_BLOCK, there=GB, stage=3, offload=True)
    assert changes(plan) == []
    assert "Every setting that lowers it is at its lowest" in str(explained(MemoryError(), plan))


def test_only_what_a_continued_run_may_change_goes_without_a_note():
    free = {"grad_cp", "micro_bsz", "chunk_ctx", "strategy"}
    for flags, fixed in (
        ((), set()),
        (("--dataload", "pack"), {"micro_bsz"}),
        (("--chunk_ctx", "1024", "--bptt_chunks", "2"), {"chunk_ctx"}),
    ):
        plan = plan_of("--micro_bsz", "8", "--ctx_len", "2048", *flags)
        found = named(plan)
        assert {name for name, change in found.items() if change.continues} == (free & found.keys()) - fixed
        text = str(explained(MemoryError(), plan))
        assert text.count("(for a new run)") == sum(not change.continues for change in changes(plan))


def test_several_devices_are_told_of_the_stages_that_divide_more_and_one_of_offload_alone():
    def strategies(**running) -> list[str]:
        plan = plan_of("--micro_bsz", "1", "--ctx_len", "512", "--peft", "none", **running)
        whole = replace(plan.count, trained=2_900_000_000, projections=0, others=0)
        found = changes(replace(plan, count=whole, there=40 * GB))
        return [str(change.settings["strategy"]) for change in found if "strategy" in change.settings]

    assert strategies(ranks=4) == [
        "deepspeed_stage_3_offload",
        "deepspeed_stage_2_offload",
        "deepspeed_stage_3",
        "deepspeed_stage_2",
    ]
    assert strategies(stage=3, ranks=4) == ["deepspeed_stage_3_offload"]
    assert set(strategies()) == {"deepspeed_stage_2_offload", "deepspeed_stage_3_offload"}
    assert strategies(ranks=4, device="cpu") == ["deepspeed_stage_3", "deepspeed_stage_2"]


def test_where_no_change_is_enough_alone_those_that_are_together_are_named():
    plan = plan_of("--micro_bsz", "8", "--ctx_len", "2048", "--quant", "int8", there=6 * GB)
    assert min(change.plan.size for change in changes(plan)) > 6 * GB
    both = together(plan)
    assert both.plan.size <= 6 * GB < plan.size and len(both.settings) > 2
    assert f"Together: {both} needs {both.plan.size / GB:.1f} GB" in str(explained(MemoryError(), plan))
    assert both.plan.run.micro_bsz * both.plan.run.accumulate == 8
    assert "Together" not in str(explained(MemoryError(), replace(plan, there=36 * GB)))


def test_a_run_that_fails_says_what_it_needs_and_the_same_command_goes_on_with_less(job, monkeypatch):
    planned, loss = [], TrainingModule._loss

    def watched(choice, arch, counted, run, there):
        planned.append((arch, counted, run))
        return decide(choice, arch, counted, run, there)

    def fails_in_the_third(self, batch, scale):
        if self.window and self.window.step == 2:
            exhaust()
        return loss(self, batch, scale)

    monkeypatch.setattr(fit_module, "decide", watched)
    with monkeypatch.context() as patched:
        patched.setattr(TrainingModule, "_loss", fails_in_the_third)
        with pytest.raises(UserError) as told:
            job.run("short", save_steps=1, grad_cp=0)
    text = str(told.value)
    assert text.startswith("out of memory in optimiser step 3: ") and "can't allocate memory" in text
    arch, counted, run = planned[0]
    assert counted == count_of_the_job() and (run.micro_bsz, run.device, run.ranks) == (4, "cpu", 1)
    size = parts(arch, counted, run).total
    assert f"By the plan the run needs {size_text(size)}:" in text
    assert "the last step saved is 2" in text

    folder = job.run("short", resume=1, micro_bsz=2, accumulate_grad_batches=2)
    assert [line["step"] for line in log_of(folder)] == [1, 2, 3]


def count_of_the_job():
    from rwkv_bone.adapters import AdapterSettings, inject

    model = random_model(vocab_size=256)
    inject(model, settings=AdapterSettings("bone", 8))
    return count(model)


@pytest.mark.parametrize(
    "owner, name, where",
    [
        (HeldOut, "_measure", "while held-out data was measured"),
        ("rwkv_bone.training.place.place", "", "while the model was put on its device"),
        ("rwkv_bone.training.fit.prepare_model", "", "while the base model was read"),
    ],
)
def test_a_lack_of_memory_is_told_wherever_it_comes(job, monkeypatch, owner, name, where):
    def fails(*arguments, **options):
        if name:
            arguments[1].eval()
        exhaust()

    monkeypatch.setattr(*((owner, name) if name else (owner,)), fails)
    with pytest.raises(UserError, match=f"out of memory {where}: "):
        job.run(f"where-{where}".replace(" ", "-"), eval_data=job.flags["data_file"], eval_samples=0)
