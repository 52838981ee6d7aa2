"""The first steps of a run, really taken and timed: its model, optimiser and loop, without anything that writes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything

from rwkv_bone import signals
from rwkv_bone.cluster.watch import Watch
from rwkv_bone.config import TrainConfig
from rwkv_bone.data import BatchPlan
from rwkv_bone.models import Recompute
from rwkv_bone.planning.heldout import Costs, TimeHeldOut
from rwkv_bone.planning.reference import TimeReference
from rwkv_bone.planning.timing import Enough, Times, TimeSteps, times
from rwkv_bone.preferences.objective import Objective
from rwkv_bone.quantization import describe
from rwkv_bone.training import out_of_memory
from rwkv_bone.training.compiling import CompileBlocks
from rwkv_bone.training.heap import KeepHeap
from rwkv_bone.training.heldout import HeldOut
from rwkv_bone.training.log import peak_memory_mb
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.place import PlaceModel
from rwkv_bone.training.prepare import count_parameters, prepare_model
from rwkv_bone.training.recompute import Agree
from rwkv_bone.training.seeding import SeedBatches
from rwkv_bone.training.strategy import DTYPES
from rwkv_bone.training.trainer import make_trainer, run_steps


@dataclass(frozen=True)
class Timed:
    """What was timed. Seconds, of this process, and bytes."""

    steps: Times
    start: float  # from the start of the program to the first step
    held: Costs | None  # of held-out measurements; None: there are none
    peak: float  # most memory of this process so far, as the log of a run has it
    reference: float = 0.0  # of the pass before the first step that gives what answers are compared with
    referred: int = 0  # how many units of the training data it has


def take_steps(
    config: TrainConfig,
    reading: TrainConfig,
    device: str,
    batches: BatchPlan,
    recompute: Recompute,
    objective: Objective | None,
    watch: Watch,
    heldout: HeldOut | None,
    say: Callable[[str], None],
) -> Timed:
    """Take and time the first steps of the run, in every process of it alike.

    reading: `config` with the model folder's own settings, and --micro_bsz decided.
    """
    run, model = config.run, config.model
    seed_everything(run.random_seed, verbose=False)
    with out_of_memory.told("while the base model was read"):
        prepared = prepare_model(config, torch.device(device))
    say(f"kernel    {prepared.kernel}")
    if model.quant != "none":
        say(f"quant     {describe(prepared.model, DTYPES[run.precision], device)}")
    plus = config.adapter.lora_plus
    about: dict[str, Any] = {"objective": objective, "max_bad_steps": 10**6}
    module = TrainingModule(prepared.model, batches, run.epoch_count, config.optim, model, 0, plus, recompute, **about)
    held = TimeHeldOut(heldout) if heldout else None
    reference = None
    if objective and objective.needs_reference:
        reference = TimeReference(heldout, reading.data.micro_bsz, model.chunk_ctx)
    watcher = TimeSteps()
    callbacks: list[Callback] = [KeepHeap(), PlaceModel(prepared.dtype), Agree()]
    callbacks += [CompileBlocks(model.compile, say)] if model.compile != "0" else []
    callbacks += [SeedBatches(run.random_seed)] if config.adapter.lora_dropout else []
    callbacks += [one for one in (reference, held) if one]
    callbacks += [watcher]
    trainable = count_parameters(prepared.model, trained_only=True)
    trainer = make_trainer(reading, device, trainable, callbacks, watch.world)
    with contextlib.suppress(Enough):
        run_steps(trainer, module, lambda error: out_of_memory.explained(error, where="while steps were timed"))
    return Timed(
        times(watcher.marks),
        start=watcher.began - signals.BEGAN - sum(one.spent for one in (reference, held) if one),
        held=held.costs if held else None,
        peak=peak_memory_mb(torch.device(device)) * 2**20,
        reference=reference.seconds if reference else 0.0,
        referred=reference.units if reference else 0,
    )
