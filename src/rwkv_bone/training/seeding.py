"""Random numbers that are the same in a continued and in an uninterrupted run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from rwkv_bone.training.module import TrainingModule


class SeedBatches(Callback):
    """Make dropout in a forward pass a pure function of (seed, step, micro-batch, rank)."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, module: TrainingModule, batch: Any, index: int) -> None:
        index += module.first_step * module.plan.accumulate
        state = np.random.SeedSequence([self.seed, index, trainer.global_rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))
