"""Held-out loss and exact answers before and after training, and what changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

from lightning.pytorch import Callback

from rwkv_bone.checkpoints import atomic_path
from rwkv_bone.data.fingerprint import data_fingerprint
from rwkv_bone.inference.evaluate import Answer, exact_match, heldout_loss
from rwkv_bone.training.context import chunked_loss

SHOWN = 4  # sample prompts printed


@dataclass(frozen=True)
class Measured:
    loss: float
    tokens: int
    exact: float | None
    answers: list[Answer]
    step: int  # optimiser steps taken before

    @classmethod
    def from_record(cls, record: dict) -> Measured:
        answers = [Answer(**answer) for answer in record["answers"]]
        return cls(record["loss"], record["tokens"], record["exact_match"], answers, record["step"])

    def record(self) -> dict:
        return {
            "step": self.step,
            "loss": self.loss,
            "tokens": self.tokens,
            "exact_match": self.exact,
            "answers": [answer._asdict() for answer in self.answers],
        }

    def line(self) -> str:
        text = f"loss {self.loss:.4f} nats per token ({self.tokens:,} tokens)"
        if self.exact is not None:
            correct = sum(answer.correct for answer in self.answers)
            text += f", exact match {self.exact:.1%} ({correct} of {len(self.answers)})"
        return text


class HeldOut(Callback):
    """Measure on every rank alike: at ZeRO stage 3 no rank can run the model alone.

    The loss is computed in chunks of `chunk` tokens, as in training (0 = whole), so measuring needs no more memory.
    Of a run that is continued (`again`) the measurement before it is taken from its file, if the data is the same.
    """

    def __init__(
        self,
        dataset,
        pairs: Sequence[tuple[str, str]],
        tokenizer,
        *,
        micro_bsz: int,
        chunk: int,
        path: Path,
        again: bool,
        say,
    ):
        self.dataset, self.pairs, self.tokenizer = dataset, pairs, tokenizer
        self.micro_bsz, self.chunk, self.path, self.say = micro_bsz, chunk, path, say
        self.before: Measured | None = None
        self.after: Measured | None = None
        measured = json.dumps([data_fingerprint(dataset), [list(pair) for pair in pairs]])
        self._data = blake2b(measured.encode(), digest_size=16).hexdigest()
        if again and path.is_file():
            report = json.loads(path.read_text(encoding="utf-8"))
            if report["data"] == self._data:
                self.before = Measured.from_record(report["before"])
                self.after = report.get("after") and Measured.from_record(report["after"])

    def interrupted(self, total_steps: int) -> bool:
        """Whether the run was measured before its first step and not after its last."""
        return self.before is not None and not (self.after and self.after.step >= total_steps)

    def on_fit_start(self, trainer, module) -> None:
        # A run that was stopped in its last measurement has no step left, and Lightning calls no other hook.
        if module.first_step >= module.total_steps:
            self.finish(module, write=trainer.is_global_zero)

    def on_train_start(self, trainer, module) -> None:
        if self.before:
            self.say(f"before    {self.before.line()}, measured when the run began")
            return
        self.before = self._measure(module, module.first_step)
        late = f", after step {module.first_step}" if module.first_step else ""
        self.say(f"before    {self.before.line()}{late}")
        if trainer.is_global_zero:
            self._write()

    def on_train_end(self, trainer, module) -> None:
        self.finish(module, write=trainer.is_global_zero)

    def finish(self, module, write: bool) -> None:
        """Measure the trained model, say what changed, and `write` both measurements."""
        self.after = self._measure(module, module.total_steps)
        self.say(f"before    {self.before.line()}")
        self.say(f"after     {self.after.line()}")
        for old, new in list(zip(self.before.answers, self.after.answers, strict=True))[:SHOWN]:
            self.say(f"\n  prompt    {shown(new.prompt)}\n  expected  {shown(new.expected)}")
            self.say(f"  before    {shown(old.got)}\n  after     {shown(new.got)}")
        if write:
            self._write()

    def points(self) -> list[tuple[int, float]]:
        """(step, loss) of both measurements."""
        return [(measured.step, measured.loss) for measured in (self.before, self.after)]

    def _measure(self, module, step: int) -> Measured:
        module.eval()  # an adapter's dropout is for training alone
        # Called as a whole, as Lightning does for a training step: at stage 3 DeepSpeed's hooks begin with that call.
        sum_of = partial(chunked_loss, module, chunk=self.chunk) if self.chunk else module
        loss, tokens = heldout_loss(sum_of, self.dataset, micro_bsz=self.micro_bsz, device=module.device)
        exact, answers = None, []
        if self.pairs:
            exact, answers = exact_match(module, self.tokenizer, self.pairs, device=module.device)
        module.train()
        return Measured(loss, tokens, exact, answers, step)

    def _write(self) -> None:
        report = {"data": self._data, "before": self.before.record()}
        if self.after:
            report["after"] = self.after.record()
        with atomic_path(self.path, overwrite=True) as temporary:
            temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def shown(text: str, width: int = 100) -> str:
    """A text on one line, quoted, its middle left out if it is long."""
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted if len(quoted) <= width else f"{quoted[: width // 2]} ... {quoted[-width // 2 :]}"
