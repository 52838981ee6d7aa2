"""Continuing a run where its last saved step left it, on any number of devices and at any ZeRO stage.

Batches, learning rate and dropout are pure functions of the step. So `resume.pth` (see `resume_file`) is all that is
needed; here it is checked that the run goes on with the base, the data and the settings that it began with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from torch import nn

from rwkv_bone import checkpoints
from rwkv_bone.config import TrainConfig
from rwkv_bone.config.saved import from_json, shaping
from rwkv_bone.console import counted
from rwkv_bone.data import BatchPlan
from rwkv_bone.data.fingerprint import of_this_format
from rwkv_bone.errors import UserError
from rwkv_bone.training import project
from rwkv_bone.training.resume_file import check, layout
from rwkv_bone.training.schedule import learning_rate

# A continued run may change these settings. Those of the first group change no number beyond rounding.
EQUIVALENT = {"op", "chunk_ctx", "grad_cp", "compile", "accelerator", "strategy"}
# The second group changes only what is written, measured or shown, and how long the run is.
OUTSIDE_THE_STEPS = {"proj_dir", "overwrite", "resume", "cache_dir", "wandb", "eval_data", "eval_samples"}
OUTSIDE_THE_STEPS |= {"max_lost", "epoch_begin", "epoch_count", "epoch_save", "save_steps"}
# The third group is compared by its effects: fingerprints of base and data, architecture, samples of a step.
COMPARED = {"load_model", "n_layer", "n_embd", "dim_ffn", "vocab_size", "head_size", "my_testing", "data_file"}
COMPARED |= {"devices", "num_nodes", "accumulate_grad_batches", "micro_bsz"}
FREE = EQUIVALENT | OUTSIDE_THE_STEPS | COMPARED


@dataclass(frozen=True)
class Saved:
    """What an earlier process saved of this run."""

    path: Path  # the resume file
    step: int  # optimiser steps taken
    trained: Path  # the file of trained parameters that was saved with it
    config: TrainConfig  # of files it has the names, without folders
    metadata: dict

    @classmethod
    def find(cls, config: TrainConfig) -> Saved:
        """What is saved in `proj_dir`; UserError if nothing is, or if it is of a run with other settings."""
        folder = Path(config.run.proj_dir)
        path = folder / project.RESUME_FILE
        if config.run.overwrite:
            raise UserError("--resume continues the run in proj_dir and --overwrite replaces it: give one of them")
        if not path.is_file():
            raise UserError(
                f"--resume: {folder} has no {project.RESUME_FILE}, so there is no run to continue: {_found(folder)}"
            )
        metadata = checkpoints.read_metadata(path)
        metadata = metadata or {}
        kinds = {"trained": str, "step": int, "config": dict, "architecture": dict, "base": str | None, "data": str}
        if not all(name in metadata and isinstance(metadata[name], kind) for name, kind in kinds.items()):
            raise UserError(f"--resume: {path} is not the state of a run of this program")
        then = _shaping(from_json(json.dumps(metadata["config"]), str(path)))
        saved = cls(path, metadata["step"], folder / metadata["trained"], then, metadata)
        saved._check_settings(config)
        return saved

    def check(self, metadata: Mapping) -> None:
        """UserError unless base and data are those of the saved run. metadata: what this run will write."""
        mine, theirs = self.metadata, json.loads(json.dumps(dict(metadata)))
        for key, what in (
            ("architecture", "the model has another architecture"),
            ("base", "--load_model holds other weights"),
            ("data", "--data_file holds other samples"),
        ):
            if key == "data" and not of_this_format(mine[key]):
                continue  # said in `notes`
            if mine[key] != theirs[key]:
                raise UserError(
                    f"--resume: {what} than the run in {self.path.parent} had ({key} {mine[key]}, now {theirs[key]}); "
                    "give the same as then, or start a new run in another --proj_dir"
                )

    def notes(self, now: TrainConfig, plan: BatchPlan, threads: int) -> Iterator[str]:
        """Where the run goes on and what is different this time, one fact a line. threads: of a process."""
        then, run = self.config, now.run
        earlier_total, total_steps = (plan.total_steps(config.run.epoch_count) for config in (then, now))
        yield f"after step {self.step} of {total_steps}, from {self.path}"
        if not of_this_format(self.metadata["data"]):
            yield (
                "the data cannot be compared with that of the first steps, since another version began this run: see "
                "to it yourself that --data_file has not changed"
            )
        if Cut.of(then) != Cut.of(now):
            yield f"{Cut.of(then)} became {Cut.of(now)}: the same samples a step, equal up to rounding"
        before = self.metadata.get("threads", threads)
        if before != threads:
            same = f"OMP_NUM_THREADS={before} gives the same again"
            yield f"{counted(before, 'thread')} became {threads}: equal up to rounding ({same})"
        if self.step < total_steps != earlier_total:
            rates = [learning_rate(self.step, steps, now.optim) for steps in (earlier_total, total_steps)]
            yield (
                f"--epoch_count {then.run.epoch_count} became {run.epoch_count}: the schedule now ends at step "
                f"{total_steps}, so that the next learning rate is {rates[1]:.3g} instead of {rates[0]:.3g}"
            )

    def load_parameters(self, model: nn.Module, keys: tuple[str, ...]) -> None:
        """Give a model that is not placed yet the saved values, mapped. keys: those of its trained part."""
        parameters, state = dict(model.named_parameters()), checkpoints.read_state(self.path)
        check(state, layout({key: parameters[key] for key in keys}), self.path)
        for key in keys:
            parameters[key].data = state[key]

    def _check_settings(self, now: TrainConfig) -> None:
        """UserError if `now` differs from the saved settings in what the steps depend on."""
        changed, now = [], _shaping(now)
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
            return False  # the chunks then decide where the gradient is cut
        return name in FREE


@dataclass(frozen=True)
class Cut:
    """How the samples of an optimiser step are divided among devices, forward passes and rows."""

    devices: int
    accumulate: int
    micro_bsz: int

    @classmethod
    def of(cls, config: TrainConfig) -> Cut:
        run = config.run
        return cls(run.devices * run.num_nodes, run.accumulate_grad_batches, config.data.micro_bsz)

    def same_samples(self, other: Cut, dataload: str) -> bool:
        """Whether a step has the same samples with both."""
        if dataload == "get":
            return self == other  # each device draws its own samples for each forward pass
        passes = self.devices * self.accumulate, other.devices * other.accumulate
        if dataload == "pack":
            return passes[0] == passes[1] and self.micro_bsz == other.micro_bsz  # the length decides what a row holds
        return passes[0] * self.micro_bsz == passes[1] * other.micro_bsz

    def __str__(self) -> str:
        passes = counted(self.accumulate, "forward pass", "forward passes")
        return f"{counted(self.devices, 'device')} x {passes} x micro_bsz {self.micro_bsz}"


def _shaping(config: TrainConfig) -> TrainConfig:
    """The settings as a file of ours stores them: what only says where a run works is at its default."""
    return from_json(json.dumps(shaping(config)))


def _shown(value: object) -> str:
    """A setting as one types it."""
    if isinstance(value, bool):
        return str(int(value))
    return (" ".join(value) if isinstance(value, tuple) else str(value)) or "empty"


def _found(folder: Path) -> str:
    """What the folder holds instead of a resume file, and what to do."""
    adapters = sorted(folder.glob("rwkv-*.pth"), key=lambda path: path.stat().st_mtime)
    if adapters:
        return f"only {adapters[-1].name}, to start a new run from with --peft_load"
    return "a run there ended before its first save; begin again with --overwrite 1 (and see --save_steps)"
