"""--plan 1: what a run would take, from a model without memory and, if it fits, a few timed steps. Nothing is written.

Data, batches and choices are made by the functions that `training/fit.py` calls, so that they are those of the run.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from rwkv_bone import console
from rwkv_bone.cluster.watch import Watch
from rwkv_bone.config import TrainConfig, rates
from rwkv_bone.data.tokenizer import folder_text
from rwkv_bone.planning import lines
from rwkv_bone.planning.lines import WholeRun
from rwkv_bone.planning.steps import take_steps
from rwkv_bone.preferences.objective import Objective
from rwkv_bone.training import batch_size, guard, project
from rwkv_bone.training.heldout_sets import prepare_heldout
from rwkv_bone.training.memory import count
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.out_of_memory import Plan
from rwkv_bone.training.prepare import load_data, plan_batches, prepare_model
from rwkv_bone.training.recompute import decide, memory_there, run_of
from rwkv_bone.training.report import header
from rwkv_bone.training.strategy import silence_libraries
from rwkv_bone.training.trainer import choose_device, settle_threads


class Planned(NamedTuple):
    """What was said, in numbers. whole: None if it does not fit."""

    memory: Plan
    whole: WholeRun | None


def plan(config: TrainConfig, watch: Watch) -> Planned:
    """Print what the run of `config` would take; UserError for what a user can fix, as the run itself would raise it.

    watch: over the world that `join(config)` returned, both entered.
    """
    silence_libraries()
    world, run = watch.world, config.run
    say: Callable[[str], None] = printer() if world.main else lambda line: None
    if world.main:
        project.check_folder(config)
    device = choose_device(run.accelerator, world)
    watch.spins(device == "cuda")
    threads = settle_threads(run.devices)
    there, total = memory_there(device, run.devices), guard.memory_in_all(device, run.devices)

    outline = prepare_model(config, torch.device("meta"), empty=True)
    arch, counted, asked = outline.arch, count(outline.model), config
    config = replace(config, optim=outline.optim)
    data, text = folder_text(outline.folder, config.data)
    reading = replace(config, data=data)
    dataset, split = load_data(reading, arch.vocab_size, config.data, keep=False)
    reading = batch_size.settle(reading, arch, counted, dataset, device, there)
    reading = batch_size.agreed(config, reading, world)
    batches = plan_batches(reading, dataset, batch_size.unit(config))
    running = run_of(reading, batches, device)
    choice = decide(config.model.grad_cp, arch, counted, running, there)
    memory = Plan(config, arch, counted, replace(running, recompute=choice.recompute), there)
    objective = None if data.task == "sft" else Objective(config.preference, data.task)
    module = TrainingModule(outline.model, batches, run.epoch_count, config.optim, config.model, objective=objective)

    for line in header(config, outline, module, choice, device, threads, text):
        say(line)
    for line in rates.said(asked.optim, config.optim, config.adapter, arch.n_embd, False, config.data.task):
        say(f"rate      {line}")
    for line in lines.memory_parts(memory, total):
        say(line)
    folder = Path(run.proj_dir)
    heldout = prepare_heldout(reading, arch.vocab_size, split, batches, folder, say, keep=False)
    if world.main:
        for line in lines.folder_state(asked, module.total_steps):
            say(line)
    whole = None
    # Processes of a CPU that look one after the other find different amounts free.
    if world.from_first("whether it fits", lambda: choice.fits):
        timed = take_steps(config, reading, device, batches, choice.recompute, objective, watch, heldout, say)
        whole = WholeRun.of(config, batches, timed)
        for line in lines.time_taken(config, whole, dataset.unit):
            say(line)
    else:
        for line in lines.too_large(memory, total):
            say(line)
    say("plan      nothing was written; the same command without --plan is the run")
    return Planned(memory, whole)


def printer() -> Callable[[str], None]:
    """`console.say`, with lines that a terminal is too narrow for broken between words, under what they say."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0

    def say(line: str) -> None:
        for part in lines.broken(line, columns) if columns else [line]:
            console.say(part)

    return say
