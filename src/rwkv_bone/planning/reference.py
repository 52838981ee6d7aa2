"""What the pass before the first step will take, in which dpo and kto learn what they compare with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from rwkv_bone.data import Dataset
from rwkv_bone.planning.heldout import forward_positions
from rwkv_bone.training.heldout import HeldOut
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.reference import log_probabilities

PASSES = 3  # forward passes that are timed, after about one that warms up


class TimeReference(Callback):
    """Time that pass on a few units: `seconds` of the whole of it. spent: what this took.

    The steps that are timed later compare with zeros, which takes as long. heldout: data that is in the pass as well.
    """

    def __init__(
        self, heldout: HeldOut | None, micro_bsz: int, chunk: int, clock: Callable[[], float] = time.monotonic
    ):
        self._heldout, self._micro_bsz, self._chunk, self._clock = heldout, micro_bsz, chunk, clock
        self.seconds = self.spent = 0.0
        self.units = 0  # of the training data that the run reads

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        assert module.objective
        begin, plan = self._now(module), module.plan
        dataset, mismatched = plan.dataset, module.objective.needs_mismatched
        columns = dataset.members + mismatched
        module.reference = lambda numbers: torch.zeros(len(numbers), columns, dtype=torch.float64, device=module.device)
        units = plan.units_read(module.total_steps)
        room = PASSES * plan.world_size * self._micro_bsz * dataset.members * dataset.ctx_len
        count = min(len(units), -(-room // max(int(dataset.positions[units].mean()), 1)))
        few = units[np.arange(count) * len(units) // count]

        def take(some: np.ndarray) -> float:
            start = self._now(module)
            how: dict[str, Any] = {"micro_bsz": self._micro_bsz, "chunk": self._chunk, "mismatched": mismatched}
            log_probabilities(module, dataset, some, doing="timing the reference", **how)
            return self._now(module) - start

        take(few[: -(-count // PASSES)])
        rate = take(few) / forward_positions(dataset.subset(few))
        parts = [dataset.subset(units), *self._others()]
        self.units, self.seconds = len(units), rate * sum(map(forward_positions, parts))
        self.spent = self._now(module) - begin

    def _others(self) -> list[Dataset]:
        """The held-out data that the pass has: of the main set all and its part, of the others what is measured."""
        if self._heldout is None:
            return []
        sets, main = self._heldout.sets, self._heldout.main
        parts = [one.part for one in sets if not one.general]
        return parts + [main.dataset] * (main.part is not main.dataset)

    def _now(self, module: TrainingModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return self._clock()
