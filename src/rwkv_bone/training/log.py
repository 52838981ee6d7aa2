"""One line in the log for each optimiser step."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, Trainer

from rwkv_bone.checkpoints import atomic_path
from rwkv_bone.config.checksum import KEY, is_intact, sealed
from rwkv_bone.console import counted
from rwkv_bone.errors import JSON_ERRORS, UserError
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.project import spared


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MiB: of tensors on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, ValueError, IndexError):
        # Not what getrusage says: it begins with the memory of the process that has started this one.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


def peak_reserved_mb(device: torch.device) -> float | None:
    """Peak memory that PyTorch has reserved on the GPU in MiB: what the card must have. None on a CPU."""
    return torch.cuda.max_memory_reserved(device) / 2**20 if device.type == "cuda" else None


class StepLog(Callback):
    """One JSON line per optimiser step in `train_log.jsonl`.

    | field | of the step, on all devices |
    |---|---|
    | step, epoch | 1 is the first step of the run, 0 its first epoch |
    | loss | mean over the trained tokens, nats, with the parameters before the step; null if it is no finite number |
    | lr | learning rate, before a parameter's own multiple |
    | tokens, trained_tokens | input tokens, padding not counted; those that are targets |
    | grad_norm | 2-norm of the gradient, before clipping; null if it is no finite number: the step was then skipped |
    | units | of --task dpo and its kin: pairs or labelled answers, over which `loss` is then the mean |
    | reward_chosen, ... | of these tasks: FIGURES of preferences/objective.py; null where there are none |

    | field | of this process, the main one |
    |---|---|
    | seconds | from the end of the last step to the end of this one: the wait for the GPU and a save included |
    | tokens_per_s | tokens / seconds |
    | data_wait_ms | the part of `seconds` spent waiting for batches: near 0, because a thread makes them in advance |
    | peak_memory_mb | so far, in MiB: `peak_memory_mb` |
    | peak_reserved_mb | so far, in MiB: `peak_reserved_mb`; null on a CPU |

    | field | |
    |---|---|
    | crc32 | checksum of the others: a damaged line is as good as missing |

    kept: the lines of an earlier process, of the steps that a continued run does not repeat. A log that cannot be
    written is reported once and costs no more than its lines; at the end of the run it is tried again, whole.
    """

    def __init__(self, path: Path, kept: Sequence[dict] = (), report: Callable[[str], None] = print):
        self.path, self.report = path, report
        self.records = list(kept)
        self._file: TextIO | None = None
        self._incomplete = False  # a line could not be written
        self._begin, self._waited = time.perf_counter(), 0.0

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        if trainer.is_global_zero:
            with self._spared():
                self._file = self._open()
        self._begin, self._waited = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def _spared(self) -> Iterator[None]:
        with spared(f"the run goes on, and {self.path} lacks lines", self.report):
            self._incomplete = True
            yield
            self._incomplete = False

    def _open(self) -> TextIO:
        if not self.records:
            return open(self.path, "w", encoding="utf-8")
        self._write_whole()
        return open(self.path, "a", encoding="utf-8")

    def _write_whole(self) -> None:
        with atomic_path(self.path, overwrite=True) as temporary:
            temporary.write_text("".join(map(_line, self.records)), encoding="utf-8")

    def sync(self) -> None:
        """Wait until every line so far is on the disk."""
        if self._file and not self._incomplete:
            with self._spared():
                self._file.flush()
                os.fsync(self._file.fileno())

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
        record = module.window.record() | {
            "tokens_per_s": round(module.window.tokens / seconds, 1),
            "seconds": round(seconds, 6),
            "data_wait_ms": round(1000 * waited, 3),
            "peak_memory_mb": round(peak_memory_mb(module.device), 1),
            "peak_reserved_mb": None if reserved is None else round(reserved, 1),
        }
        self.records.append(record)
        if self._file and not self._incomplete:
            with self._spared():
                self._file.write(_line(record))
                self._file.flush()

    def measured(self, record: dict) -> None:
        """Leave the seconds of a measurement of held-out data out of those of the next step."""
        self._begin += record["seconds"]

    def teardown(self, trainer: Trainer, module: TrainingModule, stage: str) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # what could not be written stays in its buffer
                self._file.close()
            self._file = None
        if self._incomplete and trainer.is_global_zero:
            # There may be room again.
            with contextlib.suppress(OSError, UserError):
                self._write_whole()
                self.report(f"{self.path} could be written after all, with every line")


# What every line of the log has: integers, and numbers.
COUNTS = ("step", "epoch", "tokens", "trained_tokens")
NUMBERS = ("loss", "lr", "grad_norm", "tokens_per_s", "seconds", "data_wait_ms", "peak_memory_mb")
MAY_BE_NULL = {"loss", "grad_norm"}  # of a step that was skipped
WITHOUT_CHECKSUM = {*COUNTS, *NUMBERS, "peak_reserved_mb"}  # the fields of a line by an earlier version


def _line(record: dict) -> str:
    return json.dumps(sealed(record)) + "\n"


def read_log(path: Path, steps: int) -> tuple[list[dict], str]:
    """(the records of the first `steps` optimiser steps, as far as the log holds them; what is missing, in words).

    A line that no run can have written is as good as missing, and so are the lines of a step that is there twice with
    different numbers.
    """
    found: dict[int, dict] = {}
    torn: set[int] = set()
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            record = _record(line)
            if record and 1 <= record["step"] <= steps:
                if found.setdefault(record["step"], record) != record:
                    torn.add(record["step"])
    kept = [found[step] for step in sorted(found.keys() - torn)]
    missing = steps - len(kept)
    note = f"{path} lacks {counted(missing, 'step')} of {steps}: so does the loss curve" if missing else ""
    return kept, note


def _record(line: str) -> dict | None:
    """A line of the log as a record; None if it is none."""
    try:
        record = json.loads(line)
        counts = [record[name] for name in COUNTS]
        numbers = [record[name] for name in NUMBERS if name not in MAY_BE_NULL or record[name] is not None]
        right = all(type(count) is int and count >= 0 for count in counts)
        right &= all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        right &= is_intact(record, WITHOUT_CHECKSUM) and record["seconds"] > 0
        record.pop(KEY, None)
        return record if right else None
    except (LookupError, TypeError, OverflowError, *JSON_ERRORS):
        return None


def sealed_lines(path: Path) -> list[dict]:
    """The intact lines of a file of sealed JSON objects, such as `warnings.jsonl`; none of one that cannot be read."""
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(TypeError, *JSON_ERRORS):
                record = json.loads(line)
                if isinstance(record, dict) and is_intact(record, ()):
                    record.pop(KEY)
                    found.append(record)
    return found
