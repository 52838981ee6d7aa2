"""Held-out loss and exact answers before and after training, and what changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Callback

from rwkv_bone.checkpoint import atomic_path
from rwkv_bone.evaluate import Answer, exact_match, heldout_loss

SHOWN = 4  # sample prompts printed


@dataclass(frozen=True)
class Measured:
    loss: float
    tokens: int
    exact: float | None
    answers: list[Answer]

    def line(self) -> str:
        text = f"loss {self.loss:.4f} nats per token ({self.tokens:,} tokens)"
        if self.exact is not None:
            correct = sum(answer.correct for answer in self.answers)
            text += f", exact match {self.exact:.1%} ({correct} of {len(self.answers)})"
        return text


class HeldOut(Callback):
    """Measure on every rank alike: at ZeRO stage 3 no rank can run the model alone."""

    def __init__(self, dataset, pairs: Sequence[tuple[str, str]], tokenizer, *, micro_bsz: int, path: Path, say):
        self.dataset, self.pairs, self.tokenizer = dataset, pairs, tokenizer
        self.micro_bsz, self.path, self.say = micro_bsz, path, say
        self.before: Measured | None = None
        self.after: Measured | None = None

    def on_train_start(self, trainer, module) -> None:
        self.before = self._measure(module)
        self.say(f"before    {self.before.line()}")

    def on_train_end(self, trainer, module) -> None:
        self.after = self._measure(module)
        self.say(f"before    {self.before.line()}")
        self.say(f"after     {self.after.line()}")
        for old, new in list(zip(self.before.answers, self.after.answers, strict=True))[:SHOWN]:
            self.say(f"\n  prompt    {shown(new.prompt)}\n  expected  {shown(new.expected)}")
            self.say(f"  before    {shown(old.got)}\n  after     {shown(new.got)}")
        if trainer.is_global_zero:
            report = {"before": self._record(self.before), "after": self._record(self.after)}
            with atomic_path(self.path, overwrite=True) as temporary:
                temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _measure(self, module) -> Measured:
        loss, tokens = heldout_loss(module, self.dataset, micro_bsz=self.micro_bsz, device=module.device)
        if not self.pairs:
            return Measured(loss, tokens, None, [])
        exact, answers = exact_match(module, self.tokenizer, self.pairs, device=module.device)
        return Measured(loss, tokens, exact, answers)

    @staticmethod
    def _record(measured: Measured) -> dict:
        return {
            "loss": measured.loss,
            "tokens": measured.tokens,
            "exact_match": measured.exact,
            "answers": [answer._asdict() for answer in measured.answers],
        }


def shown(text: str, width: int = 100) -> str:
    """A text on one line, quoted, its middle left out if it is long."""
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted if len(quoted) <= width else f"{quoted[: width // 2]} ... {quoted[-width // 2 :]}"
