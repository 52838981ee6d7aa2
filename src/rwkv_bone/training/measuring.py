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
from rwkv_bone.training.saving import SaveTrained

MEASUREMENTS = 10  # in a run, where they fit
SHARE = 0.05  # of a run's time that measurements while training may take
TIMED = 8  # steps that are timed before it is decided, or fewer in a short run


class Rhythm(NamedTuple):
    """When to measure while training."""

    every: int  # optimiser steps between measurements; 0: never
    exact: bool  # whether exact answers are counted, too
    line: str  # for the user; empty: nothing to say


def rhythm(given: int, total: int, step: float, costs: Mapping[str, float]) -> Rhythm:
    """When a run of `total` steps is to measure, so that it takes at most SHARE of the steps' time.

    given: --eval_steps, which no time limits, or AUTO. step: seconds of a step. costs: seconds of the parts of a
    measurement, as the records have them. Measurements before and after training are not counted: every run has them.
    """
    once, answers = costs["loss"] + costs["samples"], costs["exact_match"]
    budget = SHARE * total * step
    every = given
    if given == AUTO:
        fit = int(budget / once) if once else total
        # So many steps that at most `fit` measurements lie between the first step and the last.
        every = max(-(-total // MEASUREMENTS), (total - 1) // (fit + 1) + 1) if fit else 0
    count = (total - 1) // every if every else 0
    exact = bool(answers and count) and count * (once + answers) <= budget
    takes = f"a measurement takes {once:.2g} s, the steps about {total * step:.2g} s"
    if not count:
        if given != AUTO:
            return Rhythm(0, False, f"--eval_steps {given} measures nothing while training: {counted(total, 'step')}")
        return Rhythm(0, False, f"before and after training only: {takes} (--eval_steps N measures all the same)")
    if given != AUTO:
        share = count * once / (total * step) if step else 0.0
        note = f"every {counted(every, 'step')} (--eval_steps), which takes about {share:.0%} of the time: {takes}"
        return Rhythm(every, exact, note if share > SHARE else "")
    share = count * (once + answers * exact) / (total * step) if step else 0.0
    with_answers = ", exact answers included" if exact else ", exact answers before and after only" if answers else ""
    return Rhythm(every, exact, f"every {counted(every, 'step')}, about {share:.1%} of the time: {takes}{with_answers}")


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
            self._rhythm = Rhythm(0, False, "")
        elif self.config.eval_steps == AUTO and every:
            exact = any(record["step"] and record["sets"][record["main"]]["prompts"] for record in last)
            self._rhythm = Rhythm(every, exact, f"every {counted(every, 'step')}, as before")
            self._say(module)

    def on_before_optimizer_step(
        self, trainer: Trainer, module: TrainingModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step = (module.window.step if module.window else module.first_step) + 1
        module.asks["measure"] = self._due(step, module) if trainer.is_global_zero else 0

    def _due(self, step: int, module: TrainingModule) -> int:
        """What this step asks for: 0 nothing, 1 a measurement, 2 one with exact answers."""
        timed = step - 1 - module.first_step
        if self._rhythm is None and timed >= min(TIMED, max(1, module.total_steps // 20)):
            seconds = [record["seconds"] for record in self._log.records[-timed:]]
            # The first step warms up.
            each = statistics.median(seconds[1:] or seconds)
            self._rhythm = rhythm(self.config.eval_steps, module.total_steps, each, costs_of(self.heldout.records))
            self.heldout.every = self._rhythm.every
            self._say(module)
        given = max(self.config.eval_steps, 0)
        every, exact = self._rhythm[:2] if self._rhythm else (given, False)
        if not every or step % every or step == module.total_steps:  # after the last it is measured anyway
            return 0
        return 2 if exact else 1

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
        if self.heldout.record(trainer, module, module.window.step, exact=module.asked["measure"] == 2):
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


def costs_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each part of a measurement, of the last one that had it."""
    costs = {"loss": 0.0, "exact_match": 0.0, "samples": 0.0}
    for record in records:
        costs |= {name: seconds for name, seconds in record["costs"].items() if name in costs and seconds}
    return costs
