"""When held-out data is measured while a run trains, and a run that ends early because nothing gets better."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer

from rwkv_bone.config import RunConfig
from rwkv_bone.config.sections import AUTO
from rwkv_bone.console import counted
from rwkv_bone.training.best import since_best
from rwkv_bone.training.heldout import HeldOut
from rwkv_bone.training.log import StepLog
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.progress import seconds_text
from rwkv_bone.training.saving import SaveTrained

MEASUREMENTS = 10  # in a run, where they fit
SHARE = 0.05  # of a run's time that measurements while training may take
FEWEST = 4  # measurements while training, below which they are made cheaper
TIMED = 8  # steps that are timed before it is decided, or fewer in a short run


# What a measurement consists of; each has what those before it have.
LOSSES, SAMPLES, ANSWERS = 1, 2, 3


class Rhythm(NamedTuple):
    """When to measure while training."""

    every: int  # optimiser steps between measurements; 0: never
    what: int  # LOSSES, with SAMPLES, or with exact ANSWERS, too
    line: str  # for the user; empty: nothing to say


def rhythm(given: int, total: int, step: float, costs: Mapping[str, float]) -> Rhythm:
    """When a run of `total` steps is to measure, so that it takes at most SHARE of the steps' time.

    given: --eval_steps, which no time limits, or AUTO. step: seconds of a step. costs: seconds of the parts of a
    measurement, as the records have them. Measurements before and after training are not counted: every run has them.
    """
    loss, samples, answers = costs["loss"], costs["samples"], costs["exact_match"]
    budget = SHARE * total * step
    every = given
    if given == AUTO:
        every = _every(total, budget, loss + samples)
        if not every or (total - 1) // every < FEWEST:
            every = _every(total, budget, loss)  # rather losses alone than so few measurements
    count = (total - 1) // every if every else 0
    if not count:
        if given != AUTO:
            return Rhythm(0, LOSSES, f"--eval_steps {given} measures nothing between the {counted(total, 'step')}")
        line = f"before and after training only: {_takes(loss, total * step)} (--eval_steps N measures all the same)"
        return Rhythm(0, LOSSES, line)
    what, each = LOSSES, loss
    if count * (each + samples) <= budget or given != AUTO:
        what, each = SAMPLES, each + samples
        if answers and count * (each + answers) <= budget:
            what, each = ANSWERS, each + answers
    share = count * each / (total * step) if step else 0.0
    if given != AUTO and share <= SHARE:
        return Rhythm(every, what, "")
    said = {LOSSES: "losses alone", SAMPLES: "losses and samples", ANSWERS: "losses, samples and exact answers"}[what]
    line = f"every {counted(every, 'step')}, {said}, in {share:.1%} of the time: {_takes(each, total * step)}"
    return Rhythm(every, what, line)


def _takes(measurement: float, steps: float) -> str:
    return f"a measurement takes {seconds_text(measurement)}, the steps about {seconds_text(steps)}"


def _every(total: int, budget: float, cost: float) -> int:
    """The steps between measurements of this cost, about MEASUREMENTS in all or as many as fit the budget; 0: none."""
    fit = int(budget / cost) if cost else total
    # So many that at most `fit` of them lie between the first step and the last.
    return max(-(-total // MEASUREMENTS), (total - 1) // (fit + 1) + 1) if fit else 0


class MeasureWhileTraining(Callback):
    """Measure after a step that the main process chooses, by its clock, and end the run if --early_stop says so.

    It comes after what logs and saves a step: a run that is killed in a measurement has saved the step before it.
    """

    def __init__(
        self, heldout: HeldOut, log: StepLog, save: SaveTrained, config: RunConfig, report: Callable[[str], None]
    ):
        self.heldout, self.save, self.config, self.report = heldout, save, config, report
        self._log = log
        heldout.save = save
        self._rhythm: Rhythm | None = None  # None: not decided

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        every, last = self.heldout.every, self.heldout.records[-1:]
        if self.config.eval_steps == 0:
            self._rhythm = Rhythm(0, LOSSES, "")
        elif self.config.eval_steps == AUTO and every:
            what = max((_what(record) for record in last if record["step"]), default=LOSSES)
            self._rhythm = Rhythm(every, what, f"every {counted(every, 'step')}, as before")
            self._say(module)

    def on_before_optimizer_step(
        self, trainer: Trainer, module: TrainingModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step = (module.window.step if module.window else module.first_step) + 1
        module.asks["measure"] = self._due(step, module) if trainer.is_global_zero else 0

    def _due(self, step: int, module: TrainingModule) -> int:
        """What is to be measured after this step; 0: nothing."""
        timed = step - 1 - module.first_step
        if self._rhythm is None and timed >= min(TIMED, max(1, module.total_steps // 20)):
            seconds = [record["seconds"] for record in self._log.records[-timed:]]
            # The first step warms up.
            each = statistics.median(seconds[1:] or seconds)
            self._rhythm = rhythm(self.config.eval_steps, module.total_steps, each, costs_of(self.heldout.records))
            self.heldout.every = self._rhythm.every
            self._say(module)
        given = max(self.config.eval_steps, 0)
        every, what = self._rhythm[:2] if self._rhythm else (given, SAMPLES)
        # After the last step it is measured anyway.
        return what if every and step % every == 0 and step < module.total_steps else 0

    def _say(self, module: TrainingModule) -> None:
        assert self._rhythm
        if self._rhythm.line:
            self.report(f"measured  {self._rhythm.line}")
        stop, every = self.config.early_stop, self._rhythm.every
        count = (module.total_steps - 1) // every if every else 0
        if stop > count:
            times = counted(count, "measurement")
            self.report(f"warning: --early_stop {stop} cannot act: the run has {times} while it trains (--eval_steps)")

    def on_train_batch_end(
        self, trainer: Trainer, module: TrainingModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if not module.window_finished() or not module.asked["measure"]:
            return
        assert module.window
        what = module.asked["measure"]
        if self.heldout.record(trainer, module, module.window.step, samples=what >= SAMPLES, exact=what >= ANSWERS):
            if trainer.is_global_zero:
                self.report(self._why(module))
            self.save.save_step(trainer, module)
            trainer.should_stop = True

    def _why(self, module: TrainingModule) -> str:
        """Why the run ends early, and how it would go on."""
        assert module.window
        best, where = self.heldout.best, f"after step {module.window.step} of {module.total_steps}"
        lowest = f"below {best.loss:.4f}, that of step {best.step}" if best else "that is a finite number"
        count = counted(since_best(self.heldout.records), "measurement")
        return (
            f"early stop {where}: {count} without a held-out loss {lowest} (--early_stop {self.config.early_stop}); "
            "with a larger --early_stop, or 0, the same command goes on"
        )


def _what(record: Mapping[str, Any]) -> int:
    """What a measurement consisted of."""
    if record["sets"][record["main"]]["prompts"]:
        return ANSWERS
    return SAMPLES if record["costs"].get("samples") else LOSSES


def costs_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each part of a measurement, of the last one that had it."""
    costs = {"loss": 0.0, "exact_match": 0.0, "samples": 0.0}
    for record in records:
        costs |= {name: seconds for name, seconds in record["costs"].items() if name in costs and seconds}
    return costs
