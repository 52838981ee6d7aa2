"""What our ZeRO optimisers leave out of DeepSpeed's: bytes, not one bit of the results."""

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from rwkv_bone import checkpoints
from rwkv_bone.training import zero as zero_file
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.signals import StopOnSignal
from rwkv_bone.training.strategy import LEAST_BUCKET
from rwkv_bone.training.zero import OneDeviceZero
from tests.live_bytes import LiveBytes
from tests.training.conftest import largest_difference, log_of

ALL = {"peft": "none", "lr_init": 1e-3}  # two groups, with and without decay; unused parameters; sizes that are padded
RUNS = {
    "1": {**ALL, "strategy": "deepspeed_stage_1", "grad_clip": 0.1},
    "1 accumulated": {"micro_bsz": 1, "accumulate_grad_batches": 4, "grad_clip": 0.1, "peft": "lora", "lora_plus": 4},
    "2 accumulated": {
        **ALL,
        "strategy": "deepspeed_stage_2",
        "micro_bsz": 2,
        "accumulate_grad_batches": 2,
        "grad_clip": 99,
    },
    "2 not clipped": {
        "strategy": "deepspeed_stage_2",
        "grad_clip": 0,
        "dataload": "pack",
        "micro_bsz": 1,
        "ctx_len": 32,
        "chunk_ctx": 16,
    },
    "3": {**ALL, "strategy": "deepspeed_stage_3", "grad_clip": 0.1},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_to_the_bit_as_deepspeeds_own(job, monkeypatch, name):
    flags, made = {**RUNS[name], "save_steps": 2}, []
    lighten = zero_file.lighten
    monkeypatch.setattr(zero_file, "lighten", lambda zero: made.append(zero) or lighten(zero))
    ours = job.run(f"light {name}", **flags)
    monkeypatch.setattr(zero_file, "lighten", made.append)
    theirs = job.run(f"whole {name}", **flags)
    assert isinstance(made[0], OneDeviceZero) == (name[0] != "3") and not isinstance(made[1], OneDeviceZero)
    # The values and both moments; those after the second step, since the last file is of the third.
    for file in ("resume.pth", "rwkv-0-s2.pth"):
        assert largest_difference(*(checkpoints.read_state(folder / file) for folder in (ours, theirs))) == 0
    numbers = ("loss", "grad_norm", "lr")
    assert [[line[n] for n in numbers] for line in log_of(ours)] == [
        [line[n] for n in numbers] for line in log_of(theirs)
    ]
    clip = flags.get("grad_clip")
    assert not clip or {line["grad_norm"] > clip for line in log_of(ours)} == {clip < 1}


def bytes_of_a_parameter(job, monkeypatch, name, **flags) -> tuple[float, float]:
    """(during a forward pass, at most during a step of the optimiser) for each trained parameter.

    Without what does not grow with their number: the bucket of stage 3, which is this large whatever it holds.
    """
    fixed = 4 * LEAST_BUCKET if flags["strategy"] == "deepspeed_stage_3" else 0
    forward, step, trained = [], [], []
    start, before = StopOnSignal.on_train_batch_start, TrainingModule.on_before_optimizer_step

    def before_forward(self, trainer, module, batch, index):
        trained[:] = [sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)]
        forward.append(live.now)
        step.append(live.peak)
        start(self, trainer, module, batch, index)

    def before_step(self, optimizer):
        live.peak = live.now
        before(self, optimizer)

    monkeypatch.setattr(StopOnSignal, "on_train_batch_start", before_forward)
    monkeypatch.setattr(TrainingModule, "on_before_optimizer_step", before_step)
    with LiveBytes() as live:
        job.run(name, **flags)
    return (forward[-1] - fixed) / trained[0], (step[-1] - fixed) / trained[0]


@pytest.mark.parametrize(
    "strategy, bytes_of_one",
    [("deepspeed_stage_1", (12, 20)), ("deepspeed_stage_2", (12, 20)), ("deepspeed_stage_3", (16, 20))],
)
def test_a_trained_parameter_takes_12_bytes_by_default_and_20_at_most(job, monkeypatch, strategy, bytes_of_one):
    # One row of few tokens, so that little else is there.
    flags = {**ALL, "strategy": strategy, "dataload": "get", "ctx_len": 4, "micro_bsz": 1, "loss_mask": "none"}
    found = bytes_of_a_parameter(job, monkeypatch, f"bytes-{strategy}", epoch_steps=4, **flags)
    assert found == pytest.approx(bytes_of_one, rel=0.02)


def test_a_gradient_comes_into_being_when_its_first_one_arrives_and_is_gone_after_the_step(job, monkeypatch):
    """So a large adapter's gradients are not there yet while most activations are."""
    made, step = [], OneDeviceZero.step

    def watch(zero):
        lighten(zero)
        parameters = [p for group in zero.bit16_groups for p in group]

        def arrived(parameter):
            made.append((sum(p.grad is not None for p in parameters), parameter.grad.untyped_storage().nbytes()))

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(arrived)

    def gone_after(self, closure=None):
        found = [count for count, _ in made]
        # The first pass of the window makes them one after another, the second adds to them.
        first, second = found[: len(found) // 2], found[len(found) // 2 :]
        assert first == [*range(1, len(first) + 1)] and second == len(first) * [len(first)]
        assert all(size <= 4 * 4 * 32 * 32 for _, size in made)  # the largest weight of a block: none is in a flat one
        step(self, closure)
        assert all(p.grad is None for group in (*self.bit16_groups, flat_of(self)) for p in group)
        made.clear()

    def flat_of(zero):
        return zero.single_partition_of_fp32_groups

    lighten = zero_file.lighten
    monkeypatch.setattr(zero_file, "lighten", watch)
    monkeypatch.setattr(OneDeviceZero, "step", gone_after)
    job.run("arrives", micro_bsz=2, accumulate_grad_batches=2)


def test_a_parameter_without_a_gradient_is_stepped_as_one_with_zeros(job, monkeypatch):
    def run(name, change):
        def changed(self, closure=None):
            change(self.bit16_groups[0][1])
            step(self, closure)

        monkeypatch.setattr(OneDeviceZero, "step", changed)
        return checkpoints.read_state(job.run(name, weight_decay=0.1) / "resume.pth")

    step = OneDeviceZero.step
    without = run("without", lambda parameter: setattr(parameter, "grad", None))
    assert largest_difference(without, run("zeros", lambda parameter: parameter.grad.zero_())) == 0


def test_several_devices_share_the_master_copy_too(job, monkeypatch):
    """With another rank to gather from, the optimiser stays DeepSpeed's, and its part is one of the flat parameters."""
    found = []

    def look(zero):
        zero.partition_count = [2] * len(zero.partition_count)
        lighten(zero)
        found.append(type(zero))
        for master, parts in zip(
            zero.single_partition_of_fp32_groups, zero.parallel_partitioned_bit16_groups, strict=True
        ):
            assert master.data_ptr() == parts[0].data_ptr()

    lighten = zero_file.lighten
    monkeypatch.setattr(zero_file, "lighten", look)
    ours = job.run("shared", **ALL)
    monkeypatch.setattr(zero_file, "lighten", lambda zero: None)
    theirs = job.run("not shared", **ALL)
    assert found == [DeepSpeedZeroOptimizer]
    assert largest_difference(*(checkpoints.read_state(folder / "resume.pth") for folder in (ours, theirs))) == 0


def test_a_step_that_is_not_taken_changes_neither_moments_nor_the_count_of_steps(job, monkeypatch):
    kept, step = [], OneDeviceZero.step

    def third_gradient_is_infinite(self, closure=None):
        (flat,) = self.single_partition_of_fp32_groups
        state = self.optimizer.state[flat]
        if len(kept) == 2:
            self.bit16_groups[0][0].grad.view(-1)[5] = torch.inf
            before = [x.clone() for x in (flat, *state.values())]
            step(self, closure)
            assert all(map(torch.equal, before, (flat, *state.values()))) and not self.overflow
        else:
            step(self, closure)
        kept.append(len(state))

    monkeypatch.setattr(OneDeviceZero, "step", third_gradient_is_infinite)
    job.run("untaken")
    assert kept == [3, 3, 3]
