"""Continuing a run where its last saved step left it, on as many devices and at whatever ZeRO stage.

`proj_dir/resume.pth` holds of every trained parameter, whole and in fp32, its value under its own name and AdamW's
moments under `NAME.exp_avg` and `NAME.exp_avg_sq`; as metadata the step, the configuration and fingerprints of base and
data. Nothing else is needed: batches, learning rate and dropout are pure functions of the step.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import Tensor, nn

from rwkv_bone import checkpoints
from rwkv_bone.checkpoints import METADATA_RECORD, atomic_path
from rwkv_bone.checkpoints.stream import write_tensors
from rwkv_bone.config import TrainConfig
from rwkv_bone.config.saved import from_json
from rwkv_bone.data import BatchPlan
from rwkv_bone.errors import UserError
from rwkv_bone.training import project
from rwkv_bone.training.gather import whole, whole_shape
from rwkv_bone.training.schedule import learning_rate

MOMENTS = ("exp_avg", "exp_avg_sq")
BYTES_PER_PARAMETER = 12
# Settings that may differ from those of the run that is continued. They change no number beyond rounding,
EQUIVALENT = {"op", "chunk_ctx", "grad_cp", "accelerator", "strategy"}
# or only what is written, measured and shown, and how long,
AROUND = {"proj_dir", "overwrite", "resume", "cache_dir", "wandb", "eval_data", "eval_samples"}
AROUND |= {"epoch_begin", "epoch_count", "epoch_save", "save_steps"}
# or something else is compared in their place: fingerprints, the architecture, the samples of a step.
COMPARED = {"load_model", "n_layer", "n_embd", "dim_ffn", "vocab_size", "head_size", "my_testing", "data_file"}
COMPARED |= {"devices", "num_nodes", "accumulate_grad_batches", "micro_bsz"}
FREE = EQUIVALENT | AROUND | COMPARED


@dataclass(frozen=True)
class Saved:
    """The state of a run after `step` optimiser steps, and the file `trained` that was saved with it."""

    path: Path
    step: int
    trained: Path
    config: TrainConfig
    metadata: dict

    @classmethod
    def find(cls, config: TrainConfig) -> Saved:
        """The state in `proj_dir`; UserError if there is none, or if it is of a run with other settings."""
        folder = Path(config.run.proj_dir)
        path = folder / project.STATE
        if config.run.overwrite:
            raise UserError("--resume continues the run in proj_dir and --overwrite replaces it: give one of them")
        if not path.is_file():
            raise UserError(
                f"--resume: {folder} has no {project.STATE}, so there is no run to continue: {_found(folder)}"
            )
        metadata = checkpoints.read_metadata(path)
        if not metadata or "trained" not in metadata:
            raise UserError(f"--resume: {path} is not the state of a run of this program")
        then = from_json(json.dumps(metadata["config"]), str(path))
        saved = cls(path, metadata["step"], folder / metadata["trained"], then, metadata)
        saved._check_settings(config)
        return saved

    def check(self, metadata: Mapping) -> None:
        """UserError unless base and data are those of the run; `metadata` as a new run would write it."""
        mine, theirs = self.metadata, json.loads(json.dumps(dict(metadata)))
        for key, what in (
            ("architecture", "the model has another architecture"),
            ("base", "--load_model holds other weights"),
            ("data", "--data_file holds other samples"),
        ):
            if mine[key] != theirs[key]:
                raise UserError(
                    f"--resume: {what} than the run in {self.path.parent} had ({key} {mine[key]}, now {theirs[key]}); "
                    "give the same as then, or start a new run in another --proj_dir"
                )

    def notes(self, now: TrainConfig, plan: BatchPlan) -> Iterator[str]:
        """What is continued and what is different this time, one fact a line."""
        then, run = self.config, now.run
        earlier_total, total_steps = (plan.total_steps(config.run.epoch_count) for config in (then, now))
        yield f"after step {self.step} of {total_steps}, from {self.path}"
        if Cut.of(then) != Cut.of(now):
            yield f"{Cut.of(then)} became {Cut.of(now)}: the same samples a step, equal up to rounding"
        if self.step < total_steps != earlier_total:
            rates = [learning_rate(self.step, steps, now.optim) for steps in (earlier_total, total_steps)]
            yield (
                f"--epoch_count {then.run.epoch_count} became {run.epoch_count}: the schedule now ends at step "
                f"{total_steps}, so that the next learning rate is {rates[1]:.3g} instead of {rates[0]:.3g}"
            )

    def load_parameters(self, model: nn.Module, keys: tuple[str, ...]) -> None:
        """Put the saved values, mapped, into a model that is not placed yet."""
        parameters, state = dict(model.named_parameters()), checkpoints.read_state(self.path)
        checkpoints.match_keys(_layout({key: parameters[key] for key in keys}), state, self.path)
        for key in keys:
            parameters[key].data = state[key]

    def _check_settings(self, now: TrainConfig) -> None:
        changed = []
        for section in fields(now):
            earlier, current = getattr(self.config, section.name), getattr(now, section.name)
            for spec in fields(current):
                old, new = getattr(earlier, spec.name), getattr(current, spec.name)
                if old != new and not self._may_differ(spec.name):
                    changed.append(f"--{spec.name} was {_shown(old)} and is now {_shown(new)}")
        if changed:
            raise UserError(
                f"--resume: {'; '.join(changed)}. A run goes on with the settings it began with: repeat those "
                f"(`--resume 1 --proj_dir {self.path.parent}` alone takes them all), or start a new run elsewhere"
            )
        old, new = Cut.of(self.config), Cut.of(now)
        if not old.same_samples(new, now.data.dataload):
            keep = {"get": "change none of them", "pack": "keep micro_bsz, and devices x forward passes"}
            raise UserError(
                f"--resume: a step was {old} and is now {new}, which are not the same samples: with --dataload "
                f"{now.data.dataload} {keep.get(now.data.dataload, 'keep their product')}"
            )

    def _may_differ(self, name: str) -> bool:
        if name == "chunk_ctx" and self.config.model.bptt_chunks:
            return False  # then the chunks say where the gradient is cut
        return name in FREE


class RestoreMoments(Callback):
    """Give the optimiser, once DeepSpeed has made it, the moments that it had."""

    def __init__(self, saved: Saved):
        self.saved = saved

    def on_train_start(self, trainer, module) -> None:
        trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
        restore_moments(trainer.model.optimizer, trained, checkpoints.read_state(self.saved.path), self.saved.step)


def restore_moments(zero, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], step: int) -> None:
    """Set AdamW's state of every parameter. `zero` is DeepSpeed's optimiser of stage 1 to 3 around it."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    partitioned = hasattr(next(iter(parameters.values())), "ds_id")
    flat_groups = zero.fp32_partitioned_groups_flat if partitioned else zero.single_partition_of_fp32_groups
    for flat in flat_groups:
        # As AdamW begins by itself, at its first step.
        count = torch.tensor(float(step), device=flat.device)
        zero.optimizer.state[flat] = {"step": count, **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
    _link_moments(zero)
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            value = state[f"{name}.{moment}"]
            if partitioned:
                # The function for whole values fails where a parameter does not divide evenly among the ranks.
                safe_set_local_optimizer_state(parameter, _part(value, parameter.ds_tensor.numel()), moment)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)


def _link_moments(zero) -> None:
    """Let parameters find their moments in the flat groups of stage 1 and 2.

    DeepSpeed does it once, after its first group's first step, when the moments of further groups do not exist yet.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if hasattr(zero, "single_partition_of_fp32_groups"):
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)


def _part(value: Tensor, size: int) -> Tensor:
    """This rank's `size` elements of a flattened parameter, zeros beyond its end."""
    part = value.reshape(-1)[dist.get_rank() * size :][:size]
    return nn.functional.pad(part, (0, size - part.numel()))


def write(path: Path, zero, parameters: Mapping[str, nn.Parameter], metadata: dict, keep: bool) -> str | None:
    """Replace the state at `path`, atomically, tensor by tensor. Every rank must call it; the one to `keep` it writes.

    Returns what went wrong on the disk, which is not raised here because the other ranks know nothing of it.
    """
    _link_moments(zero)
    tensors, problem = _tensors(parameters, keep), None
    if keep:
        try:
            with atomic_path(path, overwrite=True) as temporary:
                write_tensors(temporary, _layout(parameters), tensors)
                with zipfile.ZipFile(temporary, "a") as archive:
                    archive.writestr(f"archive/{METADATA_RECORD}", json.dumps(metadata))
        except (OSError, UserError) as error:
            problem = str(error)
    for _ in tensors:
        pass  # take part in the gathering that the writing rank asks for, also if its disk has failed
    return problem


def _tensors(parameters: Mapping[str, nn.Parameter], keep: bool) -> Iterator[tuple[str, Tensor | None]]:
    """(key, whole tensor on the CPU) as the file holds them. Every rank must exhaust it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    for name, parameter in parameters.items():
        with whole(parameter):
            value = parameter.detach().to("cpu", torch.float32, copy=True) if keep else None
        yield name, value
        for moment in MOMENTS if parameter.requires_grad else ():
            value = safe_get_full_optimizer_state(parameter, moment)
            yield f"{name}.{moment}", value.cpu() if keep else None


def _layout(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Keys and shapes of the file, without values."""
    layout = {}
    for name, parameter in parameters.items():
        layout[name] = torch.empty(whole_shape(parameter), device="meta")
        if parameter.requires_grad:
            layout |= {f"{name}.{moment}": layout[name] for moment in MOMENTS}
    return layout


@dataclass(frozen=True)
class Cut:
    """How the samples of an optimiser step are cut into devices, forward passes and rows."""

    devices: int
    accumulate: int
    micro_bsz: int

    @classmethod
    def of(cls, config: TrainConfig) -> Cut:
        run = config.run
        return cls(run.devices * run.num_nodes, run.accumulate_grad_batches, config.data.micro_bsz)

    def same_samples(self, other: Cut, dataload: str) -> bool:
        """Whether a step has the same samples either way."""
        if dataload == "get":
            return self == other  # each device draws its own, for each forward pass
        passes = self.devices * self.accumulate, other.devices * other.accumulate
        if dataload == "pack":
            return passes[0] == passes[1] and self.micro_bsz == other.micro_bsz  # a row is packed for its length
        return passes[0] * self.micro_bsz == passes[1] * other.micro_bsz

    def __str__(self) -> str:
        return f"{self.devices} devices x {self.accumulate} forward passes x micro_bsz {self.micro_bsz}"


def _shown(value) -> str:
    """A setting as one types it."""
    if isinstance(value, bool):
        return str(int(value))
    return (" ".join(value) if isinstance(value, tuple) else str(value)) or "empty"


def _found(folder: Path) -> str:
    """What there is instead of a state, and what to do."""
    adapters = sorted(folder.glob("rwkv-*.pth"), key=lambda path: path.stat().st_mtime)
    if adapters:
        return f"only {adapters[-1].name}, to start a new run from with --peft_load"
    return "a run there ended before its first save; begin again with --overwrite 1 (and see --save_steps)"
