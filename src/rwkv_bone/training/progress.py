"""How far a run has come, for the person who watches it."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from lightning.pytorch import Callback, Trainer

from rwkv_bone.training.log import StepLog
from rwkv_bone.training.module import TrainingModule


class ProgressLines(Callback):
    """A progress bar on a terminal; elsewhere about twenty plain lines."""

    BAR = 24

    def __init__(self, step_log: StepLog, stream: TextIO | None = None):
        self.step_log, self.stream = step_log, stream or sys.stdout

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        self._begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, module: TrainingModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if not (module.window_finished() and trainer.is_global_zero):
            return
        window = module.window
        assert window
        done, total, elapsed = window.step, module.total_steps, time.perf_counter() - self._begin
        ours = done - module.first_step
        # Averages over the last steps: the numbers of a single small batch jump too much to read.
        recent = self.step_log.records[-20:]
        loss = sum(r["loss"] for r in recent) / len(recent)
        recent = recent[-ours:]
        speed = sum(r["tokens"] for r in recent) / sum(r["seconds"] for r in recent)
        line = (
            f"step {done}/{total}  epoch {window.epoch + 1}/{module.epochs}  loss {loss:.4f}  "
            f"lr {window.lr:.2e}  {speed:,.0f} tokens/s  {clock(elapsed / ours * (total - done))} left"
        )
        if self.stream.isatty():
            filled = self.BAR * done // total
            end = "\n" if done == total else ""
            self.stream.write(f"\r[{'#' * filled}{'.' * (self.BAR - filled)}] {line}\033[K{end}")
            self.stream.flush()
        elif done == total or ours == 1 or done % -(-total // 20) == 0:
            print(line, file=self.stream, flush=True)

    def on_exception(self, trainer: Trainer, module: TrainingModule, exception: BaseException) -> None:
        if trainer.is_global_zero and self.stream.isatty():
            self.stream.write("\n")


def clock(seconds: float) -> str:
    """3725 -> `1:02:05`, 65 -> `1:05`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
