"""Ctrl-C, SIGTERM and a closed terminal: a run ends between two steps, with everything saved."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from rwkv_bone.errors import Interrupted, StoppedAtOnce
from rwkv_bone.training.module import TrainingModule


class StopOnSignal(Callback):
    """After a signal the run finishes its step, saves it and ends. A second signal, or one outside the steps, ends the
    run at once; but not a second SIGHUP, since a terminal that closes sends several. A signal that the run was started
    to ignore, as `nohup` does, is ignored.

    It must be the first callback: it has to hear signals before held-out data is measured, and it ends the run at the
    start of a step, when every callback has seen the end of the step before. The other ranks learn of the signal from
    the numbers that ranks exchange anyway at the end of a step (`TrainingModule.signal`). `save(trainer, module)` is
    called on every rank; `message()` is what the user then reads.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, save: Callable[[Trainer, TrainingModule], None], message: Callable[[], str]):
        self.save, self.message = save, message
        self._received = 0
        self._stepping = False
        self._is_main = False

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        self._is_main = trainer.is_global_zero
        for number in self.SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            # These replace Lightning's handlers; its trainer restores the original ones at the end.
            signal.signal(number, self._receive)
        # Lightning now hears no signal. So its ranks need not ask each other before each forward pass whether one has
        # come, which would wait for the GPU.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_start(self, trainer: Trainer, module: TrainingModule, batch: Any, index: int) -> None:
        self._stepping = True
        if index % module.plan.accumulate == 0 and index:
            self._end_if(module.signal_anywhere if module.plan.world_size > 1 else self._received, trainer, module)

    def on_before_optimizer_step(
        self, trainer: Trainer, module: TrainingModule, optimizer: torch.optim.Optimizer
    ) -> None:
        module.signal = self._received

    def on_train_end(self, trainer: Trainer, module: TrainingModule) -> None:
        self._stepping = False
        received = self._received
        if module.plan.world_size > 1:
            asked = torch.tensor(received, device=module.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            received = int(asked)
        self._end_if(received, trainer, module)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGHUP:
            return
        if self._received or not self._stepping:
            raise StoppedAtOnce(number)
        self._received = number
        if self._is_main:
            # print is not safe in a signal handler. The terminal may be gone.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step, to save it (once more: at once)\n")

    def _end_if(self, received: int, trainer: Trainer, module: TrainingModule) -> None:
        if received:
            self.save(trainer, module)
            raise Interrupted(self.message(), received)
