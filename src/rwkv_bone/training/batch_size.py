"""--micro_bsz auto: how many samples go through the model at once, for the memory that is free.

A step then has SAMPLES x accumulate_grad_batches samples on each device, or packed rows of up to ctx_len tokens each,
of pairs twice that: as many as with the default of --micro_bsz. Which these are depends on the settings alone
(`BatchPlan` with a unit of 1). What fits decides only how many of them go through the model together, as --grad_cp auto
decides what is computed again: results are equal up to rounding, and a run goes on where other memory is free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rwkv_bone.checkpoints import Architecture
from rwkv_bone.cluster.world import World
from rwkv_bone.config import DataConfig, TrainConfig
from rwkv_bone.data import Dataset
from rwkv_bone.models import RWKV, Recompute
from rwkv_bone.training.memory import Counted, needed
from rwkv_bone.training.prepare import plan_batches
from rwkv_bone.training.recompute import run_of

SAMPLES: int = DataConfig.micro_bsz
UNIT = 1  # samples of a packed row


def is_auto(config: TrainConfig) -> bool:
    return config.data.micro_bsz == 0


def unit(config: TrainConfig) -> int | None:
    """Of the rows of a packed batch, as `BatchPlan` takes it: those of one sample with auto, else the whole batch."""
    return UNIT if is_auto(config) else None


def ways(config: TrainConfig) -> Iterator[TrainConfig]:
    """The settings with each way to cut a step, the largest micro-batches first; what is given is the only one."""
    if not is_auto(config):
        yield config
        return
    total = SAMPLES * config.run.accumulate_grad_batches
    for passes in range(1, total + 1):
        if total % passes == 0:
            yield cut(config, total // passes)


def cut(config: TrainConfig, micro_bsz: int) -> TrainConfig:
    """The settings of --micro_bsz auto with so many samples at once."""
    passes = SAMPLES * config.run.accumulate_grad_batches // micro_bsz
    run = replace(config.run, accumulate_grad_batches=passes)
    return replace(config, data=replace(config.data, micro_bsz=micro_bsz), run=run)


def settle(
    config: TrainConfig,
    arch: Architecture,
    count: Counted,
    dataset: Dataset,
    device: str,
    there: float | None,
    model: RWKV | None = None,
) -> TrainConfig:
    """The settings with --micro_bsz auto decided: the first of `ways` that fits, the last if none does.

    It fits with nothing computed again, or with what --grad_cp says. there: bytes free for this process; None: unknown,
    and then the default of --micro_bsz is taken. model: as `run_of` takes it.
    """
    if not is_auto(config):
        return config
    if there is None:
        return cut(config, SAMPLES)
    fixed = {"wkv": Recompute(0, True), "1": Recompute(arch.n_layer)}
    recompute = fixed.get(config.model.grad_cp, Recompute())
    found = next(ways(config))
    run = replace(run_of(found, plan_batches(found, dataset, UNIT), device, model), recompute=recompute)
    for found in ways(config):
        rows, passes = found.data.micro_bsz, found.run.accumulate_grad_batches
        if needed(arch, count, replace(run, micro_bsz=rows, accumulate=passes)) <= there:
            break
    return found


def agreed(config: TrainConfig, settled: TrainConfig, world: World) -> TrainConfig:
    """What `settle` has found, or less: the same in every process. To be called on every rank.

    config: as the user gave it.
    """
    if not is_auto(config):
        return settled
    rows = world.least("--micro_bsz", settled.data.micro_bsz)
    passes = config.run.accumulate_grad_batches * SAMPLES // rows
    run = replace(settled.run, accumulate_grad_batches=passes)
    return replace(settled, data=replace(settled.data, micro_bsz=rows), run=run)
