"""Warnings of a run that goes wrong: each once, with its remedy, on the terminal and in `warnings.jsonl`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from rwkv_bone.config import TrainConfig
from rwkv_bone.config.preferences import decided
from rwkv_bone.config.rates import unusual_rate
from rwkv_bone.data import Dataset
from rwkv_bone.data.lost import WARNING
from rwkv_bone.training import diagnosis, preference_diagnosis
from rwkv_bone.training.diagnosis import Advice
from rwkv_bone.training.log import StepLog
from rwkv_bone.training.measurements import Lines, added, read_lines
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.project import spared

LINE = {"step": int, **dict.fromkeys(Advice._fields, str)}  # of warnings.jsonl
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
        self.step_log, self.config, self.report = step_log, config, report
        self.width, self.vocab_size = width, vocab_size
        self._lines = Lines(path, kept, report)
        self._measurements = list(measurements)
        self._look: Callable[..., list[Advice]] | None = None
        self._answers: Callable[[Sequence[dict]], list[Advice]] | None = None  # of preference tuning

    @property
    def given(self) -> list[dict]:
        """The lines of the file."""
        return self._lines.records

    def on_fit_start(self, trainer: Trainer, module: TrainingModule) -> None:
        if not trainer.is_global_zero or not module.steps_left:
            return
        task = self.config.data.task
        self._look = partial(
            diagnosis.of_steps,
            per_token=task == "sft",
            total_steps=module.total_steps,
            vocab_size=self.vocab_size,
            grad_clip=self.config.optim.grad_clip,
            from_scratch=not self.config.model.load_model,
            process_began=module.first_step,
        )
        if task != "sft":
            settings = decided(self.config.preference, task)
            about = {"task": task, "settings": settings, "total_steps": module.total_steps}
            self._answers = partial(preference_diagnosis.of_steps, **about)
        self._lines.begin()
        self._give(module.first_step, of_start(self.config, module.plan.dataset, self.width))

    def on_train_batch_end(
        self, trainer: Trainer, module: TrainingModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if self._look and module.window_finished():
            step = self.step_log.records[-1]["step"]
            if step % EVERY == 0 or step == module.total_steps:
                with spared("the run goes on, and is not watched for signs of trouble", self.report):
                    self._give(step, self._look(self.step_log.records, self._measurements))
                    self._give(step, self._answers(self.step_log.records) if self._answers else ())

    def measured(self, record: dict) -> None:
        """Listens to the measurements of held-out data."""
        self._measurements = added(self._measurements, record)
        known = self._measurements, self.step_log.records
        self._give(record["step"], diagnosis.of_measurements(*known))
        if (task := self.config.data.task) != "sft":
            self._give(record["step"], preference_diagnosis.of_measurements(*known, task=task))

    def _give(self, step: int, found: Iterable[Advice]) -> None:
        for advice in found:
            if any(line["kind"] == advice.kind for line in self.given):
                continue
            self.report(f"{WARNING}{advice.warning}; {advice.remedy}")
            now = [line for line in self.given if line["step"] == step]
            self._lines.add([*now, {"step": step, **advice._asdict()}])


def of_start(config: TrainConfig, dataset: Dataset, width: int) -> Iterator[Advice]:
    """What can be told before the first step. width: of the model."""
    if rate := unusual_rate(config, width):
        yield Advice("learning rate", rate, "watch the first steps; docs/adapters.md has the rates that were measured")
    if config.data.task != "sft":
        return  # prompts are read alone there, however long they are
    trained, tokens = int(dataset.trained_counts.sum()), int(dataset.lengths.sum()) - len(dataset)
    yield from diagnosis.of_data(trained, tokens)


def kept_warnings(path: Path, step: int) -> list[dict]:
    """The warnings that earlier processes of a run gave up to `step`, after which it is continued."""
    return read_lines(path, LINE, step)
