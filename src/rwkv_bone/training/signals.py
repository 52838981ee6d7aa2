"""A run that a signal or its time limit stops ends between two steps, with everything saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from rwkv_bone import signals
from rwkv_bone.errors import TIME_UP, Interrupted
from rwkv_bone.training.heldout import HeldOut, Unmeasured
from rwkv_bone.training.module import TrainingModule


class StopOnSignal(Callback):
    """After a signal the run finishes its step, saves it and ends; `signals.Listener` tells what a second one does.

    A run of one process leaves a measurement that is under way between two steps.

    It must be the first callback: it has to hear signals before held-out data is measured, and it ends the run at the
    start of a step, when every callback has seen the end of the step before. The other ranks learn of the signal from
    the numbers that ranks exchange anyway at the end of a step (`TrainingModule.asks`). `save(trainer, module)` is
    called on every rank; `state()` is then what the user reads: what is saved and how to go on.

    minutes: after so many since the program was started the run ends in the same way, but not before it has taken a
    step; 0 = never. The clock is the main process's.
    """

    def __init__(self, save: Callable[[Trainer, TrainingModule], None], state: Callable[[], str], minutes: float = 0.0):
        self.save, self.state, self.minutes = save, state, minutes
        self._listener = signals.Listener(state)

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        self._listener.begin(trainer.is_global_zero)
        if module.plan.world_size == 1:  # several processes would have to agree in each forward pass
            module.register_forward_pre_hook(lambda *_: self._leave_measurement(trainer, module))

    def on_train_batch_start(self, trainer: Trainer, module: TrainingModule, batch: Any, index: int) -> None:
        self._listener.stepping = True
        if index % module.plan.accumulate == 0 and index:
            # In a run of one process a signal may have come since the step.
            alone = self._listener.received if module.plan.world_size == 1 else 0
            self._end_if(alone or module.asked["signal"], trainer, module)

    def on_before_optimizer_step(
        self, trainer: Trainer, module: TrainingModule, optimizer: torch.optim.Optimizer
    ) -> None:
        module.asks["signal"] = self._listener.received or self._time_up(trainer)

    def on_train_end(self, trainer: Trainer, module: TrainingModule) -> None:
        self._listener.stepping = False
        measures = any(isinstance(callback, HeldOut) for callback in trainer.callbacks)
        received = self._listener.received or (self._time_up(trainer) if measures else 0)
        if module.plan.world_size > 1:
            asked = torch.tensor(received, device=module.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            received = int(asked)
        self._end_if(received, trainer, module)
        # The trained model is saved, so that its measurement may end between two forward passes.
        module.register_forward_pre_hook(lambda *_: self._end_measuring(trainer))

    def _leave_measurement(self, trainer: Trainer, module: TrainingModule) -> None:
        if not module.training and self._listener.stepping and (self._listener.received or self._time_up(trainer)):
            raise Unmeasured

    def _end_measuring(self, trainer: Trainer) -> None:
        if self._time_up(trainer):
            signals.stop_now(TIME_UP, f"{self._reason(TIME_UP)}; {self.state()}")

    def _time_up(self, trainer: Trainer) -> int:
        passed = time.monotonic() - signals.BEGAN
        return TIME_UP if self.minutes and trainer.is_global_zero and passed >= 60 * self.minutes else 0

    def _end_if(self, received: int, trainer: Trainer, module: TrainingModule) -> None:
        if received:
            self.save(trainer, module)
            raise Interrupted(f"{self._reason(received)}; {self.state()}" if trainer.is_global_zero else "", received)

    def _reason(self, received: int) -> str:
        return f"--max_minutes {self.minutes:g} are over" if received == TIME_UP else "interrupted"
