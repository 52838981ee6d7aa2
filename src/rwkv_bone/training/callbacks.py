"""What happens beside the training steps: progress, one log line a step, seeds, signals; and the loss curve."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback

from rwkv_bone.checkpoints import atomic_path
from rwkv_bone.errors import Interrupted, UserError


def clock(seconds: float) -> str:
    """3725 -> `1:02:05`, 65 -> `1:05`."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def peak_memory_mb(device: torch.device) -> float:
    """Most memory this process has held: in tensors on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


def peak_reserved_mb(device: torch.device) -> float | None:
    """Most memory that PyTorch has taken from the GPU, unused parts included: what a card must have. None on a CPU."""
    return torch.cuda.max_memory_reserved(device) / 2**20 if device.type == "cuda" else None


class StepLog(Callback):
    """One JSON line per optimiser step in `train_log.jsonl`, and to Lightning's logger if there is one.

    | field | of the step, on all devices |
    |---|---|
    | step, epoch | 1 is the first step of the run, 0 its first epoch |
    | loss | mean over the trained tokens, nats, with the parameters before the step |
    | lr | learning rate, before a parameter's own multiple |
    | tokens, trained_tokens | input tokens, padding not counted; those that are targets |
    | grad_norm | 2-norm of the gradient, before clipping |

    | field | of this process, the main one |
    |---|---|
    | seconds | from the end of the last step to the end of this one, which also waits for its GPU and contains a save |
    | tokens_per_s | tokens / seconds |
    | data_wait_ms | of these seconds, how long the step waited for its batches: near 0, as a thread makes them ahead |
    | peak_memory_mb | so far, in MiB: `peak_memory_mb` |
    | peak_reserved_mb | so far, in MiB: `peak_reserved_mb`; null on a CPU |

    A run that is continued keeps its lines up to the step after which it goes on.
    """

    def __init__(self, path: Path, kept: Sequence[dict] = ()):
        self.path = path
        self.records = list(kept)

    def on_train_start(self, trainer, module) -> None:
        self._file = self._open() if trainer.is_global_zero else None
        self._begin, self._waited = time.perf_counter(), 0.0

    def _open(self):
        if not self.records:
            return open(self.path, "w", encoding="utf-8")
        with atomic_path(self.path, overwrite=True) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")
        return open(self.path, "a", encoding="utf-8")

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if not module.window_finished():
            return
        now = time.perf_counter()
        seconds, self._begin = now - self._begin, now
        waited, self._waited = module.batches.waited - self._waited, module.batches.waited
        reserved = peak_reserved_mb(module.device)
        record = asdict(module.window) | {
            "tokens_per_s": round(module.window.tokens / seconds, 1),
            "seconds": round(seconds, 6),
            "data_wait_ms": round(1000 * waited, 3),
            "peak_memory_mb": round(peak_memory_mb(module.device), 1),
            "peak_reserved_mb": None if reserved is None else round(reserved, 1),
        }
        self.records.append(record)
        if self._file:
            try:
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
            except OSError as error:
                raise UserError(f"{self.path} could not be written: {error.strerror}") from error
        if trainer.logger:
            numbers = {name: value for name, value in record.items() if value is not None}
            trainer.logger.log_metrics(numbers, step=record["step"])

    def teardown(self, trainer, module, stage) -> None:
        if getattr(self, "_file", None):
            self._file.close()


def read_log(path: Path, steps: int) -> list[dict]:
    """The records of the first `steps` optimiser steps; UserError if the log does not hold exactly these."""
    records = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if len(records) == steps:
                break
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}:{len(records) + 1} is not JSON ({error}): mend or remove the file") from None
    if [record["step"] for record in records] != list(range(1, steps + 1)):
        raise UserError(f"{path} does not hold the steps 1 to {steps}: restore or remove the file")
    return records


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
        ours = done - module.first_step
        # Over some steps: single ones of a small batch jump too much to read.
        recent = self.step_log.records[-20:]
        loss = sum(r["loss"] for r in recent) / len(recent)
        recent = recent[-ours:]
        speed = sum(r["tokens"] for r in recent) / sum(r["seconds"] for r in recent)
        line = (
            f"step {done}/{total}  epoch {module.window.epoch + 1}/{module.epochs}  loss {loss:.4f}  "
            f"lr {module.window.lr:.2e}  {speed:,.0f} tokens/s  {clock(elapsed / ours * (total - done))} left"
        )
        if self.stream.isatty():
            filled = self.BAR * done // total
            end = "\n" if done == total else ""
            self.stream.write(f"\r[{'#' * filled}{'.' * (self.BAR - filled)}] {line}\033[K{end}")
            self.stream.flush()
        elif done == total or ours == 1 or done % -(-total // 20) == 0:
            print(line, file=self.stream, flush=True)

    def on_exception(self, trainer, module, exception) -> None:
        if trainer.is_global_zero and self.stream.isatty():
            self.stream.write("\n")


class SeedBatches(Callback):
    """Make what is drawn at random in a forward pass, dropout, a pure function of (seed, step, micro-batch, rank)."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        index += module.first_step * module.plan.accumulate
        state = np.random.SeedSequence([self.seed, index, trainer.global_rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))


class StopOnSignal(Callback):
    """Ctrl-C or SIGTERM: finish the step under way, save it, and leave. A second one, or one outside the steps, leaves
    at once.

    Must be the first callback: it is to hear signals before held-out data is measured, and a run is left at the start
    of a step, when every callback has seen the end of the last one. What another rank has heard comes with the numbers
    of a window (`TrainingModule.signal`), so that nothing more is exchanged. `save(trainer, module)` is called on every
    rank; `message()` is what the user reads then.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, save, message):
        self.save, self.message = save, message
        self._received = 0
        self._stepping = False

    def on_train_start(self, trainer, module) -> None:
        self._speaks = trainer.is_global_zero
        for number in self.SIGNALS:
            # In place of Lightning's; its trainer puts back what was there before.
            signal.signal(number, self._receive)
        # Now Lightning hears no signal, so its ranks need not ask each other before each forward pass whether they did,
        # which would wait for the GPU.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        self._stepping = True
        if index % module.plan.accumulate == 0 and index:
            self._leave_if(module.signal_anywhere if module.plan.world_size > 1 else self._received, trainer, module)

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        module.signal = self._received

    def on_train_end(self, trainer, module) -> None:
        self._stepping = False
        received = self._received
        if module.plan.world_size > 1:
            asked = torch.tensor(received, device=module.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            received = int(asked)
        self._leave_if(received, trainer, module)

    def _receive(self, number: int, frame) -> None:
        if self._received or not self._stepping:
            raise KeyboardInterrupt
        self._received = number
        if self._speaks:
            # print is not safe in a signal handler.
            os.write(2, b"\nstopping after this step, to save it (once more: at once)\n")

    def _leave_if(self, received: int, trainer, module) -> None:
        if received:
            self.save(trainer, module)
            raise Interrupted(self.message(), received)


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the values, at most 50, corrected for its start."""
    weight = 1 - 1 / min(max(len(values) / 20, 2), 50)
    out, mean = [], 0.0
    for i, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**i))
    return out


def draw_loss(path: Path, records: list[dict], heldout: Sequence[tuple[int, float]]) -> None:
    """The loss curve as PNG: every step, a moving average, and what was measured on held-out data: (step, loss)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(steps, smoothed(losses), color="tab:blue", label="moving average")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o", color="tab:orange", label="held-out, before and after")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
