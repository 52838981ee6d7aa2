"""How far a run has come, for the person who watches it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from lightning.pytorch import Callback, Trainer

from rwkv_bone.console import progress_bar
from rwkv_bone.training.log import StepLog
from rwkv_bone.training.module import TrainingModule

if TYPE_CHECKING:
    from tqdm import tqdm


class ProgressLines(Callback):
    """A progress bar on a terminal; elsewhere about twenty plain lines."""

    def __init__(self, step_log: StepLog, stream: TextIO | None = None):
        self.step_log, self.stream = step_log, stream or sys.stdout
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        self._begin = time.perf_counter()
        if trainer.is_global_zero and self.stream.isatty():
            steps = {"total": module.total_steps, "initial": module.first_step}
            self._bar = progress_bar(layout="{desc} [{bar}]", stream=self.stream, delay=0, leave=True, **steps)

    def on_train_batch_end(
        self, trainer: Trainer, module: TrainingModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if not (module.window_finished() and trainer.is_global_zero):
            return
        window = module.window
        assert window
        done, total, elapsed = window.step, module.total_steps, time.perf_counter() - self._begin
        ours = done - module.first_step
        if self._bar is None and not (done == total or ours == 1 or done % -(-total // 20) == 0):
            return
        # Averages over the last steps: the numbers of a single small batch jump too much to read.
        recent = self.step_log.records[-20:]
        losses = [r["loss"] for r in recent if r["loss"] is not None]
        loss = f"loss {sum(losses) / len(losses):.4f}" if losses else "loss not finite"
        recent = recent[-ours:]
        speed = sum(r["tokens"] for r in recent) / sum(r["seconds"] for r in recent)
        step, epoch = f"step {done}/{total}", f"epoch {window.epoch + 1}/{module.epochs}"
        left = f"{clock(elapsed / ours * (total - done))} left"
        numbers = {"loss": loss, "lr": f"lr {window.lr:.2e}", "speed": f"{speed:,.0f} tokens/s"}
        if self._bar is not None and not self.stream.isatty():
            # The terminal is gone: what is said from now on goes to a file.
            self._bar.disable, self._bar = True, None
        if self._bar is not None:
            # A narrow terminal cuts the line: the first are needed most.
            words = [step, numbers["loss"], left, numbers["speed"], epoch, numbers["lr"]]
            self._bar.set_description_str("  ".join(words), refresh=False)
            self._bar.update()
            if done == total:
                self._close()
        else:
            print("  ".join([step, epoch, *numbers.values(), left]), file=self.stream, flush=True)

    def on_exception(self, trainer: Trainer, module: TrainingModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def clock(seconds: float) -> str:
    """3725 -> `1:02:05`, 65 -> `1:05`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
