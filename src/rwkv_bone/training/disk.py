"""What a run will write and how much room that takes, said before it begins."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rwkv_bone.config import RunConfig
from rwkv_bone.console import counted
from rwkv_bone.data import BatchPlan
from rwkv_bone.data.lost import WARNING
from rwkv_bone.training import project
from rwkv_bone.training.resume_file import layout

if TYPE_CHECKING:
    from rwkv_bone.models import RWKV
    from rwkv_bone.training.saving import Output

KB, MB, GB = 2**10, 2**20, 2**30


def unused_saves(run: RunConfig, total_steps: int) -> Iterator[str]:
    """A sentence on each setting that asks for saves which a run of so many steps never reaches."""
    if run.save_steps >= total_steps:
        yield f"--save_steps {run.save_steps} saves nothing: the whole run has {counted(total_steps, 'optimiser step')}"
    if run.epoch_save > run.epoch_count:
        yield f"--epoch_save {run.epoch_save} saves the end alone: the run has {counted(run.epoch_count, 'epoch')}"


def saves_of(run: RunConfig, plan: BatchPlan, first: int) -> int:
    """How many times a run saves its trained parameters after its step `first`, if nothing stops it."""
    ends = list(accumulate(plan.steps_in(epoch) for epoch in range(run.epoch_count)))
    total = ends[-1]
    at = {end for epoch, end in enumerate(ends, 1) if end == total or epoch % run.epoch_save == 0}
    at = {end for end in at if end > first}
    between = total // run.save_steps - first // run.save_steps if run.save_steps else 0
    return len(at) + max(0, between) - sum(end % run.save_steps == 0 for end in at if run.save_steps)


def saving_lines(run: RunConfig, plan: BatchPlan, model: RWKV, output: Output, what: str, first: int) -> Iterator[str]:
    """What a run that begins after step `first` will write, a fact a line, and a warning if there is no room for it.

    The lines are those of the header, with its columns. what: that which `output` is, such as "adapter".
    """
    parameters = dict(model.named_parameters())
    parameters = {key: parameters[key] for key in output.keys}
    shapes = layout(parameters)
    state = sum(4 * tensor.numel() for tensor in shapes.values())
    each = sum(shapes[key].numel() * output.dtypes.get(key, torch.float32).itemsize for key in output.keys)
    count = saves_of(run, plan, first)
    if not run.save_state:
        yield f"saving    no {project.RESUME_FILE} (--save_state 0): a run that ends early cannot be continued"
    elif run.save_minutes:
        minutes = f"{run.save_minutes:g} minutes" if run.save_minutes != 1 else "minute"
        rarely = f"every {minutes}, or more rarely where that takes more than 2 % of the time"
        yield f"saving    {project.RESUME_FILE} {rarely}: 2 x {size(state)}"
    else:
        yield f"saving    {project.RESUME_FILE} with each {what} alone (--save_minutes 0): 2 x {size(state)}"
    stay = f", of which the newest {run.keep} stay (--keep)" if 0 < run.keep < count else ""
    folder = Path(run.proj_dir)
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
    yield f"saving    {counted(count, what)} of {size(each)}{stay}; {size(free)} are free"
    needed = each * (min(count, run.keep + 1) if run.keep else count)
    if run.save_state:
        # The third is the one that is being written.
        there = [folder / name for name in (project.RESUME_FILE, project.PREVIOUS_FILE)]
        needed += max(0, 3 * state - sum(path.stat().st_size for path in there if path.is_file()))
    if run.plan:
        yield f"saving    {size(needed)} at most at a time, with the state that is being written"
    if needed > free:
        yield (
            f"{WARNING}the disk of {folder} has {size(free)} free, and what this run writes takes {size(needed)}: make "
            "room, or save less (--keep, --epoch_save, --save_steps, --save_state 0)"
        )


def size(number: int) -> str:
    """Bytes as one says them."""
    if number >= GB:
        return f"{number / GB:,.1f} GB"
    return f"{number / MB:,.0f} MB" if number >= MB else f"{number / KB:,.0f} KB"
