"""A training run, from its config to its last line of output: the only place that sees all the pieces.

With several devices `join` starts this program again for each of them, so everything here runs once per process; only
the main process prints and touches the results folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Callback, seed_everything

from rwkv_bone import cards, console, run_lock
from rwkv_bone.cluster.join import join
from rwkv_bone.cluster.watch import Watch
from rwkv_bone.cluster.world import SAME_FILES
from rwkv_bone.config import TrainConfig, preferences, rates
from rwkv_bone.data.tokenizer import folder_text
from rwkv_bone.errors import UserError
from rwkv_bone.preferences.objective import Objective
from rwkv_bone.training import batch_size, guard, out_of_memory, project
from rwkv_bone.training.compiling import CompileBlocks
from rwkv_bone.training.heap import KeepHeap
from rwkv_bone.training.heldout_sets import prepare_heldout
from rwkv_bone.training.measurements import read_kept
from rwkv_bone.training.measuring import MeasureWhileTraining
from rwkv_bone.training.memory import count
from rwkv_bone.training.module import TrainingModule, read_bad_steps
from rwkv_bone.training.observers import Observers
from rwkv_bone.training.place import PlaceModel
from rwkv_bone.training.prepare import (
    agree_on_files,
    count_parameters,
    load_data,
    plan_batches,
    prepare_model,
    reference_start,
)
from rwkv_bone.training.recompute import Agree, decide, memory_there, run_of
from rwkv_bone.training.reference import Reference
from rwkv_bone.training.report import complete, following, header, program, report_results
from rwkv_bone.training.resume import look, looked
from rwkv_bone.training.resume_file import RestoreMoments
from rwkv_bone.training.saving import SaveTrained
from rwkv_bone.training.seeding import SeedBatches
from rwkv_bone.training.signals import StopOnSignal
from rwkv_bone.training.strategy import silence_libraries
from rwkv_bone.training.trainer import choose_device, make_trainer, run_steps, settle_threads
from rwkv_bone.training.watched import ShowProgress


def fit(config: TrainConfig, watch: Watch | None = None) -> Path:
    """Train as `config` says and return the last file of trained parameters; UserError for what a user can fix.

    watch: over the world that `join(config)` returned, both entered; None joins here.
    """
    if watch is None:
        config = cards.settled(config)
        with join(config) as world, Watch(world, config.run.rank_timeout) as watch:
            return fit(config, watch)
    silence_libraries()
    folder = Path(config.run.proj_dir)
    if not watch.world.main:
        return _fit(config, watch, folder)
    project.check_folder(config)
    # Before anything there is read.
    with run_lock.held(folder):
        return _fit(config, watch, folder)


def _fit(config: TrainConfig, watch: Watch, folder: Path) -> Path:
    world, run = watch.world, config.run
    main = world.main
    report: Callable[[str], None] = console.say if main else lambda line: None
    earlier = looked(world.from_first("what is in --proj_dir", lambda: look(config)), folder)
    if main and not earlier and not run.overwrite and project.has_remains(folder):
        report(f"resume    a run in {folder} ended before it saved anything: this one begins anew")
    device = choose_device(run.accelerator, world)
    watch.spins(device == "cuda")
    world.agree("the device of --accelerator", device)
    threads = settle_threads(run.devices)
    there = memory_there(device, run.devices)  # before this run takes any of it
    total = guard.memory_in_all(device, run.devices)
    if not config.model.load_model:
        guard.check_new_model(config, prepare_model(config, torch.device("meta"), empty=True), device, total)

    asked = config.optim
    if earlier:
        config = replace(config, optim=rates.continued(asked, earlier.config.optim))
        config = replace(config, preference=preferences.continued(config.preference, earlier.config.preference))
    seed_everything(run.random_seed, verbose=False)
    with out_of_memory.told("while the base model was read"):
        prepared = prepare_model(config, torch.device(device), continued=earlier is not None)
    model, adapter = prepared.model, config.adapter
    # Of what is written, config.json included, nothing else changes: a user's `auto` stays `auto`. But the rates decide
    # what comes out, so that a file says which they were.
    config = replace(config, optim=prepared.optim)
    data, text = folder_text(prepared.folder, config.data)
    reading = replace(config, data=data)
    dataset, split = load_data(reading, prepared.arch.vocab_size, config.data)
    counted = count(model)
    reading = batch_size.settle(reading, prepared.arch, counted, dataset, device, there, model)
    reading = batch_size.agreed(config, reading, world)
    plan = plan_batches(reading, dataset, batch_size.unit(config))
    output = prepared.output.with_data(dataset)
    agree_on_files(world, config, model, output.metadata)
    objective = None if data.task == "sft" else Objective(config.preference, data.task)
    start = None
    if objective and objective.needs_reference:
        start = reference_start(config, prepared, earlier, main)
        output = replace(output, metadata=output.metadata | {"start": start.name})
    if earlier:
        earlier.check(output.metadata, config)
        if main:
            earlier.load_parameters(model, output.keys)
    first = earlier.step if earlier else 0
    running = run_of(reading, plan, device, model)
    choice = decide(config.model.grad_cp, prepared.arch, counted, running, there)
    memory = out_of_memory.Plan(config, prepared.arch, counted, replace(running, recompute=choice.recompute), there)
    guard.check(memory, total)
    bad_steps = read_bad_steps(earlier.metadata, earlier.path) if earlier else []
    module = TrainingModule(
        model,
        plan,
        run.epoch_count,
        config.optim,
        config.model,
        first,
        adapter.lora_plus,
        choice.recompute,
        objective=objective,
        bad_steps=bad_steps,
        max_bad_steps=run.max_bad_steps,
        report=report,
    )

    for line in earlier.notes(config, plan, threads, output.metadata) if earlier else ():
        report(f"resume    {line}")
    if module.steps_left:
        for line in header(config, prepared, module, choice, device, threads, text):
            report(line)
        for line in rates.said(asked, config.optim, adapter, prepared.arch.n_embd, earlier is not None, data.task):
            report(f"rate      {line}")
        for line in guard.warnings(memory):
            report(f"          {line}")
    measured = earlier.measured if earlier else None
    kept = world.from_first("measurements", lambda: read_kept(folder, first)) if earlier else ((), ())
    heldout = prepare_heldout(reading, prepared.arch.vocab_size, split, plan, folder, report, measured, kept)
    if heldout:
        world.agree("held-out data", heldout.fingerprint, SAME_FILES)
    stopped = heldout is not None and heldout.stopped(first)
    if stopped:
        report(f"resume    it has ended early, after step {first} (--early_stop {run.early_stop})")
        module.steps_left = 0
    go_on = program("train.py", "--resume", "1", "--proj_dir", str(folder))
    observers = Observers(
        config,
        prepared,
        data,
        module,
        heldout,
        folder=folder,
        device=device,
        continues=main and earlier is not None,
        go_on=go_on,
        report=report,
    )
    if earlier and not module.steps_left and not (heldout and heldout.interrupted(first)):
        trained = earlier.trained or folder / f"rwkv-{run.epoch_begin + plan.locate(first - 1)[0]}-s{first}.pth"
        if main and earlier.mend(trained, output.dtypes, output.metadata):
            report(f"resume    {trained.name} was lost or damaged: it is written again, from {earlier.path.name}")
        if main:
            with project.spared("what a killed run was writing stays", report):
                project.tidy(folder)
        for line in [*observers.table(), *complete(config, folder, trained, heldout, stopped)]:
            report(line)
        return trained

    reference = None
    if objective and start:
        reference = Reference(reading, objective, start, output, report)
    log = observers.log
    save = SaveTrained(output, folder, run, earlier=earlier, log=log, go_on=go_on, report=report)
    watch.state = save.state_of_things
    stop = StopOnSignal(save.save_step, save.state_of_things, run.max_minutes)
    callbacks: list[Callback] = [stop, ShowProgress(), KeepHeap(), PlaceModel(prepared.dtype), Agree()]
    # After those: what is compiled is placed, and knows what is computed again.
    callbacks += [CompileBlocks(config.model.compile, report)] if config.model.compile != "0" else []
    callbacks += [reference] if reference else []
    if heldout and heldout.answers:
        heldout.answers.reference = reference
    callbacks += [heldout] if heldout else []
    callbacks += [*observers.callbacks, save]
    callbacks += [MeasureWhileTraining(heldout, log, save, run, report)] if heldout else []
    callbacks.append(observers.page)
    callbacks += [SeedBatches(run.random_seed)] if adapter.lora_dropout else []
    callbacks += [RestoreMoments(earlier.path, first - len(bad_steps))] if earlier else []
    trainable = count_parameters(model, trained_only=True)
    trainer = make_trainer(reading, device, trainable, callbacks, world)
    if main:
        if earlier:
            earlier.record(config, output.metadata)
        project.begin(folder, config, continued=earlier is not None)
        console.keep_lost_output(folder / project.OUTPUT)

    def explain(error: BaseException) -> UserError | None:
        return out_of_memory.explained(error, memory, out_of_memory.place_of(module), save.state_of_things())

    try:
        run_steps(trainer, module, explain)
    finally:
        with project.spared("there is no table of what the run did", report):
            for line in observers.table():
                report(line)
    assert save.last_path
    if main:
        report_results(config, folder, save.last_path, log.records, heldout, report)
        observers.page.done(list(following(config, folder, save.last_path)))
    return save.last_path
