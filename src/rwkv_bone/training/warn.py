"""Warnings of a run that goes wrong: each once, with its remedy, on the terminal and in `warnings.jsonl`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from rwkv_bone.checkpoints import atomic_path
from rwkv_bone.config import TrainConfig
from rwkv_bone.config.checksum import sealed
from rwkv_bone.config.rates import unusual_rate
from rwkv_bone.data import Dataset
from rwkv_bone.data.lost import WARNING
from rwkv_bone.training import diagnosis
from rwkv_bone.training.diagnosis import Advice
from rwkv_bone.training.log import StepLog, sealed_lines
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.project import spared

EVERY = 20  # steps between two looks at the log


class WarnOnce(Callback):
    """Looks at the log every 20 steps and at each measurement, and warns of what `diagnosis` finds.

    A line of the file at `path` has `step`, `kind`, `warning`, `remedy` and the checksum `crc32`. kept: the lines of an
    earlier process, of the steps that a continued run does not repeat; none of them is said again. Only the main
    process warns. measurements: those so far, to which `measured` adds.
    """

    def __init__(
        self,
        path: Path,
        step_log: StepLog,
        config: TrainConfig,
        *,
        width: int,
        vocab_size: int,
        kept: Sequence[dict] = (),
        measurements: Sequence[dict] = (),
        report: Callable[[str], None] = print,
    ):
        self.path, self.step_log, self.config, self.report = path, step_log, config, report
        self.width, self.vocab_size = width, vocab_size
        self.given = list(kept)
        self._measurements = list(measurements)
        self._look: Callable[..., list[Advice]] | None = None
        self._incomplete = False  # a line could not be written

    def on_fit_start(self, trainer: Trainer, module: TrainingModule) -> None:
        if not trainer.is_global_zero or module.first_step >= module.total_steps:
            return
        self._look = partial(
            diagnosis.of_steps,
            total_steps=module.total_steps,
            vocab_size=self.vocab_size,
            grad_clip=self.config.optim.grad_clip,
            from_scratch=not self.config.model.load_model,
            process_began=module.first_step,
        )
        if module.first_step and self.path.exists():
            self._write_whole()  # without the lines of steps that are repeated
        self._give(module.first_step, of_start(self.config, module.plan.dataset, self.width))

    def on_train_batch_end(
        self, trainer: Trainer, module: TrainingModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if self._look and module.window_finished():
            step = self.step_log.records[-1]["step"]
            if step % EVERY == 0 or step == module.total_steps:
                with spared("the run goes on, and is not watched for signs of trouble", self.report):
                    self._give(step, self._look(self.step_log.records, self._measurements))

    def measured(self, record: dict) -> None:
        """Listens to the measurements of held-out data."""
        self._measurements.append(record)
        self._give(record["step"], diagnosis.of_measurements(self._measurements, self.step_log.records))

    def _give(self, step: int, found: Iterable[Advice]) -> None:
        for advice in found:
            if any(line.get("kind") == advice.kind for line in self.given):
                continue
            self.report(f"{WARNING}{advice.warning}; {advice.remedy}")
            self.given.append({"step": step, **advice._asdict()})
            if self._incomplete:
                self._write_whole()
                continue
            with self._spared(), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(sealed(self.given[-1])) + "\n")

    @contextlib.contextmanager
    def _spared(self) -> Iterator[None]:
        with spared(f"the run goes on, and {self.path} lacks lines", self.report):
            self._incomplete = True
            yield
            self._incomplete = False

    def _write_whole(self) -> None:
        with self._spared(), atomic_path(self.path, overwrite=True) as temporary:
            lines = (json.dumps(sealed(line)) + "\n" for line in self.given)
            temporary.write_text("".join(lines), encoding="utf-8")


def of_start(config: TrainConfig, dataset: Dataset, width: int) -> Iterator[Advice]:
    """What can be told before the first step. width: of the model."""
    if rate := unusual_rate(config, width):
        yield Advice("learning rate", rate, "watch the first steps; docs/adapters.md has the rates that were measured")
    trained, tokens = int(dataset.trained_counts.sum()), int(dataset.lengths.sum()) - len(dataset)
    yield from diagnosis.of_data(trained, tokens)


def kept_warnings(path: Path, step: int) -> list[dict]:
    """The warnings that earlier processes of a run gave up to `step`, after which it is continued."""
    return [line for line in sealed_lines(path) if line.keys() >= {"step", *Advice._fields} and line["step"] <= step]
