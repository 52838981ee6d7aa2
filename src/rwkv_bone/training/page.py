"""The run's page, `report.html`: renewed while it trains, and what it shows that no other file holds."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, Trainer

from rwkv_bone import __version__
from rwkv_bone.checkpoints import atomic_path
from rwkv_bone.config import DataConfig
from rwkv_bone.config.checksum import sealed
from rwkv_bone.data import Dataset, load_tokenizer
from rwkv_bone.data.preview import marked
from rwkv_bone.errors import Interrupted
from rwkv_bone.report import page
from rwkv_bone.report.run import DONE, FAILED, INTERRUPTED, RUNNING
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.project import PAGE, PREVIEW, RESUME_FILE, spared

SAMPLES, TOKENS = 3, 400  # most that are shown of the training data: samples, tokens of one
RENEWALS = 10  # of the page in a run, at least
PACKAGES = ("torch", "lightning", "deepspeed", "numpy")


class RenewPage(Callback):
    """Write `report.html` before the first step, at each measurement, every tenth of the run, and at its end.

    It also writes `preview.json`: {state, total_steps, data, samples, environment, next}. `next` is a list of [what,
    command]; a sample of preference data has `answer`: chosen, rejected, good or bad. data: settings with the model's
    tokenizer; lines: of `Dataset.summary_lines` and the like; go_on: what to type to continue this run; environment:
    {what: value}. What fails here is reported and costs the run nothing.
    """

    def __init__(
        self,
        folder: Path,
        data: DataConfig,
        vocab_size: int,
        *,
        environment: dict[str, str],
        go_on: str,
        report: Callable[[str], None],
    ):
        self.folder, self.data, self.vocab_size, self.report = folder, data, vocab_size, report
        self._go_on, self._renewed, self._told = go_on, 0, False
        self._content: dict[str, Any] = {"environment": environment}

    def on_fit_start(self, trainer: Trainer, module: TrainingModule) -> None:
        self._renewed = module.first_step
        if not trainer.is_global_zero:
            return
        with spared(f"{self.folder / PAGE} shows no sample of the data", self.report):
            dataset = module.plan.dataset
            self._content |= {"data": list(dataset.summary_lines()), "samples": self._samples(dataset)}
        self._content |= {"total_steps": module.total_steps}
        self._renew(RUNNING)

    def measured(self, record: dict[str, Any]) -> None:
        """After a measurement, as a listener of `HeldOut`, on the main process."""
        self._renewed = record["step"]
        if "state" in self._content:  # a run whose last measurement alone was left has not begun here
            self._renew()

    def on_train_batch_end(
        self, trainer: Trainer, module: TrainingModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if not (module.window_finished() and trainer.is_global_zero and module.window):
            return
        step = module.window.step
        if step - self._renewed >= -(-module.total_steps // RENEWALS) and step < module.total_steps:
            self._renewed = step
            self._renew()

    def on_exception(self, trainer: Trainer, module: TrainingModule, exception: BaseException) -> None:
        if trainer.is_global_zero:
            stopped = isinstance(exception, (Interrupted, KeyboardInterrupt))
            saved = (self.folder / RESUME_FILE).exists()
            self._renew(INTERRUPTED if stopped else FAILED, [("continue", self._go_on)] if saved else [])

    def done(self, following: Sequence[tuple[str, str]]) -> None:
        """The last page of a run. following: (what, command) of what to do with its result."""
        self._renew(DONE, following)

    def _renew(self, state: str = "", following: Sequence[tuple[str, str]] = ()) -> None:
        """Write the page; first that the run's state is another, if one is given."""
        with spared(f"{self.folder / PAGE} is not renewed; the run goes on", self._report_once):
            if state:
                self._content |= {"state": state, "next": [list(pair) for pair in following]}
                with atomic_path(self.folder / PREVIEW, overwrite=True) as temporary:
                    temporary.write_text(json.dumps(sealed(self._content), indent=1) + "\n", encoding="utf-8")
            page.write(self.folder)

    def _report_once(self, problem: str) -> None:
        """A full disk would else be told of at every renewal."""
        if not self._told:
            self.report(problem)
        self._told = True

    def _samples(self, dataset: Dataset) -> list[dict[str, Any]]:
        tokenizer = load_tokenizer(self.data.tokenizer, self.vocab_size)
        chosen = np.unique(np.linspace(0, len(dataset) - 1, SAMPLES).round().astype(int))
        return [
            {
                "origin": sample.origin,
                "tokens": len(sample.ids),
                "trained": int(sample.trained.sum()),
                "pieces": [list(piece) for piece in marked(sample, tokenizer, TOKENS)],
                "more": max(len(sample.ids) - TOKENS, 0),
                **({"answer": answer} if answer else {}),
            }
            for index in map(int, chosen)
            for sample, answer in zip(dataset.sequences(index), _answers(dataset, index), strict=True)
        ]


def _answers(dataset: Dataset, index: int) -> tuple[str, ...]:
    """What each sequence of a sample is, where answers are compared; else nothing."""
    if dataset.members == 2:
        return "chosen", "rejected"
    return ("" if dataset.good is None else "good" if dataset.good[index] else "bad",)


def environment(**facts: str) -> dict[str, str]:
    """Versions of what computes, and these facts."""
    found = {"rwkv-bone": __version__, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | {"system": platform.platform()} | facts
