"""From a config to what a run trains on: the model with its adapter, and the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rwkv_bone
from rwkv_bone import checkpoints
from rwkv_bone.adapters import Injection, adapter_keys, inject, load_adapter_file, settings_of
from rwkv_bone.checkpoints import Architecture
from rwkv_bone.cluster.world import SAME_FILES, World
from rwkv_bone.config import DataConfig, OptimConfig, TrainConfig, rates
from rwkv_bone.config.saved import shaping
from rwkv_bone.data import BatchPlan, Dataset, load_dataset
from rwkv_bone.data.split import split_heldout
from rwkv_bone.errors import UserError
from rwkv_bone.models import RWKV, architecture_from_scratch, build, init_from_scratch, load_base_into
from rwkv_bone.ops import regions, select_op
from rwkv_bone.training.reference import Start
from rwkv_bone.training.resume import Saved
from rwkv_bone.training.saving import Output
from rwkv_bone.training.schedule import check_schedule
from rwkv_bone.training.strategy import DTYPES


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be placed and trained, and how its trained part is written."""

    model: RWKV
    arch: Architecture
    label: str  # what the user calls the base model, and what was read
    folder: Path | None  # where the model's tokenizer and template may be
    kernel: str  # one sentence
    injection: Injection | None  # None: every weight is trained
    output: Output
    dtype: torch.dtype  # of the frozen base, once it is placed
    optim: OptimConfig  # with numbers for rates that are auto
    base_values: dict[str, Tensor] | None = None  # of the trained part without --peft_load, for --reference base


def prepare_model(config: TrainConfig, device: torch.device, continued: bool = False, empty: bool = False) -> Prepared:
    """Map the base model, inject the adapter, and freeze everything that is not trained.

    Tensors stay on the CPU until `place`; only quantised weights are put on `device` at once. continued: the values of
    the adapter come from a saved state, and not from --peft_load. empty: the model gets no memory and no values, and
    nothing is quantised or compiled: to be counted, not run.
    """
    kind, quant, dtype = config.adapter.kind, config.model.quant, DTYPES[config.run.precision]
    if kind == "none" and quant != "none":
        raise UserError(f"--quant {quant} with --peft none: only frozen weights are quantised, and none is; remove one")
    path = config.model.load_model
    arch, base, label, folder = _load_base(config)
    optim = rates.decided(config.optim, config.adapter, arch.n_embd, not path, config.data.task)
    config = replace(config, optim=optim)
    op, kernel = "torch", ""
    if not empty:
        op, kernel = select_op(config.model.op, device, f"wkv{arch.version}", arch.head_size, dtype)
        kernel += regions.obstacle(op, device.type, dtype, arch.head_size)
    if base or empty:
        with torch.device("meta"):
            model = build(arch, op=op, dtype=dtype)
            if empty and any(checkpoints.param_part(key) == "state" for key in base):
                model.add_time_state()
    else:
        model = build(arch, op=op, dtype=dtype)
        init_from_scratch(model, config.run.random_seed)
    if base and empty:
        checkpoints.match_keys(model.state_dict(), base, path)
    elif base:
        load_base_into(model, base, source=path, quant=quant, device=device)
    dtypes = {key: tensor.dtype for key, tensor in base.items()} or dict.fromkeys(model.state_dict(), torch.bfloat16)
    metadata: dict[str, Any] = {
        "format": 1,
        "kind": kind,
        "quant": quant,
        "base": checkpoints.fingerprint(base) if base else None,
        "architecture": arch.to_dict(),
        "config": shaping(config),
        "rwkv_bone": rwkv_bone.__version__,
    }
    if kind == "none":
        unused = model.unused_keys()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in unused)
        # fp32: unused tensors are written back with the others, and must not be rounded.
        return Prepared(
            model, arch, label, folder, kernel, None, Output(tuple(dtypes), metadata, dtypes), torch.float32, optim
        )
    injection = inject(
        model,
        settings=settings_of(config.adapter),
        targets=config.adapter.targets or None,
        train_parts=config.adapter.train_parts,
    )
    keys = tuple(adapter_keys(model))
    base_values = None
    if config.preference.reference == "base" and not empty:
        base_values = {key: model.get_parameter(key).detach().clone() for key in keys}
    if not (continued or empty):  # a continued run has the values that became of those in the file
        load_started(config, model, injection, metadata["base"])
    output = Output(keys, metadata | injection.metadata())
    return Prepared(model, arch, label, folder, kernel, injection, output, dtype, optim, base_values)


def _load_base(config: TrainConfig) -> tuple[Architecture, dict[str, Tensor], str, Path | None]:
    """The base model's architecture, its tensors, mapped, its name for the header, and its folder.

    There are no tensors for a model that is trained from scratch.
    """
    path = config.model.load_model
    if path:
        base = checkpoints.load_base(path)
        base.arch.check(config.model, path)
        return base.arch, base.state, base.label(path), base.folder
    if config.adapter.kind != "none":
        raise UserError("--load_model is empty: an adapter needs a base model; --peft none trains one from scratch")
    return architecture_from_scratch(config.model), {}, "from scratch", None


def load_started(config: TrainConfig, model: RWKV, injection: Injection, base: str) -> None:
    """Fill the adapter from --peft_load, if that is given. base: the fingerprint of the base model."""
    path, quant = config.adapter.peft_load, config.model.quant
    if path:
        adapter = load_adapter_file(model, path, injection, base=base, base_file=config.model.load_model)
        metadata = adapter.metadata
        trained_on = metadata.get("quant", "none") if metadata else quant
        if trained_on != quant:
            # The adapter has learnt to make up for the errors of those weights.
            raise UserError(
                f"--peft_load {path} was trained with --quant {trained_on}, this run has --quant {quant}: give --quant "
                f"{trained_on}"
            )


def reference_start(config: TrainConfig, prepared: Prepared, earlier: Saved | None, main: bool) -> Start:
    """The model that dpo and kto compare with. To be called before a continued run loads its saved values.

    main: this is the process that knows its values.
    """
    model, keys, path = prepared.model, prepared.output.keys, config.adapter.peft_load
    if config.preference.reference == "base":
        return Start("base", prepared.base_values)
    if earlier is None:
        return Start(_start_name(config, prepared))
    recorded = str(earlier.metadata.get("start"))
    if not main:
        return Start(recorded)
    try:
        if prepared.injection:
            load_started(config, model, prepared.injection, prepared.output.metadata["base"])
    except UserError as error:
        return Start(recorded, obstacle=str(error))
    if _start_name(config, prepared) != recorded:
        return Start(recorded, obstacle=f"--peft_load {path} holds other values than when the run began")
    # What loads the saved values, and places the model, leaves these tensors as they are.
    return Start(recorded, {key: model.get_parameter(key).data for key in keys})


def _start_name(config: TrainConfig, prepared: Prepared) -> str:
    """What the trained part of a run that begins now holds: a new adapter changes nothing of the base."""
    if config.adapter.peft_load:
        return checkpoints.fingerprint({key: prepared.model.get_parameter(key) for key in prepared.output.keys})
    return "base" if config.model.load_model else f"seed {config.run.random_seed}"


def count_parameters(model: nn.Module, trained_only: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained_only)


def load_data(
    config: TrainConfig, vocab_size: int, typed: DataConfig, keep: bool = True
) -> tuple[Dataset, Dataset | None]:
    """The training data, and the held-out samples that --eval_split takes out of it (None without --eval_split).

    Held-out samples are whole, whatever the training batches are. typed: the settings without those of the model's
    folder. keep: as `load_dataset` takes it.
    """
    data, share = config.data, config.data.eval_split
    dataset = load_dataset(data, vocab_size, typed=typed, keep=keep)
    if not share:
        return dataset, None
    pad = replace(data, dataload="pad")
    whole = load_dataset(pad, vocab_size, typed=typed, keep=keep) if dataset.windows else dataset
    # The two splits agree, since a sample's side follows from its group alone.
    train, _ = split_heldout(dataset.groups, share, config.run.random_seed)
    _, held = split_heldout(whole.groups, share, config.run.random_seed)
    # What was lost and changed is said once, with the training data, where that is the same dataset.
    return dataset.subset(train), whole.subset(held, notes=whole is not dataset)


def plan_batches(config: TrainConfig, dataset: Dataset, unit: int | None = None) -> BatchPlan:
    """Which samples each optimiser step reads; UserError if the warm-up leaves none of the steps.

    unit: as `BatchPlan` takes it.
    """
    plan = BatchPlan(
        dataset,
        micro_bsz=config.data.micro_bsz,
        accumulate=config.run.accumulate_grad_batches,
        world_size=_world_size(config),
        seed=config.run.random_seed,
        steps_per_epoch=config.run.epoch_steps or None,
        pack=config.data.dataload == "pack",
        unit=unit,
    )
    check_schedule(plan.total_steps(config.run.epoch_count), config.optim)
    return plan


def agree_on_files(world: World, config: TrainConfig, model: nn.Module, metadata: dict[str, Any]) -> None:
    """UserError, on every machine, if their files of base, adapter or training data are not the same.

    metadata: of `Output.with_data`.
    """
    world.agree("--load_model", str(metadata["base"]), SAME_FILES)
    if config.adapter.peft_load:
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        world.agree("--peft_load", checkpoints.fingerprint(trained), SAME_FILES)
    world.agree("--data_file", metadata["data"], SAME_FILES)


def _world_size(config: TrainConfig) -> int:
    return config.run.devices * config.run.num_nodes
