"""Held-out data, measured before, while and after a run trains."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Callback, Trainer

from rwkv_bone.config.heldout import MAIN
from rwkv_bone.data import Dataset
from rwkv_bone.data.fingerprint import data_fingerprint
from rwkv_bone.data.tokenizer import Tokenizer, encode_marked
from rwkv_bone.errors import UserError
from rwkv_bone.inference.evaluate import Answer, exact_match, heldout_loss
from rwkv_bone.inference.generate import generate
from rwkv_bone.training import project
from rwkv_bone.training.best import Best, is_best, read_best, since_best
from rwkv_bone.training.context import chunked_loss
from rwkv_bone.training.evaluation import Measured, preference_words, read_measured, write_measured
from rwkv_bone.training.heldout_answers import Loss, MeasureAnswers
from rwkv_bone.training.measurements import Lines
from rwkv_bone.training.module import TrainingModule, evaluating

SHOWN = 4  # sample prompts printed
LONGEST = 100  # tokens of an answer to a sample prompt


@dataclass(frozen=True)
class HeldOutSet:
    """Data that is measured and not trained.

    dataset: all of it; part: what is measured each time, which is the same or, of a large one, a fixed part. pairs:
    prompts and the answers to compare. general: it shows what the model forgets, not what it learns.
    """

    name: str
    dataset: Dataset
    part: Dataset
    pairs: tuple[tuple[str, str], ...] = ()
    general: bool = False

    @cached_property
    def data(self) -> str:
        """A hash of what is measured each time."""
        return blake2b(data_fingerprint(self.part).encode(), digest_size=8).hexdigest()

    def name_of(self, dataset: Dataset) -> str:
        """What `dataset` or `part` is called beside other data of the run."""
        name = MAIN if self.name == MAIN else f"{MAIN} {self.name}"
        return name if dataset is self.dataset else f"{name}, part"


@dataclass(frozen=True)
class Prompt:
    """A prompt that is answered at each measurement, and what the data expects there."""

    set: str
    text: str
    expected: str | None = None


class Unmeasured(Exception):
    """A measurement while training was left, since the run is to end."""


class SavesBest(Protocol):
    """Writes `rwkv-best.pth`, as `SaveTrained` does; called on every rank."""

    def save_best(self, trainer: Trainer, module: TrainingModule, step: int, about: dict[str, Any]) -> None: ...


class HeldOut(Callback):
    """Measure held-out data before the first step, after the last one, and when `MeasureWhileTraining` asks for it.

    Every rank does the same, since at ZeRO stage 3 no rank can run the model alone; what follows from a measurement the
    main process decides. The loss is computed in chunks of `chunk` tokens as in training (0 = whole samples), so
    measuring needs no more memory than training.

    sets: the main one first, the general one last. prompts: answered at each measurement. path: `evaluation.json`, with
    the main set before and after training; a continued run takes the measurement before training from what that file
    held (`found`), if the data is still the same. kept: the measurements of an earlier process that this run goes on
    from, and the answers to sample prompts. every: optimiser steps between measurements, if that is known. early_stop:
    what `since_best` may come to, 0 = anything. guess: the loss of a model that knows nothing, in nats per token.
    answers: measures the sets of preference data.

    records, samples: the lines of `measurements.jsonl` and `samples.jsonl`. listeners: called on the main process with
    each record, once it is written. save: to be set before the run begins.
    """

    def __init__(
        self,
        sets: Sequence[HeldOutSet],
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer | None,
        *,
        micro_bsz: int,
        chunk: int,
        path: Path,
        found: str | None,
        report: Callable[[str], None],
        kept: tuple[Sequence[dict], Sequence[dict]] = ((), ()),
        every: int | None = None,
        early_stop: int = 0,
        guess: float = math.inf,
        answers: MeasureAnswers | None = None,
    ):
        self.sets, self.prompts, self.tokenizer = list(sets), list(prompts), tokenizer
        self.micro_bsz, self.chunk, self.path, self.report = micro_bsz, chunk, path, report
        self.early_stop, self.guess, self.answers = early_stop, guess, answers
        self.save: SavesBest | None = None
        self.listeners: list[Callable[[dict], None]] = []
        self.before: Measured | None = None
        self.after: Measured | None = None
        self.every = every
        self._lines = Lines(path.with_name(project.MEASUREMENTS), kept[0], report)
        self._samples = Lines(path.with_name(project.SAMPLES), kept[1], report)
        self.best: Best | None = None
        self._costs = dict.fromkeys(("loss", "exact_match", "samples"), 0.0)  # seconds, of the last measurement
        measured = json.dumps([data_fingerprint(self.main.dataset), [list(pair) for pair in self.main.pairs]])
        self._data = blake2b(measured.encode(), digest_size=16).hexdigest()
        if found is not None:
            try:
                self.before, self.after = read_measured(found, path, self._data)
            except UserError:
                report(f"held-out  {path} is damaged: what it held is measured again, as far as that is possible")

    @property
    def main(self) -> HeldOutSet:
        return self.sets[0]

    @property
    def general(self) -> HeldOutSet | None:
        return self.sets[-1] if self.sets[-1].general else None

    @property
    def records(self) -> list[dict]:
        return self._lines.records

    @property
    def samples(self) -> list[dict]:
        return self._samples.records

    @property
    def fingerprint(self) -> str:
        """Of the samples and prompts."""
        prompts = [[prompt.set, prompt.text] for prompt in self.prompts]
        content = json.dumps([self._data, [one.data for one in self.sets], prompts])
        return blake2b(content.encode(), digest_size=16).hexdigest()

    def interrupted(self, step: int) -> bool:
        """Whether the run was measured before its first step, and not after this one, its last."""
        return self.before is not None and not (self.after and self.after.step >= step)

    def stopped(self, step: int) -> bool:
        """Whether a run that has come to this step has ended early, by what was measured there."""
        if not self.early_stop or not self.records or self.records[-1]["step"] != step:
            return False
        return since_best(self.records) >= self.early_stop

    def on_fit_start(self, trainer: Trainer, module: TrainingModule) -> None:
        # A run that was stopped in its last measurement has no step left. Lightning then calls no hook but this one.
        if not module.steps_left:
            self._begin(trainer, module)
            self.finish(trainer, module)

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        self._begin(trainer, module)
        step, last = module.first_step, self.records[-1]["step"] if self.records else -1
        if self.before is None:
            self.before = self._measure(module, step)
            late = f", after step {step}" if step else ""
            self.report(f"before    {self.before.line()}{late}")
            if trainer.is_global_zero:
                self._write()
            self.record(trainer, module, step, main=self.before)
            return
        self.report(f"before    {self.before.line()}, measured when the run began")
        # A kill may have come between a step and the measurement after it.
        if last < 0 or (self.every and step % self.every == 0 and step > last):
            self.record(trainer, module, step, exact=False)

    def on_train_end(self, trainer: Trainer, module: TrainingModule) -> None:
        self.finish(trainer, module)

    def finish(self, trainer: Trainer, module: TrainingModule) -> None:
        """Measure the trained model, report what changed, and write it."""
        step = module.window.step if module.window else module.first_step
        before, after = self.before, self._measure(module, step)
        assert before
        self.after = after
        self.record(trainer, module, step, main=after)
        self.report(f"before    {before.line()}")
        self.report(f"after     {after.line()}")
        for old, new in list(zip(before.answers, after.answers, strict=True))[:SHOWN]:
            self.report(f"\n  prompt    {shown(new.prompt)}\n  expected  {shown(new.expected)}")
            self.report(f"  before    {shown(old.got)}\n  after     {shown(new.got)}")
        if trainer.is_global_zero:
            self._write()

    def record(
        self,
        trainer: Trainer,
        module: TrainingModule,
        step: int,
        *,
        samples: bool = True,
        exact: bool = True,
        main: Measured | None = None,
    ) -> bool:
        """Measure every set after `step`, and write it; whether the run is to end early.

        To be called on every rank, which all return the same. samples: whether the sample prompts are answered; exact:
        whether exact answers are counted. main: what was measured of the whole main set already.
        """
        if main is None:
            self._costs = dict.fromkeys(self._costs, 0.0)
        try:
            with evaluating(module):
                measured = {one.name: self._set(module, one, exact, main) for one in self.sets}
                answers = self._answer_prompts(module, step) if samples else []
        except Unmeasured:
            module.train()
            self.report(f"measured  not after step {step}, as the run is to end: it is made good when the run goes on")
            return False
        record = {
            "step": step,
            "seconds": round(sum(self._costs.values()), 3),
            "sets": measured,
            "main": self.main.name,
            "general": self.general.name if self.general else None,
            "best": False,
            "every": self.every,
            "data": {one.name: one.data for one in self.sets},
            "costs": {name: round(seconds, 3) for name, seconds in self._costs.items()},
        }
        return self._settle(trainer, module, record, answers)

    def _settle(self, trainer: Trainer, module: TrainingModule, record: dict, samples: list[dict]) -> bool:
        """Save the adapter if it is the best, and write the record; whether the run is to end early."""
        step, loss = record["step"], record["sets"][self.main.name]["loss"]
        if loss is None:
            self.report(f"warning: the held-out loss after step {step} is not a finite number: it never counts as best")
        # The main process decides: the losses of other ranks may be rounded otherwise.
        best = trainer.strategy.broadcast(bool(step) and is_best(self.best, step, loss))
        if best:
            assert self.save
            # Before the record: where that says so, the file is there.
            self.save.save_best(trainer, module, step, {"heldout": {"loss": loss, "data": self.main.data}})
            self.best, record["best"] = Best(step, loss), True
        if trainer.strategy.broadcast(self._says_nothing(record)):
            self._leave_general_out(record)
        if trainer.is_global_zero:
            self._lines.add([record])
            self._samples.add(samples)
            for line in self._said(record, samples):
                self.report(line)
            for listener in self.listeners:
                listener(record)
        return bool(trainer.strategy.broadcast(self.stopped(step)))

    def _says_nothing(self, record: dict) -> bool:
        """Whether the first measurement shows that the base model knows nothing of the general text."""
        if self.general is None or self.records:
            return False
        loss = record["sets"][self.general.name]["loss"]
        return loss is None or loss >= self.guess

    def _leave_general_out(self, record: dict) -> None:
        assert self.general
        one, measured = self.general, record["sets"].pop(self.general.name)
        self.sets.remove(one)
        record["data"].pop(one.name)
        record["general"] = None
        loss = "no finite number" if measured["loss"] is None else f"{measured['loss']:.2f}"
        self.report(
            f"general   not measured: the base's loss on it, {loss}, is no better than guessing ({self.guess:.2f}), so "
            "that there is nothing to forget, or its tokens mean something else there (--eval_general FILE)"
        )

    def _set(self, module: TrainingModule, one: HeldOutSet, exact: bool, main: Measured | None) -> dict[str, Any]:
        """One set as the record has it. main: the whole main set, if that was measured."""
        known = main if one is self.main else None
        if known and one.part is one.dataset:
            found = Loss(known.loss, known.tokens, known.preference)
        else:
            with self._timed("loss"):
                found = self._loss(module, one, one.part)
        match: float | None = None
        if exact and one.pairs:
            if known:
                match = known.exact
            else:
                with self._timed("exact_match"):
                    match, _ = self._answers(module, one)
        return {
            "loss": found.loss if math.isfinite(found.loss) else None,
            "tokens": found.tokens,
            "samples": len(one.part),
            "exact_match": match,
            "prompts": 0 if match is None else len(one.pairs),
            **({} if found.preference is None else {"preference": found.preference}),
        }

    def _measure(self, module: TrainingModule, step: int) -> Measured:
        """The whole main set, and the answers to its prompts."""
        self._costs = dict.fromkeys(self._costs, 0.0)
        exact: float | None = None
        answers: list[Answer] = []
        with evaluating(module):
            with self._timed("loss"):
                found = self._loss(module, self.main, self.main.dataset)
            if self.main.pairs:
                with self._timed("exact_match"):
                    exact, answers = self._answers(module, self.main)
        if self.main.part is not self.main.dataset:
            self._costs["loss"] = 0.0  # a part is measured each time
        return Measured(found.loss, found.tokens, exact, answers, step, found.preference)

    def _loss(self, module: TrainingModule, one: HeldOutSet, dataset: Dataset) -> Loss:
        """Of a set, or of its part."""
        if self.answers and not one.general:
            return self.answers(module, one.name_of(dataset), dataset)
        # The module itself is called, not its model: at stage 3 DeepSpeed's hooks begin with that call.
        sum_of = partial(chunked_loss, module, chunk=self.chunk) if self.chunk else module
        return Loss(*heldout_loss(sum_of, dataset, micro_bsz=self.micro_bsz, device=module.device))

    def _answers(self, module: TrainingModule, one: HeldOutSet) -> tuple[float, list[Answer]]:
        assert self.tokenizer
        return exact_match(module, self.tokenizer, one.pairs, device=module.device)

    def _answer_prompts(self, module: TrainingModule, step: int) -> list[dict]:
        """The greedy answers to the sample prompts, as `samples.jsonl` has them."""
        if not self.prompts:
            return []
        assert self.tokenizer
        tokenizer = self.tokenizer
        ids = [encode_marked(tokenizer, prompt.text) or [tokenizer.eod] for prompt in self.prompts]
        how: dict[str, Any] = {"max_new": self._longest, "stop_id": tokenizer.eod, "device": module.device}
        with self._timed("samples"):
            written = generate(module, ids, **how)
        return [
            {"step": step, "set": one.set, "prompt": one.text, "expected": one.expected, "text": tokenizer.decode(text)}
            for one, text in zip(self.prompts, written, strict=True)
        ]

    @cached_property
    def _longest(self) -> int:
        """Tokens of an answer to a sample prompt: one more than what is expected has, and at most LONGEST."""
        assert self.tokenizer
        expected = [prompt.expected for prompt in self.prompts]
        return min(LONGEST, 1 + max(LONGEST if text is None else len(self.tokenizer.encode(text)) for text in expected))

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._costs[what] += time.perf_counter() - begin

    def _begin(self, trainer: Trainer, module: TrainingModule) -> None:
        if self.answers:
            # Of the others only a part is measured, be that the whole.
            measured = [(self.main, self.main.dataset), *((one, one.part) for one in self.sets if not one.general)]
            datasets = {one.name_of(dataset): dataset for one, dataset in measured}
            self.answers.begin(trainer, module, datasets)
        if not trainer.is_global_zero:
            return
        self._lines.begin()
        self._samples.begin()
        self.best, lost = read_best(self.path.with_name(project.BEST), self.main.data, self.records)
        if lost:
            self.report(f"warning: {lost}")

    def _said(self, record: dict, samples: list[dict]) -> Iterator[str]:
        """What the terminal shows of a measurement: a line of numbers, and the first answer."""
        numbers = []
        for name, one in record["sets"].items():
            numbers.append(f"{name} {'not finite' if one['loss'] is None else format(one['loss'], '.4f')}")
            if name == record["main"] and self.best:
                numbers[-1] += " (best)" if record["best"] else f" (best {self.best.loss:.4f}, step {self.best.step})"
            numbers[-1] = ", ".join([numbers[-1], *preference_words(one.get("preference") or {})])
            if one["exact_match"] is not None:
                numbers[-1] += f", exact match {one['exact_match']:.1%}"
        yield f"measured  step {record['step']}: {'; '.join(numbers)}"
        if samples:
            yield f"sample    {shown(samples[0]['prompt'], 40)} -> {shown(samples[0]['text'], 60)}"

    def _write(self) -> None:
        with project.spared("the measurement is only shown here", self.report):
            write_measured(self.path, self._data, self.before, self.after)


def shown(text: str, width: int = 100) -> str:
    """A text on one line, in quotes; the middle of a long text is left out."""
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted if len(quoted) <= width else f"{quoted[: width // 2]} ... {quoted[-width // 2 :]}"
