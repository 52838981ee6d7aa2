"""What a run's steps tell those that watch over its processes: `cluster/watch.py`."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, Trainer

from rwkv_bone.cluster.signs import marks, progress
from rwkv_bone.training.module import TrainingModule


class ShowProgress(Callback):
    """Micro-batches and all other forward passes are progress."""

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        marks.last, marks.running = time.monotonic(), True
        module.register_forward_pre_hook(lambda *_: progress())

    def on_train_batch_start(self, trainer: Trainer, module: TrainingModule, batch: Any, index: int) -> None:
        progress()
