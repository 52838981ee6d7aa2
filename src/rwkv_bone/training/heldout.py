"""Held-out loss and exact answers, measured before and after training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

from lightning.pytorch import Callback, Trainer

from rwkv_bone.checkpoints import atomic_path
from rwkv_bone.config.checksum import is_intact, sealed
from rwkv_bone.config.fields import is_number
from rwkv_bone.console import counted
from rwkv_bone.data import Dataset
from rwkv_bone.data.fingerprint import data_fingerprint
from rwkv_bone.data.tokenizer import Tokenizer
from rwkv_bone.errors import JSON_ERRORS, UserError
from rwkv_bone.inference.evaluate import Answer, exact_match, heldout_loss
from rwkv_bone.training import project
from rwkv_bone.training.context import chunked_loss
from rwkv_bone.training.module import TrainingModule

SHOWN = 4  # sample prompts printed


@dataclass(frozen=True)
class Measured:
    """One measurement."""

    loss: float  # nats per trained token
    tokens: int  # trained tokens
    exact: float | None  # fraction of answers that are right; None without prompts
    answers: list[Answer]
    step: int  # optimiser steps taken before

    @classmethod
    def from_record(cls, record: dict) -> Measured:
        """The inverse of `record`; KeyError, TypeError or ValueError for anything else."""
        answers = [Answer(**answer) for answer in record["answers"]]
        measured = cls(record["loss"], record["tokens"], record["exact_match"], answers, record["step"])
        texts = all(isinstance(text, str) for answer in answers for text in answer)
        counts = type(measured.tokens) is type(measured.step) is int
        numbers = is_number(measured.loss) and (measured.exact is None or is_number(measured.exact))
        if not (texts and counts and numbers):
            raise TypeError("a value of another type than it was written with")
        return measured

    def record(self) -> dict:
        return {
            "step": self.step,
            "loss": self.loss,
            "tokens": self.tokens,
            "exact_match": self.exact,
            "answers": [answer._asdict() for answer in self.answers],
        }

    def line(self) -> str:
        text = f"loss {self.loss:.4f} nats per token ({counted(self.tokens, 'token')})"
        if self.exact is not None:
            correct = sum(answer.correct for answer in self.answers)
            text += f", exact match {self.exact:.1%} ({correct} of {len(self.answers)})"
        return text


class HeldOut(Callback):
    """Measure held-out data before the first step and after the last one.

    Every rank does the same, since at ZeRO stage 3 no rank can run the model alone. The loss is computed in chunks of
    `chunk` tokens as in training (0 = whole samples), so measuring needs no more memory than training. A continued run
    takes the measurement before training from what the file at `path` held (`found`), if the data is still the same.
    """

    def __init__(
        self,
        dataset: Dataset,
        pairs: Sequence[tuple[str, str]],
        tokenizer: Tokenizer | None,
        *,
        micro_bsz: int,
        chunk: int,
        path: Path,
        found: str | None,
        report: Callable[[str], None],
    ):
        self.dataset, self.pairs, self.tokenizer = dataset, pairs, tokenizer
        self.micro_bsz, self.chunk, self.path, self.report = micro_bsz, chunk, path, report
        self.records: list[dict] = []
        self.listeners: list[Callable[[dict], None]] = []
        self.before: Measured | None = None
        self.after: Measured | None = None
        measured = json.dumps([data_fingerprint(dataset), [list(pair) for pair in pairs]])
        self._data = blake2b(measured.encode(), digest_size=16).hexdigest()
        if found is not None:
            try:
                self.before, self.after = read_measured(found, path, self._data)
            except UserError:
                report(f"held-out  {path} is damaged: what it held is measured again, as far as that is possible")

    @property
    def fingerprint(self) -> str:
        """Of the samples and prompts."""
        return self._data

    def interrupted(self, total_steps: int) -> bool:
        """Whether the run was measured before its first step and not after its last."""
        return self.before is not None and not (self.after and self.after.step >= total_steps)

    def on_fit_start(self, trainer: Trainer, module: TrainingModule) -> None:
        # A run that was stopped in its last measurement has no step left. Lightning then calls no hook but this one.
        if module.first_step >= module.total_steps:
            self.finish(module, write=trainer.is_global_zero)

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        if self.before:
            self.report(f"before    {self.before.line()}, measured when the run began")
            return
        self.before = self._measure(module, module.first_step)
        late = f", after step {module.first_step}" if module.first_step else ""
        self.report(f"before    {self.before.line()}{late}")
        if trainer.is_global_zero:
            self._write()

    def on_train_end(self, trainer: Trainer, module: TrainingModule) -> None:
        self.finish(module, write=trainer.is_global_zero)

    def finish(self, module: TrainingModule, write: bool) -> None:
        """Measure the trained model, report what changed, and `write` both measurements."""
        before, after = self.before, self._measure(module, module.total_steps)
        assert before
        self.after = after
        self.report(f"before    {before.line()}")
        self.report(f"after     {after.line()}")
        for old, new in list(zip(before.answers, after.answers, strict=True))[:SHOWN]:
            self.report(f"\n  prompt    {shown(new.prompt)}\n  expected  {shown(new.expected)}")
            self.report(f"  before    {shown(old.got)}\n  after     {shown(new.got)}")
        if write:
            self._write()

    def points(self) -> list[tuple[int, float]]:
        """(step, loss) of the measurements made so far."""
        return [(measured.step, measured.loss) for measured in (self.before, self.after) if measured]

    def _measure(self, module: TrainingModule, step: int) -> Measured:
        module.eval()  # an adapter's dropout is for training alone
        # The module itself is called, not its model: at stage 3 DeepSpeed's hooks begin with that call.
        sum_of = partial(chunked_loss, module, chunk=self.chunk) if self.chunk else module
        loss, tokens = heldout_loss(sum_of, self.dataset, micro_bsz=self.micro_bsz, device=module.device)
        exact: float | None = None
        answers: list[Answer] = []
        if self.pairs:
            assert self.tokenizer
            exact, answers = exact_match(module, self.tokenizer, self.pairs, device=module.device)
        module.train()
        return Measured(loss, tokens, exact, answers, step)

    def _write(self) -> None:
        measured = {"before": self.before, "after": self.after}
        content = {"data": self._data} | {when: one.record() for when, one in measured.items() if one}
        with project.spared("the measurement is only shown here", self.report):
            text = json.dumps(sealed(content), indent=2, ensure_ascii=False) + "\n"
            with atomic_path(self.path, overwrite=True) as temporary:
                # Half of a character outside the basic plane, which JSON can hold, is written as its number.
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def text_of(path: Path) -> str | None:
    """What an earlier process's file holds; nothing of one that cannot be read; None if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return ""


def read_measured(text: str, path: Path, data: str) -> tuple[Measured | None, Measured | None]:
    """The measurements (before, after) in the text of an earlier process's file; None for what is not of this `data`.

    path: the file, for the error. UserError if it is not one of ours.
    """
    try:
        written = json.loads(text)
        found = {when: Measured.from_record(written[when]) for when in ("before", "after") if when in written}
        same = written["data"] == data
        if not is_intact(written, ("data", "before", "after")):
            raise TypeError("its checksum is not that of its content")
    except (KeyError, TypeError, AttributeError, *JSON_ERRORS) as error:
        raise UserError(
            f"{path} cannot be read as measurements of a run ({type(error).__name__}: {error}): restore or remove it"
        ) from None
    return (found.get("before"), found.get("after")) if same else (None, None)


def shown(text: str, width: int = 100) -> str:
    """A text on one line, in quotes; the middle of a long text is left out."""
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted if len(quoted) <= width else f"{quoted[: width // 2]} ... {quoted[-width // 2 :]}"
