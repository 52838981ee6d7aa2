"""A run's memory on a CPU: kept from step to step, and given back where it does not serve again."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from rwkv_bone import allocator
from rwkv_bone.training.module import TrainingModule


class KeepHeap(Callback):
    """What the C library's allocator is told (allocator.py), where the run is on a CPU."""

    def on_fit_start(self, trainer: Trainer, module: TrainingModule) -> None:
        if trainer.strategy.root_device.type == "cpu":
            allocator.keep()

    def on_train_batch_end(
        self, trainer: Trainer, module: TrainingModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if module.window_finished() and trainer.strategy.root_device.type == "cpu":
            allocator.trim_after_step()

    def on_train_end(self, trainer: Trainer, module: TrainingModule) -> None:
        # What comes, a measurement and the drawing of the curve, would lie on top of what the steps have left.
        if trainer.strategy.root_device.type == "cpu":
            allocator.give_back()
