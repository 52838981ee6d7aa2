"""A training run from its config: the only place that sees all the pieces.

With several devices Lightning starts this program again for each of them, so everything here runs once per process;
only the main process prints and touches the results folder.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shlex
import signal
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import rwkv_bone
from rwkv_bone import checkpoints
from rwkv_bone.adapters import AdapterLinear, Injection, adapter_keys, inject, load_adapter_file, settings_of
from rwkv_bone.checkpoints import Architecture, atomic_path
from rwkv_bone.config import TrainConfig
from rwkv_bone.config.saved import to_json
from rwkv_bone.data import BatchPlan, Dataset, load_dataset, load_pairs, load_tokenizer
from rwkv_bone.data.fingerprint import data_fingerprint
from rwkv_bone.data.split import split_heldout
from rwkv_bone.devices import describe_devices, select_device
from rwkv_bone.errors import Interrupted, UserError
from rwkv_bone.models import RWKV, architecture_from_scratch, build, init_from_scratch, load_base_into
from rwkv_bone.ops import select_op
from rwkv_bone.quantization import describe
from rwkv_bone.training import project, resume
from rwkv_bone.training.callbacks import Progress, SeedBatches, StepLog, StopOnSignal, draw_loss, read_log
from rwkv_bone.training.heldout import HeldOut
from rwkv_bone.training.module import RunStopped, TrainingModule
from rwkv_bone.training.place import PlaceModel
from rwkv_bone.training.saving import Output, SaveTrained
from rwkv_bone.training.schedule import check_schedule
from rwkv_bone.training.strategy import (
    DTYPES,
    leave_process_group,
    make_strategy,
    offloads,
    silence_libraries,
    zero_stage,
)


@dataclass(frozen=True)
class Prepared:
    """A model ready to be placed and trained, and how its trained part is written."""

    model: RWKV
    arch: Architecture
    kernel: str  # one sentence
    injection: Injection | None
    output: Output
    dtype: torch.dtype  # of the frozen base, once it is placed


def fit(config: TrainConfig) -> Path:
    """Train as `config` says and return the last file of trained parameters; UserError for what a user can mend."""
    silence_libraries()
    main = is_main_process()
    say = partial(print, flush=True) if main else lambda *_: None
    device = select_device(config.run.accelerator)
    if device == "cuda":
        # Until Lightning sets the same: weights are quantised before there is a trainer.
        torch.cuda.set_device(LightningEnvironment().local_rank())
    earlier = resume.Saved.find(config) if config.run.resume else None
    folder = project.check_folder(config) if main else Path(config.run.proj_dir)
    seed_everything(config.run.random_seed, verbose=False)
    prepared = prepare_model(config, torch.device(device))
    world_size = config.run.devices * config.run.num_nodes
    if isinstance(prepared.model.head, AdapterLinear) and zero_stage(config.run.strategy) == 3 and world_size > 1:
        # An adapted head runs once for so many trained tokens, of which ranks have unequal numbers; but at stage 3 all
        # must gather a weight equally often.
        raise UserError("--targets head does not work at ZeRO stage 3 on several devices: use deepspeed_stage_2")
    dataset, split = load_data(config, prepared.arch.vocab_size)
    plan = BatchPlan(
        dataset,
        micro_bsz=config.data.micro_bsz,
        accumulate=config.run.accumulate_grad_batches,
        world_size=world_size,
        seed=config.run.random_seed,
        steps_per_epoch=config.run.epoch_steps or None,
        pack=config.data.dataload == "pack",
    )
    check_schedule(plan.total_steps(config.run.epoch_count), config.optim)
    metadata = prepared.output.metadata | {"data": data_fingerprint(dataset)}
    first_step = 0
    if earlier:
        earlier.check(metadata)
        earlier.load_parameters(prepared.model, prepared.output.keys)
        first_step = earlier.step
    module = TrainingModule(
        prepared.model,
        plan,
        config.run.epoch_count,
        config.optim,
        config.model,
        first_step,
        config.adapter.lora_plus,
    )
    for line in header(config, prepared, device, dataset, module):
        say(line)
    if earlier:
        for line in earlier.notes(config, plan):
            say(f"resume    {line}")
    heldout = prepare_heldout(config, prepared.arch, split, folder, say)
    complete = earlier and first_step >= module.total_steps
    if complete and not (heldout and heldout.interrupted(module.total_steps)):
        say(f"nothing is left to do: the run in {folder} is complete; a larger --epoch_count trains longer")
        return earlier.trained
    strategy = make_strategy(config.run, device, trainable=count(prepared.model, trained=True))
    logger = wandb_logger(config, folder, say)
    log = StepLog(folder / project.LOG, kept=read_log(folder / project.LOG, first_step) if earlier else ())
    if main:
        (project.clear_unfinished if earlier else project.clear_folder)(folder)
        with atomic_path(folder / project.CONFIG, overwrite=True) as temporary:
            # How a run treats its folder is no setting of the run.
            kept = replace(config, run=replace(config.run, resume=False, overwrite=False))
            temporary.write_text(to_json(kept), encoding="utf-8")
    save = SaveTrained(
        replace(prepared.output, metadata=metadata),
        folder,
        epoch_begin=config.run.epoch_begin,
        epoch_save=config.run.epoch_save,
        save_steps=config.run.save_steps,
        earlier=earlier,
        go_on=program("train.py", "--resume", "1", "--proj_dir", str(folder)),
        say=say,
    )
    stop = StopOnSignal(save.save_step, lambda: f"interrupted; {save.state_of_things()}")
    callbacks = [stop, PlaceModel(prepared.dtype), *([heldout] if heldout else []), log, Progress(log), save]
    if config.adapter.lora_dropout:
        callbacks.append(SeedBatches(config.run.random_seed))
    if earlier:
        callbacks.append(resume.RestoreMoments(earlier))
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=config.run.devices,
        num_nodes=config.run.num_nodes,
        strategy=strategy,
        max_epochs=1,  # the loader of TrainingModule holds all of ours
        accumulate_grad_batches=config.run.accumulate_grad_batches,
        gradient_clip_val=config.optim.grad_clip or None,  # handed to DeepSpeed, which does the clipping
        logger=logger,
        callbacks=callbacks,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module)
    except (RunStopped, Interrupted):
        if trainer.local_rank > 0:
            # Every rank stops for the same reason. The main process reports it; leaving with an error here would have
            # Lightning kill the main process before it has finished writing.
            raise SystemExit(0) from None
        raise
    except Exception:
        # The others would wait for this one in their next collective.
        trainer.strategy.launcher.kill(signal.SIGTERM)
        raise
    finally:
        module.close()
    if device == "cuda":
        # NCCL otherwise warns, in the last line of a run that went well. After a failure the other ranks may be gone.
        atexit.register(leave_process_group)
    if main:
        report(config, folder, save.last_path, log.records, heldout, say)
    return save.last_path


def report(config: TrainConfig, folder: Path, trained: Path, records: list[dict], heldout: HeldOut | None, say) -> None:
    """Draw the loss curve and say where everything is."""
    with atomic_path(folder / project.PLOT, overwrite=True) as temporary:
        draw_loss(temporary, records, heldout.points() if heldout else [])
    for line in footer(config, folder, trained):
        say(line)


def is_main_process() -> bool:
    """Whether this is the process that reports, also before Lightning has started the others."""
    return rank_zero_only.rank == 0 and LightningEnvironment().node_rank() == 0


def prepare_model(config: TrainConfig, device: torch.device) -> Prepared:
    """Base model mapped, its quantised weights on `device`, adapter injected, everything that is not trained frozen."""
    dtype = DTYPES[config.run.precision]
    path, kind, quant = config.model.load_model, config.adapter.kind, config.model.quant
    if kind == "none" and quant != "none":
        raise UserError(f"--quant {quant} with --peft none: only frozen weights are quantised, and none is; remove one")
    if not path:
        if kind != "none":
            raise UserError("--load_model is empty: an adapter needs a base model; --peft none trains one from scratch")
        arch, base = architecture_from_scratch(config.model), {}
        op, kernel = select_op(config.model.op, device, f"wkv{arch.version}", arch.head_size, dtype)
        model = build(arch, op=op, dtype=dtype)
        init_from_scratch(model, config.run.random_seed)
        dtypes = dict.fromkeys(model.state_dict(), torch.bfloat16)
    else:
        arch, base = checkpoints.load_base(path)
        arch.check(config.model, path)
        op, kernel = select_op(config.model.op, device, f"wkv{arch.version}", arch.head_size, dtype)
        with torch.device("meta"):
            model = build(arch, op=op, dtype=dtype)
        load_base_into(model, base, source=path, quant=quant, device=device)
        dtypes = {key: tensor.dtype for key, tensor in base.items()}
    metadata = {
        "format": 1,
        "kind": kind,
        "quant": quant,
        "base": checkpoints.fingerprint(base) if base else None,
        "architecture": arch.to_dict(),
        "config": asdict(config),
        "rwkv_bone": rwkv_bone.__version__,
    }
    if kind == "none":
        unused = model.unused_keys()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in unused)
        # Unused tensors are written back with the others, and must not be rounded.
        return Prepared(model, arch, kernel, None, Output(tuple(dtypes), metadata, dtypes), torch.float32)
    injection = inject(
        model,
        settings=settings_of(config.adapter),
        targets=config.adapter.targets or None,
        train_parts=config.adapter.train_parts,
    )
    if config.adapter.peft_load:
        loaded = load_adapter_file(model, config.adapter.peft_load, injection, base=metadata["base"])
        trained_on = loaded.metadata.get("quant", "none") if loaded.metadata else quant
        if trained_on != quant:
            # It has learnt to make up for the errors of those weights.
            raise UserError(
                f"--peft_load {config.adapter.peft_load} was trained with --quant {trained_on}, this run has --quant "
                f"{quant}: give --quant {trained_on}"
            )
    output = Output(tuple(adapter_keys(model)), metadata | injection.metadata())
    return Prepared(model, arch, kernel, injection, output, dtype)


def load_data(config: TrainConfig, vocab_size: int) -> tuple[Dataset, Dataset | None]:
    """The training data, and what --eval_split takes out of it (whole samples, whatever the training batches are)."""
    data, share = config.data, config.data.eval_split
    dataset = load_dataset(data, vocab_size)
    if not share:
        return dataset, None
    whole = load_dataset(replace(data, dataload="pad"), vocab_size) if dataset.windows else dataset
    # Both sides agree, since a sample's side follows from its group alone.
    train, _ = split_heldout(dataset.groups, share, config.run.random_seed)
    _, held = split_heldout(whole.groups, share, config.run.random_seed)
    return dataset.subset(train), whole.subset(held)


def prepare_heldout(
    config: TrainConfig, arch: Architecture, split: Dataset | None, folder: Path, say
) -> HeldOut | None:
    """The measurement before and after, or None (said aloud) without held-out data."""
    data, path = config.data, config.data.eval_data
    if split is None and not path:
        say("held-out  none (no --eval_data or --eval_split): the training loss is all there will be to see")
        return None
    # Held-out rows are read whole whatever the training batches are.
    dataset = split or load_dataset(replace(data, dataload="pad"), arch.vocab_size, path)
    source = f"--eval_split {data.eval_split:g} of the training data" if split else dataset.lines()[0]
    say(f"held-out  {source}; {len(dataset):,} samples")
    pairs, tokenizer, limit = [], None, config.run.eval_samples
    if limit:
        tokenizer = load_tokenizer(data.tokenizer, arch.vocab_size)
        pairs = split.pairs(tokenizer, limit) if split else load_pairs(data, path, tokenizer, limit)
    return HeldOut(
        dataset,
        pairs,
        tokenizer,
        micro_bsz=config.data.micro_bsz,
        chunk=config.model.chunk_ctx,
        path=folder / project.EVALUATION,
        again=config.run.resume,
        say=say,
    )


def wandb_logger(config: TrainConfig, folder: Path, say):
    """Lightning's Weights & Biases logger, or False with a line that says why not."""
    if not config.run.wandb:
        return False
    if importlib.util.find_spec("wandb") is None:
        say(f"wandb     not installed, so nothing is sent; {folder / project.LOG} has everything")
        return False
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(project=config.run.wandb, save_dir=folder)


def count(model: torch.nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def header(config: TrainConfig, prepared: Prepared, device: str, dataset, module: TrainingModule):
    """What was found and what will be done, one fact a line."""
    run, plan = config.run, module.plan
    offload = ", optimiser on the CPU" if offloads(run.strategy) else ""
    yield f"model     {config.model.load_model or 'from scratch'}: {prepared.arch.describe()}"
    stage = f"DeepSpeed ZeRO stage {zero_stage(run.strategy)}{offload}"
    yield f"device    {describe_devices(device, plan.world_size)}; {stage}, {run.precision}"
    yield f"kernel    {prepared.kernel}"
    if config.model.quant != "none":
        yield f"quant     {describe(prepared.model, DTYPES[run.precision], device)}"
    if prepared.injection:
        for line in prepared.injection.summary_lines():
            yield f"adapter   {line}"
    else:
        trained, total = count(prepared.model, trained=True), count(prepared.model)
        yield f"trained   every weight: {trained:,} of {total:,} parameters"
        size = trained * resume.BYTES_PER_PARAMETER / 2**30
        yield f"          each save also replaces {project.STATE}, for --resume: {size:,.1f} GB"
    for line in [*dataset.lines(), *plan.lines()]:
        yield f"data      {line}"
    batch = f"{plan.budget:,} tokens" if plan.pack else f"{plan.micro_bsz} samples"
    yield (
        f"steps     {module.total_steps:,} optimiser steps in {module.epochs} epochs; a step is {batch} x "
        f"{plan.accumulate} forward passes x {plan.world_size} devices"
    )
    if config.model.chunk_ctx:
        cut = config.model.bptt_chunks
        gradient = f"cut after every {cut} (--bptt_chunks)" if cut else "exact"
        yield f"context   sequences run in chunks of {config.model.chunk_ctx} tokens; gradient {gradient}"


def footer(config: TrainConfig, folder: Path, trained: Path):
    """Where the results are and what to type next."""
    yield f"\nresults   {trained}, {folder / project.LOG}, {folder / project.PLOT}"
    if config.adapter.kind == "none":
        return
    merge = ["--base_model", config.model.load_model, "--peft_checkpoint", str(trained)]
    yield f"next      {program('merge.py', *merge, '--output', str(folder / 'merged.pth'))}"


def program(name: str, *arguments: str) -> str:
    """What runs another program of this repository, to type."""
    return shlex.join([from_here(sys.executable), from_here(Path(sys.argv[0]).with_name(name)), *arguments])


def from_here(path: str | Path) -> str:
    """A path as one would type it: relative if it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative
