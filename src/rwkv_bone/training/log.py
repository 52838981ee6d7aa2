"""One line in the log for each optimiser step."""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from rwkv_bone.checkpoints import atomic_path
from rwkv_bone.errors import JSON_ERRORS, UserError
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.project import LOG


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MiB: of tensors on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


def peak_reserved_mb(device: torch.device) -> float | None:
    """Peak memory that PyTorch has reserved on the GPU in MiB: what the card must have. None on a CPU."""
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
    | seconds | from the end of the last step to the end of this one: the wait for the GPU and a save included |
    | tokens_per_s | tokens / seconds |
    | data_wait_ms | the part of `seconds` spent waiting for batches: near 0, because a thread makes them in advance |
    | peak_memory_mb | so far, in MiB: `peak_memory_mb` |
    | peak_reserved_mb | so far, in MiB: `peak_reserved_mb`; null on a CPU |

    kept: the lines of an earlier process, of the steps that a continued run does not repeat.
    """

    def __init__(self, path: Path, kept: Sequence[dict] = ()):
        self.path = path
        self.records = list(kept)
        self._file: TextIO | None = None

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        self._file = self._open() if trainer.is_global_zero else None
        self._begin, self._waited = time.perf_counter(), 0.0

    def _open(self) -> TextIO:
        if not self.records:
            return open(self.path, "w", encoding="utf-8")
        with atomic_path(self.path, overwrite=True) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")
        return open(self.path, "a", encoding="utf-8")

    def on_train_batch_end(
        self, trainer: Trainer, module: TrainingModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if not module.window_finished():
            return
        assert module.window and module.batches
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

    def teardown(self, trainer: Trainer, module: TrainingModule, stage: str) -> None:
        if self._file:
            self._file.close()


def read_log(path: Path, steps: int) -> list[dict]:
    """The records of the first `steps` optimiser steps; UserError if the log does not hold exactly these."""
    records: list[dict] = []
    with open(path, "rb") as file:
        for line in islice(file, steps):
            try:
                records.append(json.loads(line))
            except JSON_ERRORS as error:
                raise UserError(f"{path}:{len(records) + 1} is not JSON ({error}): repair or remove the file") from None
    whole = [isinstance(record, dict) and isinstance(record.get("loss"), int | float) for record in records]
    if not all(whole) or [record.get("step") for record in records] != list(range(1, steps + 1)):
        raise UserError(f"{path} does not hold the steps 1 to {steps}: restore or remove the file")
    return records


def wandb_logger(project: str, folder: Path, report: Callable[[str], None]) -> Logger | None:
    """Lightning's Weights & Biases logger for `--wandb project`; None without one, or (reported) without wandb."""
    if not project:
        return None
    if importlib.util.find_spec("wandb") is None:
        report(f"wandb     not installed, so nothing is sent; {folder / LOG} has everything")
        return None
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(project=project, save_dir=folder)
