"""The main held-out data before and after training, with every answer: `evaluation.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rwkv_bone.checkpoints import atomic_path
from rwkv_bone.config.checksum import is_intact, sealed
from rwkv_bone.config.fields import is_number
from rwkv_bone.console import counted
from rwkv_bone.errors import JSON_ERRORS, UserError
from rwkv_bone.inference.evaluate import Answer
from rwkv_bone.training.measurements import is_preference


@dataclass(frozen=True)
class Measured:
    """One measurement."""

    loss: float  # nats per trained token; of preference data the task's loss of a pair, or of an answer
    tokens: int  # trained tokens
    exact: float | None  # fraction of answers that are right; None without prompts
    answers: list[Answer]
    step: int  # optimiser steps taken before
    preference: dict[str, float | None] | None = None  # of preference data, as a record has it

    @classmethod
    def from_record(cls, record: dict) -> Measured:
        """The inverse of `record`; KeyError, TypeError or ValueError for anything else."""
        answers = [Answer(**answer) for answer in record["answers"]]
        more = record.get("preference")  # earlier versions wrote none
        measured = cls(record["loss"], record["tokens"], record["exact_match"], answers, record["step"], more)
        texts = all(isinstance(text, str) for answer in answers for text in answer)
        counts = type(measured.tokens) is type(measured.step) is int
        numbers = is_number(measured.loss) and (measured.exact is None or is_number(measured.exact))
        if not (texts and counts and numbers and is_preference(more)):
            raise TypeError("a value of another type than it was written with")
        return measured

    def record(self) -> dict:
        more = {} if self.preference is None else {"preference": self.preference}
        return {
            "step": self.step,
            "loss": self.loss,
            "tokens": self.tokens,
            "exact_match": self.exact,
            **more,
            "answers": [answer._asdict() for answer in self.answers],
        }

    def line(self) -> str:
        if self.preference is None:
            text = f"loss {self.loss:.4f} nats per token ({counted(self.tokens, 'token')})"
        else:
            words = [f"loss {self.loss:.4f} per {unit_of(self.preference)}", *preference_words(self.preference)]
            text = ", ".join(words)
        if self.exact is not None:
            correct = sum(answer.correct for answer in self.answers)
            text += f", exact match {self.exact:.1%} ({correct} of {len(self.answers)})"
        return text


def unit_of(preference: Mapping[str, float | None]) -> str:
    """What the loss is of: `pair`, or `answer` with its label, which alone has the estimate of the divergence."""
    return "pair" if preference["kl"] is None else "answer"


def preference_words(preference: Mapping[str, float | None]) -> list[str]:
    """`accuracy 71.2%`, `margin 0.523`, `KL 0.0123`: what a line says of held-out answers."""
    how = {"reward_accuracy": "accuracy {:.1%}", "reward_margin": "margin {:.3f}", "divergence": "KL {:.4f}"}
    return [text.format(value) for name, text in how.items() if (value := preference.get(name)) is not None]


def write_measured(path: Path, data: str, before: Measured | None, after: Measured | None) -> None:
    """Write measurements of the data with this hash, atomically; OSError where the disk refuses them."""
    measured = {"before": before, "after": after}
    content = {"data": data} | {when: one.record() for when, one in measured.items() if one}
    text = json.dumps(sealed(content), indent=2, ensure_ascii=False) + "\n"
    with atomic_path(path, overwrite=True) as temporary:
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
