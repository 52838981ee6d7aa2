"""A run that a signal stops ends between two steps, with everything saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from rwkv_bone.errors import Interrupted
from rwkv_bone.signals import Listener
from rwkv_bone.training.module import TrainingModule


class StopOnSignal(Callback):
    """After a signal the run finishes its step, saves it and ends; `Listener` tells what a second one does.

    It must be the first callback: it has to hear signals before held-out data is measured, and it ends the run at the
    start of a step, when every callback has seen the end of the step before. The other ranks learn of the signal from
    the numbers that ranks exchange anyway at the end of a step (`TrainingModule.asks`). `save(trainer, module)` is
    called on every rank; `message()` is what the user then reads.
    """

    def __init__(self, save: Callable[[Trainer, TrainingModule], None], message: Callable[[], str]):
        self.save, self.message = save, message
        self._listener = Listener()

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        # This replaces Lightning's handlers; its trainer restores the original ones at the end.
        self._listener.begin(trainer.is_global_zero)

    def on_train_batch_start(self, trainer: Trainer, module: TrainingModule, batch: Any, index: int) -> None:
        self._listener.stepping = True
        if index % module.plan.accumulate == 0 and index:
            received = module.asked["signal"] if module.plan.world_size > 1 else self._listener.received
            self._end_if(received, trainer, module)

    def on_before_optimizer_step(
        self, trainer: Trainer, module: TrainingModule, optimizer: torch.optim.Optimizer
    ) -> None:
        module.asks["signal"] = self._listener.received

    def on_train_end(self, trainer: Trainer, module: TrainingModule) -> None:
        self._listener.stepping = False
        received = self._listener.received
        if module.plan.world_size > 1:
            asked = torch.tensor(received, device=module.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            received = int(asked)
        self._end_if(received, trainer, module)

    def _end_if(self, received: int, trainer: Trainer, module: TrainingModule) -> None:
        if received:
            self.save(trainer, module)
            raise Interrupted(self.message(), received)
