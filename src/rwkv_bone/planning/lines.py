"""What a plan says, a fact a line, with the columns of a run's header (`training/report.py`)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rwkv_bone import run_lock
from rwkv_bone.config import TrainConfig
from rwkv_bone.console import counted
from rwkv_bone.data import BatchPlan
from rwkv_bone.data.lost import WARNING
from rwkv_bone.errors import UserError
from rwkv_bone.planning.steps import Timed
from rwkv_bone.planning.timing import positions_of_a_step
from rwkv_bone.training import guard
from rwkv_bone.training.measuring import Rhythm
from rwkv_bone.training.out_of_memory import Plan, advice, size_text
from rwkv_bone.training.progress import clock, seconds_text
from rwkv_bone.training.resume import Saved

INDENT = " " * 10  # the column of labels
# What each part of the memory is, in the order of their lines.
PARTS = {
    "weights": "what is frozen",
    "adapter": "what is trained, in fp32",
    "optimiser": "AdamW's moments of it",
    "gradients": "and what they are reduced in",
    "activations": "kept for backward, and worked in",
    "head": "logits",
    "framework": "Python, PyTorch and the other libraries",
    "slack": "gaps between tensors",
}


def memory_parts(memory: Plan, total: float | None) -> Iterator[str]:
    """What the run has in memory when it has the most. total: what the device has in all; None: unknown."""
    found = vars(memory.parts)
    assert found.keys() == PARTS.keys()
    where = "the GPU" if memory.run.device == "cuda" else "the CPU"
    each = f", for each of {memory.run.ranks} processes" if memory.run.ranks > 1 else ""
    of = "" if total is None else f", of {size_text(total)} in all"
    yield f"memory    {size_text(memory.parts.total)} on {where} when it has the most{each}{of}:"
    for name, what in PARTS.items():
        if found[name]:
            yield f"{INDENT}  {name:<12}{size_text(found[name]):>9}  {what}"


def too_large(memory: Plan, total: float | None) -> Iterator[str]:
    """Of a run that does not fit: why nothing is timed, and what to change."""
    refused = False
    try:
        guard.check(memory, total)
    except UserError:
        refused = True
    yield f"time      not measured, since the run does not fit{': it would be refused' if refused else ' now'}"
    first, *rest = advice(memory)
    yield f"change    {first}"
    yield from (f"{INDENT}{line}" for line in rest)


@dataclass(frozen=True)
class WholeRun:
    """What was timed, for the whole run. Seconds."""

    timed: Timed
    steps: int
    step: float
    speed: float  # positions a second, of all devices
    speed_of: str
    start: float
    rhythm: Rhythm | None  # of measurements while training; None without held-out data
    measurements: int  # while training
    measuring: float

    @classmethod
    def of(cls, config: TrainConfig, plan: BatchPlan, timed: Timed) -> WholeRun:
        steps, step = plan.total_steps(config.run.epoch_count), timed.steps.step(plan)
        when = timed.held.rhythm(config.run.eval_steps, steps, step) if timed.held else None
        count, measuring = timed.held.in_a_run(when, steps) if timed.held and when else (0, 0.0)
        speed, what = positions_of_a_step(plan) * plan.world_size / step, "tokens" if plan.pack else "positions"
        return cls(timed, steps, step, speed, what, timed.start + timed.steps.warm_up, when, count, measuring)

    @property
    def total(self) -> float:
        return self.start + self.timed.reference + self.steps * self.step + self.measuring


def time_taken(config: TrainConfig, run: WholeRun, unit: str = "sample") -> Iterator[str]:
    """Seconds of a step and of the whole run. unit: what a sample is called."""
    timed, held = run.timed, run.timed.held
    yield (
        f"time      {seconds_text(run.step)} a step, {run.speed:,.0f} {run.speed_of}/s: the median of "
        f"{_timed(timed.steps.steps)}, half of them within {timed.steps.spread:.0%}"
    )
    measuring = ""
    if held:
        parts = {"the loss": held.loss, "exact answers": held.answers, "samples": held.samples}
        listed = ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in parts.items() if seconds)
        yield f"measured  {listed} each time"
        if run.rhythm and run.rhythm.line:
            yield f"measured  {run.rhythm.line}"
        measuring = f", {clock(run.measuring)} for {counted(run.measurements + 2, 'measurement')}"
    if timed.reference:
        yield (
            f"reference {seconds_text(timed.reference)}, once before the first step: the log-probabilities of "
            f"{counted(timed.referred, unit)}{' and of held-out ones' if held else ''}, which are kept"
        )
        measuring = f", {clock(timed.reference)} for the reference{measuring}"
    train = f"{clock(run.steps * run.step)} for {counted(run.steps, 'step')}"
    yield f"time      {clock(run.total)} in all: {clock(run.start)} to start, {train}{measuring}"
    limit = 60 * config.run.max_minutes
    if limit and run.total > limit:
        done = max(limit - (run.total - run.steps * run.step), 0) / run.step
        yield f"{WARNING}--max_minutes {config.run.max_minutes:g} ends the run after about {done:,.0f} of its steps"


def folder_state(config: TrainConfig, steps: int) -> Iterator[str]:
    """What a start of this run would find in proj_dir, if there is anything. steps: of the whole run."""
    folder = Path(config.run.proj_dir)
    if (holder := run_lock.holder(folder)) is not None:
        yield f"{WARNING}a run is in progress in {folder} (process {holder.process.pid}, since {holder.since})"
    try:
        saved = Saved.find(config)
    except UserError as error:
        yield f"{WARNING}the run itself would be refused: {error}"
        return
    if saved is None:
        return
    if saved.step >= steps:
        yield f"resume    the run in {folder} is complete; the plan is of a run like it, from its beginning"
    else:
        left = counted(steps - saved.step, "step")
        yield f"resume    the run in {folder} has {left} left, after step {saved.step:,}; the plan is of the whole run"


def broken(line: str, columns: int) -> list[str]:
    """A line as lines of at most so many columns, broken between words, the later ones indented under the first."""
    if len(line) <= columns:
        return [line]
    indent = INDENT if line[:10].endswith(" ") else "  "
    made = textwrap.wrap(
        line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
    return made or [line]


def _timed(steps: float) -> str:
    return f"{steps:.0f} timed steps" if steps >= 2 else "one timed step" if steps >= 1 else "parts of a step"
