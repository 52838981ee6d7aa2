"""Continuing a run where its last saved step left it, on any number of devices and at any ZeRO stage.

Batches, learning rate and dropout are pure functions of the step. So the state (see `resume_file`) is all that is
needed; here it is decided whether a run continues what its folder holds, and checked that it goes on with the base, the
data and the settings that it began with, but for those that --resume_with names.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rwkv_bone import checkpoints
from rwkv_bone.config import DataConfig, PreferenceConfig, TrainConfig
from rwkv_bone.config.changes import DATA, FREE, ON_PURPOSE
from rwkv_bone.config.fields import worded
from rwkv_bone.config.layers import shown
from rwkv_bone.config.preferences import decided
from rwkv_bone.config.saved import from_json, shaping
from rwkv_bone.console import counted
from rwkv_bone.data import BatchPlan
from rwkv_bone.data.fingerprint import of_this_format
from rwkv_bone.errors import JSON_ERRORS, UserError
from rwkv_bone.training import project
from rwkv_bone.training.evaluation import text_of
from rwkv_bone.training.resume_file import check, is_moment, layout, read_newest
from rwkv_bone.training.schedule import learning_rate

# What there is to do beside continuing a run.
ELSEWHERE = "another --proj_dir begins a new run, --overwrite 1 replaces this one"


@dataclass(frozen=True)
class Saved:
    """What an earlier process saved of this run."""

    path: Path  # the state
    step: int  # optimiser steps taken
    trained: Path | None  # the newest file of trained parameters, if there was one
    config: TrainConfig  # of files it has the names, without folders
    metadata: dict
    measured: str | None = None  # what its `evaluation.json` holds
    remarks: tuple[str, ...] = ()  # on the reading of it

    @classmethod
    def find(cls, config: TrainConfig) -> Saved | None:
        """What this run continues of what `proj_dir` holds; None if it begins there. Only reads.

        UserError if what is there must be kept: a run of other settings, results without a state to continue from, or
        any results with --resume never. And if there is no state where --resume 1 or --resume_with asks for one.
        """
        run, folder = config.run, Path(config.run.proj_dir)
        if run.resume == "1" and run.overwrite:
            raise UserError("--resume 1 continues the run in proj_dir and --overwrite replaces it: give one of them")
        if run.overwrite or run.resume in project.NEVER:
            project.check_results(folder, config)
            return None
        # A power cut leaves empty files, which are none.
        if any(path.is_file() and path.stat().st_size for path in (folder / name for name in project.STATES)):
            found = read_newest(folder)
            assert found
            saved = cls.of(found.path, found.metadata, text_of(folder / project.EVALUATION), found.notes)
            saved.check_settings(config)
            return saved
        kept = project.kept(folder)
        if (folder / project.BEGUN).exists() and not run.resume_with and run.resume != "1":
            kept = []  # a run has made them that was cut off before its first state, and makes them again
        if asking := "--resume 1" if run.resume == "1" else "--resume_with" if run.resume_with else "":
            there = f"without {asking} a run begins there"
            if kept:
                there = f"only {kept[-1].name}, to {_start_from(kept[-1])}"
            raise UserError(f"{asking}: {folder} has no {project.RESUME_FILE}, so there is no run to continue: {there}")
        if kept:
            raise UserError(
                f"--proj_dir {folder} holds the results of an earlier run ({kept[-1].name}) and no "
                f"{project.RESUME_FILE} to continue it from. They are kept: in another --proj_dir you can "
                f"{_start_from(kept[-1])}; --overwrite 1 replaces them"
            )
        project.check_results(folder, config)
        return None

    @classmethod
    def of(cls, path: Path, metadata: dict, measured: str | None = None, remarks: Sequence[str] = ()) -> Saved:
        """The same, of a state whose metadata was read."""
        then = _shaping(from_json(json.dumps(metadata["config"]), str(path)))
        trained = path.parent / metadata["trained"] if metadata["trained"] else None
        return cls(path, metadata["step"], trained, then, metadata, measured, tuple(remarks))

    def check_settings(self, now: TrainConfig) -> None:
        """UserError if `now` differs from the saved settings in what the steps depend on, and is not named."""
        named, folder = now.run.resume_with, self.path.parent
        differ = {name: change for name, change in self._changes(now).items() if name not in named}
        if differ:
            words = [f"--{name} was {old} and is now {new}" for name, (old, new) in differ.items()]
            raise UserError(
                f"--proj_dir {folder} holds a run of other settings: {'; '.join(words)}. Nothing there was changed. "
                f"The same settings again continue it (`--resume 1 --proj_dir {folder}` alone takes them all); "
                f"{_with(differ, named)}{ELSEWHERE}"
            )
        old, new = Cut.of(self.config), Cut.of(now)
        if not old.same_samples(new, now.data.dataload):
            keep = {"get": "change none of them", "pack": "keep micro_bsz, and devices x forward passes"}
            raise UserError(
                f"--proj_dir {folder} holds a run in which a step was {old}; now it is {new}, which are not the same "
                f"samples: with --dataload {now.data.dataload} {keep.get(now.data.dataload, 'keep their product')}; or "
                f"{ELSEWHERE}"
            )

    def check(self, metadata: Mapping, now: TrainConfig) -> None:
        """UserError unless base and data are those of the saved run. metadata: what this run will write."""
        mine, theirs = self.metadata, json.loads(json.dumps(dict(metadata)))
        then, now_files = self.config, _shaping(now)
        other_data = self._other_data(theirs) and not DATA & set(now.run.resume_with)
        told = []
        if mine["architecture"] != theirs["architecture"]:
            names = mine["architecture"].keys() | theirs["architecture"].keys()
            pairs = {name: (mine["architecture"].get(name), theirs["architecture"].get(name)) for name in sorted(names)}
            sizes = [f"{name} was {old} and is now {new}" for name, (old, new) in pairs.items() if old != new]
            told.append(f"the model has another architecture: {', '.join(sizes)}")
        elif mine["base"] != theirs["base"]:
            files = f"{then.model.load_model or 'none'}, now {now_files.model.load_model or 'none'}"
            told.append(f"--load_model holds other weights ({files}; fingerprint {mine['base']}, now {theirs['base']})")
        if other_data:
            files = f"{shown(then.data.data_file)}, now {shown(now_files.data.data_file)}"
            told.append(f"--data_file holds other samples ({files}; fingerprint {mine['data']}, now {theirs['data']})")
        if told:
            folder = self.path.parent
            mended = "--resume_with data_file goes on with these samples; " if other_data and len(told) == 1 else ""
            raise UserError(
                f"{'; '.join(told)}: not what the run in {folder} began with. Nothing there was changed. Give the same "
                f"as then to continue it; {mended}{ELSEWHERE}"
            )

    def notes(self, now: TrainConfig, plan: BatchPlan, threads: int, metadata: Mapping) -> Iterator[str]:
        """Where the run goes on and what is different this time, one fact a line.

        threads: of a process; metadata: what this run will write.
        """
        then, run, folder = self.config, now.run, self.path.parent
        total_steps = plan.total_steps(run.epoch_count)
        if self.step >= total_steps:
            yield f"the run in {folder} is complete: {self.step} of {counted(total_steps, 'optimiser step')}"
        else:
            yield f"continues the run in {folder} after step {self.step} of {total_steps}, from {self.path.name}"
        yield from self.remarks
        yield from self._named(now, metadata)
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
        yield from self._schedule(now, plan)

    def load_parameters(self, model: nn.Module, keys: tuple[str, ...]) -> None:
        """Give a model that is not placed yet the saved values, mapped. keys: those of its trained part."""
        parameters, state = dict(model.named_parameters()), checkpoints.read_state(self.path)
        check(state, layout({key: parameters[key] for key in keys}), self.path)
        for key in keys:
            parameters[key].data = state[key]

    def record(self, now: TrainConfig, metadata: Mapping) -> None:
        """Have the state say with which settings and data the run goes on, where they are others than it says.

        So the next start need not be told again. metadata: what this run will write.
        """
        if self._changes(now) or self._other_data(metadata):
            state = checkpoints.read_state(self.path)
            with checkpoints.atomic_path(self.path, overwrite=True) as temporary:
                checkpoints.save_tensors(temporary, state, {**self.metadata, **metadata})

    def mend(self, path: Path, dtypes: Mapping[str, torch.dtype], metadata: Mapping) -> bool:
        """Write the file of trained parameters that belongs to the state, unless it is there and in order.

        Returns whether it was written. dtypes: as `Output` has them; metadata: what this run will write.
        """
        if path.is_file():
            with contextlib.suppress(UserError, OSError, *JSON_ERRORS):
                checkpoints.read_state(path)
                json.loads(path.with_suffix(".json").read_bytes())
                return False
        state = {key: tensor for key, tensor in checkpoints.read_state(self.path).items() if not is_moment(key)}
        state = {key: tensor.to(dtypes.get(key, tensor.dtype)) for key, tensor in state.items()}
        about = {**metadata, **{name: self.metadata[name] for name in ("step", "threads") if name in self.metadata}}
        checkpoints.write_state(path, state, about, overwrite=True)
        return True

    def _changes(self, now: TrainConfig) -> dict[str, tuple[str, str]]:
        """{setting: (value then, value now)} of those that a run may not change unless they are named."""
        changes, now = {}, _shaping(now)
        for section in fields(now):
            earlier, current = getattr(self.config, section.name), getattr(now, section.name)
            if isinstance(earlier, PreferenceConfig) and now.data.task != "sft":
                earlier = decided(earlier, now.data.task)  # what was auto may be given as its number
            for spec in fields(current):
                old, new = getattr(earlier, spec.name), getattr(current, spec.name)
                if spec.metadata["auto"] is not None and worded(spec, new) == "auto":
                    continue  # it goes on with what the run has, or decides nothing of it
                if old != new and not self._may_differ(spec.name):
                    changes[spec.name] = (shown(old) or "empty", shown(new) or "empty")
        return changes

    def _may_differ(self, name: str) -> bool:
        if name == "chunk_ctx" and self.config.model.bptt_chunks:
            return False  # the chunks then decide where the gradient is cut
        return name in FREE

    def _other_data(self, metadata: Mapping) -> bool:
        """Whether the samples are others than those of the first steps, as far as that can be told."""
        return of_this_format(self.metadata["data"]) and self.metadata["data"] != metadata["data"]

    def _named(self, now: TrainConfig, metadata: Mapping) -> Iterator[str]:
        """A line on each setting of --resume_with: what it was and is, and from where on."""
        changes, begins = self._changes(now), f"from step {self.step + 1} on"
        for name in now.run.resume_with:
            if name in changes:
                yield f"--{name} {changes[name][0]} became {changes[name][1]}, {begins}"
            elif name not in DATA and name in ON_PURPOSE:
                yield f"--resume_with {name}: it has not changed"
        if DATA & set(now.run.resume_with):
            if self._other_data(metadata):
                yield f"--data_file holds other samples than before: {begins} the order is that of the new ones"
            else:
                yield "--resume_with data_file: the samples have not changed"

    def _schedule(self, now: TrainConfig, plan: BatchPlan) -> Iterator[str]:
        """What a run of another length, or with another schedule, does with the learning rate."""
        then, total = self.config, plan.total_steps(now.run.epoch_count)
        earlier = then.run.epoch_steps * then.run.epoch_count
        if not earlier:
            earlier = sum(plan.steps_in_pass(epoch) for epoch in range(then.run.epoch_count))
        before, after = learning_rate(self.step, earlier, then.optim), learning_rate(self.step, total, now.optim)
        if self.step >= total or (earlier == total and before == after):
            return
        old, new = then.run.epoch_count, now.run.epoch_count
        longer = f"--epoch_count {old} became {new}: " if old != new else ""
        ends = f"the schedule now ends at step {total}, so that " if earlier != total else ""
        yield f"{longer}{ends}the next learning rate is {after:.3g} instead of {before:.3g}"


@dataclass(frozen=True)
class Cut:
    """How the samples of an optimiser step are divided among devices, forward passes and rows."""

    devices: int
    accumulate: int
    micro_bsz: int

    @classmethod
    def of(cls, config: TrainConfig) -> Cut:
        run, rows = config.run, config.data.micro_bsz
        # With auto a step is made of rows of one sample, whatever goes through the model at once: `batch_size`.
        passes = run.accumulate_grad_batches * (1 if rows else DataConfig.micro_bsz)
        return cls(run.devices * run.num_nodes, passes, rows or 1)

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


def look(config: TrainConfig) -> dict[str, Any] | None:
    """`Saved.find` for the one process that reads proj_dir, in a form that the others can be sent: see `looked`."""
    saved = Saved.find(config)
    if saved is None:
        return None
    return {"name": saved.path.name, "metadata": saved.metadata, "measured": saved.measured, "remarks": saved.remarks}


def looked(found: dict[str, Any] | None, folder: Path) -> Saved | None:
    """What the main process has found in `folder`, on every rank."""
    if found is None:
        return None
    return Saved.of(folder / found["name"], found["metadata"], found["measured"], found["remarks"])


def _shaping(config: TrainConfig) -> TrainConfig:
    """The settings as a file of ours stores them: what only says where a run works is at its default."""
    return from_json(json.dumps(shaping(config)))


def _with(differ: Mapping[str, object], named: tuple[str, ...]) -> str:
    """How to go on with the settings that differ, or which of them no run can change; nothing if none can."""
    possible = [name for name in differ if name in ON_PURPOSE]
    if not possible:
        return ""
    fixed = [f"--{name}" for name in differ if name not in ON_PURPOSE]
    but = f" ({' and '.join(fixed)} cannot change in a run)" if fixed else ""
    return f"--resume_with {' '.join([*named, *possible])} goes on with the new values{but}; "


def _start_from(path: Path) -> str:
    """How a new run starts from a file of trained parameters."""
    try:
        whole = (checkpoints.read_metadata(path) or {}).get("kind") == "none"
    except UserError:
        whole = False
    return f"start a new run from {path} with {'--load_model' if whole else '--peft_load'}"
