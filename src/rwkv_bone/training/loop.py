"""The loop over micro-batches."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class StepLoop(_TrainingEpochLoop):
    """Lightning's loop, with nothing between two steps but what a run of ours consists of.

    Lightning's own asks every callback, module, strategy and logger about some fifteen events in each forward pass,
    which took longer than the optimiser's step. Of its events these remain, in its order: on_train_batch_start, at the
    end of a window on_before_optimizer_step, on_train_batch_end.
    """

    def advance(self, data_fetcher: Any) -> None:
        """One micro-batch; the last of a window ends with the optimiser's step."""
        trainer, strategy = self.trainer, self.trainer.strategy
        module, (optimizer,) = trainer.lightning_module, trainer.optimizers
        batch, *_ = next(data_fetcher)
        self.batch_progress.is_last_batch = data_fetcher.done
        self.batch_progress.increment_ready()
        index = self.batch_idx
        batch = batch.to(strategy.root_device)
        for callback in trainer.callbacks:
            callback.on_train_batch_start(trainer, module, batch, index)
        strategy.precision_plugin.backward(strategy.training_step(batch, index), module, optimizer)
        if module.window_finished():
            for callback in trainer.callbacks:
                callback.on_before_optimizer_step(trainer, module, optimizer)
            module.on_before_optimizer_step(optimizer)
        strategy.take_step(module.window_finished())
        if module.window_finished():
            module.finish_window()
        for callback in trainer.callbacks:
            callback.on_train_batch_end(trainer, module, None, batch, index)

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Nothing: there is no validation, and StopOnSignal hears signals."""


def use_step_loop(trainer: Trainer) -> None:
    """Have a trainer that is not yet fitting go through its micro-batches by StepLoop."""
    trainer.fit_loop.epoch_loop = StepLoop(trainer)
