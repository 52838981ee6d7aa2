"""What a user sees and keeps of a run besides the adapters: progress, one log line a step, the loss curve."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.pytorch import Callback

from rwkv_bone.errors import UserError


def clock(seconds: float) -> str:
    """3725 -> `1:02:05`, 65 -> `1:05`."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def peak_memory_mb(device: torch.device) -> float:
    """Most memory this process has held: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


class StepLog(Callback):
    """One JSON line per optimiser step in `train_log.jsonl`, and to Lightning's logger if there is one.

    `seconds` is the time of the step alone; `tokens` are input tokens of all ranks, padding not counted.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: list[dict] = []

    def on_train_start(self, trainer, module) -> None:
        self._file = open(self.path, "w", encoding="utf-8") if trainer.is_global_zero else None
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if not module.window_finished():
            return
        now = time.perf_counter()
        seconds, self._begin = now - self._begin, now
        record = asdict(module.window) | {
            "grad_norm": float(trainer.model.get_global_grad_norm()),
            "tokens_per_s": round(module.window.tokens / seconds, 1),
            "seconds": round(seconds, 6),
            "peak_memory_mb": round(peak_memory_mb(module.device), 1),
        }
        self.records.append(record)
        if self._file:
            try:
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
            except OSError as error:
                raise UserError(f"{self.path} could not be written: {error.strerror}") from error
        if trainer.logger:
            trainer.logger.log_metrics(record, step=record["step"])

    def teardown(self, trainer, module, stage) -> None:
        if getattr(self, "_file", None):
            self._file.close()


class Progress(Callback):
    """A progress bar on a terminal; elsewhere about twenty plain lines."""

    BAR = 24

    def __init__(self, step_log: StepLog, stream=None):
        self.step_log, self.stream = step_log, stream or sys.stdout

    def on_train_start(self, trainer, module) -> None:
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if not (module.window_finished() and trainer.is_global_zero):
            return
        done, total, elapsed = module.window.step, module.total_steps, time.perf_counter() - self._begin
        # Over some steps: single ones of a small batch jump too much to read.
        recent = self.step_log.records[-20:]
        loss = sum(r["loss"] for r in recent) / len(recent)
        speed = sum(r["tokens"] for r in recent) / sum(r["seconds"] for r in recent)
        line = (
            f"step {done}/{total}  epoch {module.window.epoch + 1}/{module.epochs}  loss {loss:.4f}  "
            f"lr {module.window.lr:.2e}  {speed:,.0f} tokens/s  {clock(elapsed / done * (total - done))} left"
        )
        if self.stream.isatty():
            filled = self.BAR * done // total
            end = "\n" if done == total else ""
            self.stream.write(f"\r[{'#' * filled}{'.' * (self.BAR - filled)}] {line}\033[K{end}")
            self.stream.flush()
        elif done == total or done == 1 or done % -(-total // 20) == 0:
            print(line, file=self.stream, flush=True)

    def on_exception(self, trainer, module, exception) -> None:
        if trainer.is_global_zero and self.stream.isatty():
            self.stream.write("\n")


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the values, at most 50, corrected for its start."""
    weight = 1 - 1 / min(max(len(values) / 20, 2), 50)
    out, mean = [], 0.0
    for i, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**i))
    return out


def draw_loss(path: Path, records: list[dict], heldout: tuple[float, float] | None) -> None:
    """The loss curve as PNG: every step, a moving average, and held-out loss before and after if measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(steps, smoothed(losses), color="tab:blue", label="moving average")
    if heldout:
        axes.plot([0, steps[-1]], heldout, "o", color="tab:orange", label="held-out, before and after")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
