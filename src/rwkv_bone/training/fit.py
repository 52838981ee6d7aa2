"""A training run from its config: the only place that sees all the pieces.

With several devices Lightning starts this program again for each of them, so everything here runs once per process;
only the main process prints and touches the results folder.
"""

from __future__ import annotations

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
from rwkv_bone import checkpoint, cli
from rwkv_bone.adapters import Injection, inject, load_adapter_file
from rwkv_bone.checkpoint import Architecture, atomic_path
from rwkv_bone.config import TrainConfig
from rwkv_bone.data import BatchPlan, load_dataset, load_pairs, load_tokenizer
from rwkv_bone.data.binidx import find_pair
from rwkv_bone.errors import UserError
from rwkv_bone.models import RWKV, architecture_from_scratch, build, init_from_scratch, load_base_into
from rwkv_bone.ops import select_op
from rwkv_bone.training import project
from rwkv_bone.training.callbacks import Progress, StepLog, draw_loss
from rwkv_bone.training.heldout import HeldOut
from rwkv_bone.training.module import RunStopped, TrainingModule
from rwkv_bone.training.saving import Output, SaveTrained
from rwkv_bone.training.schedule import check_schedule
from rwkv_bone.training.strategy import DTYPES, make_strategy, offloads, select_device, silence_libraries, zero_stage


@dataclass(frozen=True)
class Prepared:
    """A model ready to train, and how its trained part is written."""

    model: RWKV
    arch: Architecture
    kernel: str  # one sentence
    injection: Injection | None
    output: Output


def fit(config: TrainConfig) -> Path:
    """Train as `config` says and return the last file of trained parameters; UserError for what a user can mend."""
    silence_libraries()
    main = is_main_process()
    say = partial(print, flush=True) if main else lambda *_: None
    device = select_device(config.run.accelerator)
    folder = project.check_folder(config) if main else Path(config.run.proj_dir)
    seed_everything(config.run.random_seed, verbose=False)
    prepared = prepare_model(config, torch.device(device))
    dataset = load_dataset(config.data, prepared.arch.vocab_size)
    world_size = config.run.devices * config.run.num_nodes
    plan = BatchPlan(
        dataset,
        micro_bsz=config.data.micro_bsz,
        accumulate=config.run.accumulate_grad_batches,
        world_size=world_size,
        seed=config.run.random_seed,
        steps_per_epoch=config.run.epoch_steps or None,
    )
    check_schedule(config.run.epoch_count * plan.steps_per_epoch, config.optim)
    module = TrainingModule(prepared.model, plan, config.run.epoch_count, config.optim, config.model)
    for line in header(config, prepared, device, dataset, module):
        say(line)
    heldout = prepare_heldout(config, prepared.arch, folder, say)
    strategy = make_strategy(config.run, device, trainable=count(prepared.model, trained=True))
    logger = wandb_logger(config, folder, say)
    if main:
        project.clear_folder(folder)
        with atomic_path(folder / project.CONFIG, overwrite=True) as temporary:
            temporary.write_text(cli.to_json(config), encoding="utf-8")

    log = StepLog(folder / project.LOG)
    save = SaveTrained(
        prepared.output,
        folder,
        epoch_begin=config.run.epoch_begin,
        epoch_save=config.run.epoch_save,
        save_steps=config.run.save_steps,
        say=say,
    )
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=config.run.devices,
        num_nodes=config.run.num_nodes,
        strategy=strategy,
        max_epochs=1,  # the loader of TrainingModule holds all of ours
        accumulate_grad_batches=config.run.accumulate_grad_batches,
        gradient_clip_val=config.optim.grad_clip or None,  # handed to DeepSpeed, which does the clipping
        logger=logger,
        callbacks=[*([heldout] if heldout else []), log, Progress(log), save],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module)
    except RunStopped:
        if trainer.local_rank > 0:
            # Every rank stops for the same reason. The main process reports it; leaving with an error here would have
            # Lightning kill the main process before it has finished writing.
            raise SystemExit(0) from None
        raise
    except Exception:
        # The others would wait for this one in their next collective.
        trainer.strategy.launcher.kill(signal.SIGTERM)
        raise
    if main:
        with atomic_path(folder / project.PLOT, overwrite=True) as temporary:
            draw_loss(temporary, log.records, heldout and (heldout.before.loss, heldout.after.loss))
        for line in footer(config, folder, save.last_path):
            say(line)
    return save.last_path


def is_main_process() -> bool:
    """Whether this is the process that reports, also before Lightning has started the others."""
    return rank_zero_only.rank == 0 and LightningEnvironment().node_rank() == 0


def prepare_model(config: TrainConfig, device: torch.device) -> Prepared:
    """Base model in memory (or mapped), adapter injected, everything that is not trained frozen."""
    dtype = DTYPES[config.run.precision]
    path, kind = config.model.load_model, config.adapter.kind
    if not path:
        if kind != "none":
            raise UserError("--load_model is empty: an adapter needs a base model; --peft none trains one from scratch")
        arch, base = architecture_from_scratch(config.model), {}
        op, kernel = select_op(config.model.op, device, f"wkv{arch.version}")
        model = build(arch, op=op, dtype=dtype)
        init_from_scratch(model, config.run.random_seed)
        dtypes = dict.fromkeys(model.state_dict(), torch.bfloat16)
    else:
        arch, base = checkpoint.load_base(path)
        arch.check(config.model, path)
        op, kernel = select_op(config.model.op, device, f"wkv{arch.version}")
        with torch.device("meta"):
            model = build(arch, op=op, dtype=dtype)
        # What is trained is trained in fp32; a frozen base is kept in the dtype of the arithmetic.
        load_base_into(model, base, torch.float32 if kind == "none" else dtype, path)
        dtypes = {key: tensor.dtype for key, tensor in base.items()}
    metadata = {
        "format": 1,
        "kind": kind,
        "base": checkpoint.fingerprint(base) if base else None,
        "architecture": arch.to_dict(),
        "config": asdict(config),
        "rwkv_bone": rwkv_bone.__version__,
    }
    if kind == "none":
        unused = model.unused_keys()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in unused)
        return Prepared(model, arch, kernel, None, Output(tuple(dtypes), metadata, dtypes))
    injection = inject(
        model,
        kind=kind,
        r=config.adapter.bone_r,
        targets=config.adapter.targets or None,
        train_parts=config.adapter.train_parts,
    )
    with torch.no_grad():
        for key in injection.extra:
            # From the file's own values, not from their rounding to the arithmetic's dtype. An initial state is new.
            if key in base:
                model.get_parameter(key).copy_(base[key])
    if config.adapter.bone_load:
        load_adapter_file(model, config.adapter.bone_load, injection, base=metadata["base"])
    keys = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return Prepared(model, arch, kernel, injection, Output(keys, metadata | injection.metadata()))


def prepare_heldout(config: TrainConfig, arch: Architecture, folder: Path, say) -> HeldOut | None:
    """The measurement before and after, or None (said aloud) without --eval_data."""
    path = config.data.eval_data
    if not path:
        say("held-out  none (--eval_data is empty): the training loss is all there will be to see")
        return None
    # Held-out rows are read whole whatever the training batches are.
    dataset = load_dataset(replace(config.data, dataload="pad"), arch.vocab_size, path)
    say(f"held-out  {dataset.lines()[0]}; {len(dataset):,} samples")
    pairs, tokenizer = [], None
    if config.run.eval_samples and find_pair(Path(path)) is None:  # token ids alone have no prompts to answer
        tokenizer = load_tokenizer(config.data.tokenizer, arch.vocab_size)
        pairs = load_pairs(config.data, path, tokenizer)[: config.run.eval_samples]
    return HeldOut(
        dataset, pairs, tokenizer, micro_bsz=config.data.micro_bsz, path=folder / project.EVALUATION, say=say
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
    if device == "cuda":
        where = f"{plan.world_size} x {torch.cuda.get_device_name()}"
    else:
        where = f"CPU with {os.cpu_count()} cores, {plan.world_size} process{'es' * (plan.world_size > 1)}"
    offload = ", optimiser on the CPU" if offloads(run.strategy) else ""
    yield f"model     {config.model.load_model or 'from scratch'}: {prepared.arch.describe()}"
    stage = f"DeepSpeed ZeRO stage {zero_stage(run.strategy)}{offload}"
    yield f"device    {where}; {stage}, {run.precision}"
    yield f"kernel    {prepared.kernel}"
    if prepared.injection:
        for line in prepared.injection.lines():
            yield f"adapter   {line}"
    else:
        trained, total = count(prepared.model, trained=True), count(prepared.model)
        yield f"trained   every weight: {trained:,} of {total:,} parameters"
    for line in dataset.lines():
        yield f"data      {line}"
    yield (
        f"steps     {module.epochs} epochs of {plan.steps_per_epoch:,} optimiser steps; a step is {plan.micro_bsz} "
        f"samples x {plan.accumulate} forward passes x {plan.world_size} devices"
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
    merge = [from_here(sys.executable), from_here(Path(sys.argv[0]).with_name("merge.py"))]
    merge += ["--base_model", config.model.load_model, "--peft_checkpoint", str(trained)]
    yield f"next      {shlex.join([*merge, '--output', str(folder / 'merged.pth')])}"


def from_here(path: str | Path) -> str:
    """A path as one would type it: relative if it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative
