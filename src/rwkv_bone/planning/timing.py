"""A few steps of a run, taken and timed: the same module, optimiser and loop as in training, and nothing written.

The first step is left out: it also fills caches and asks the system for memory. The others are timed until half of them
lie within a few hundredths, or a minute is over. A step's time is taken in proportion to its positions, padding
included: the median of that, times the positions of an average step, is what a step of the run takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from rwkv_bone.data import BatchPlan
from rwkv_bone.training.module import TrainingModule

SECONDS = 60.0  # that the steps may take together
FEW, MANY = 5, 200  # steps that are timed at least, where there is time, and at most
SPREAD = 0.03  # standard error of the median, of the median itself, with which no more steps are timed


class Mark(NamedTuple):
    """The end of a forward and backward pass."""

    seconds: float  # since the pass before it ended; the step is in it where it ends one
    positions: int  # of its batch on this device, padding included
    ends_step: bool


@dataclass(frozen=True)
class Times:
    """What was timed. steps: those that count. spread: half of them lie within so much of `per_position`, of itself."""

    per_position: float  # seconds
    steps: float  # a fraction of one where time was over before the first step was
    spread: float
    warm_up: float  # seconds that the first step took longer than it would have later

    def step(self, plan: BatchPlan) -> float:
        """Seconds of an average step of a run on this device."""
        return self.per_position * positions_of_a_step(plan)


def positions_of_a_step(plan: BatchPlan) -> float:
    """Of one device, averaged over the first pass that has a step."""
    return plan.positions() / max(plan.steps_in_pass(0), 1) / plan.world_size


class Enough(Exception):
    """Timing is over. Every rank raises it after the same step."""


class TimeSteps(Callback):
    """Time the passes of a run, and end it with Enough. clock: seconds, which only grow."""

    def __init__(self, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic):
        self._limit, self._clock = seconds, clock
        self.marks: list[Mark] = []
        self.began = 0.0

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        self.began = self._last = self._clock()

    def on_before_optimizer_step(
        self, trainer: Trainer, module: TrainingModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # The main process decides, since clocks differ.
        over = self._clock() - self.began >= self._limit
        module.asks["time"] = int(trainer.is_global_zero and (over or enough(self.marks)))

    def on_train_batch_end(
        self, trainer: Trainer, module: TrainingModule, outputs: Any, batch: Any, index: int
    ) -> None:
        ends, now = module.window_finished(), self._clock()
        self.marks.append(Mark(now - self._last, batch.ids.numel(), ends))
        self._last = now
        # In a long step of one process there is no need to wait for its end. On a GPU passes end in no known order.
        alone = module.plan.world_size == 1 and module.device.type == "cpu" and len(self.marks) > 1
        if (ends and (module.asked["time"] or enough(self.marks) and module.plan.world_size == 1)) or (
            alone and now - self.began >= self._limit
        ):
            raise Enough


def windows(marks: Sequence[Mark]) -> list[Mark]:
    """The marks of whole steps: their passes added up."""
    found, seconds, positions = [], 0.0, 0
    for mark in marks:
        seconds, positions = seconds + mark.seconds, positions + mark.positions
        if mark.ends_step:
            found.append(Mark(seconds, positions, True))
            seconds, positions = 0.0, 0
    return found


def enough(marks: Sequence[Mark]) -> bool:
    """Whether another step would tell little."""
    rates = _rates(windows(marks)[1:])
    if len(rates) < FEW:
        return False
    # Of many values of a normal distribution the median's standard error is 1.25 times that of the mean, and half of
    # them lie within 0.674 standard deviations of it.
    error = 1.25 * _spread(rates) / 0.674 / len(rates) ** 0.5
    return error <= SPREAD or len(rates) >= MANY


def times(marks: Sequence[Mark]) -> Times:
    """What the marks tell, of which there is at least one."""
    steps = windows(marks)
    # Without a whole step after the first, its passes are what there is; without a second one, the first.
    used = steps[1:] or list(marks[1:]) or list(marks)
    rates = _rates(used)
    rate = float(np.median(rates))
    first = (steps or list(marks))[0]
    warm_up = max(first.seconds - rate * first.positions, 0.0)
    passes = len(marks) / max(len(steps), 1) if steps else 0
    count = len(steps) - 1 if len(steps) > 1 else len(used) / passes if passes else 0
    return Times(rate, count, _spread(rates), warm_up)


def _rates(marks: Sequence[Mark]) -> np.ndarray:
    return np.array([mark.seconds / max(mark.positions, 1) for mark in marks])


def _spread(rates: np.ndarray) -> float:
    """Half of the values lie within this share of their median."""
    middle = np.median(rates)
    return float(np.median(np.abs(rates - middle)) / middle) if middle else 0.0
