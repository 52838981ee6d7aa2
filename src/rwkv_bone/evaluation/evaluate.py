"""An evaluation from the settings to the table: rows read, questions put, answers written down, counted.

Answers are numbered: item by item, sample by sample. Batches are cut from this list at the same places whatever was
done before, so an answer has the same neighbours in a run that was interrupted and in one that was not. What an answer
is follows from its own question and its own random numbers; its neighbours can only change the rounding of a sum.
What all questions begin with, such as worked examples, is read once.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rwkv_bone import __version__, run_lock
from rwkv_bone.console import counted, progress_bar
from rwkv_bone.devices import select_device
from rwkv_bone.errors import UserError
from rwkv_bone.evaluation import answers as folder
from rwkv_bone.evaluation.answers import ANSWERS, CONFIG, RESULT, Record
from rwkv_bone.evaluation.flags import EvaluateConfig
from rwkv_bone.evaluation.items import Found, digest_of, read_items, worked_examples
from rwkv_bone.evaluation.judge import judged
from rwkv_bone.evaluation.questions import Asked, Questions
from rwkv_bone.evaluation.score import judged_by, result_of, table_of
from rwkv_bone.evaluation.tasks import TASKS, Task
from rwkv_bone.inference.generate import Known, read_beginning
from rwkv_bone.inference.likelihood import log_likelihoods, rolling
from rwkv_bone.inference.stopping import LENGTH
from rwkv_bone.inference.voice import Voice, enough_memory, load_voice, trained_with


def evaluate(cfg: EvaluateConfig) -> None:
    """Answer what is not answered yet, and print the table. UserError for all that is wrong with rows and files."""
    task = TASKS[cfg.task]
    output = Path(cfg.output)
    saved = None if cfg.overwrite else folder.read_config(output)
    if saved:
        folder.check_same(saved, cfg)
    elif not cfg.overwrite and (output / ANSWERS).exists():
        raise UserError(f"--output {output} holds answers without a {CONFIG}: give another folder, or --overwrite 1")
    found = read_items(cfg, task, _note)
    shots = worked_examples(cfg, task, found.questions, _note)
    with run_lock.held(output, "--output"):
        voice = _loaded(cfg)
        job = _Job(cfg, task, voice, found)
        places = job.read(Questions(cfg, task, voice.wording, shots))
        content = {"model": voice.fingerprint, "data": found.digest, "shots": digest_of(shots)}
        if saved:
            folder.check_content(saved, cfg, content)
        else:
            (output / ANSWERS).unlink(missing_ok=True)
            folder.write_json(output / CONFIG, _description(cfg, voice, content) | {"answers": len(places)})
        (output / RESULT).unlink(missing_ok=True)
        print(job.heading(len(shots)), flush=True)
        records, seconds = job.answered(places, output / ANSWERS)
        result: dict[str, Any] = {"model": voice.header, "data": found.names, "judged_by": judged_by(cfg, task)}
        result |= result_of(cfg, task, records)
        result["counts"] |= {"rows skipped": job.skipped} if job.skipped else {}
        folder.write_json(output / RESULT, result | {"seconds": round(seconds, 1)})
    print("\n".join(["", *table_of(task, result), "", f"answers   {output / ANSWERS}"]))


def _loaded(cfg: EvaluateConfig) -> Voice:
    device = select_device(cfg.accelerator, "--accelerator cpu")
    data, chosen = trained_with(cfg.adapter, cfg.tokenizer, cfg.template)
    how: dict[str, Any] = {"quant": cfg.quant, "precision": cfg.precision, "device": device, "data": data}
    with enough_memory("while the model was loaded"):
        return load_voice(cfg.load_model, cfg.adapter, **how, chosen=chosen, system=cfg.system)


def _description(cfg: EvaluateConfig, voice: Voice, content: dict[str, str]) -> dict[str, Any]:
    versions = {"rwkv_bone": __version__, "torch": metadata.version("torch"), "python": platform.python_version()}
    about = {"settings": folder.settings_of(cfg), "content": content, "versions": versions}
    return {"evaluation": folder.FORMAT, "model": voice.header, "template": voice.wording.template.name, **about}


@dataclass(frozen=True)
class _Place:
    """One answer to be written: a question, and which of its samples."""

    asked: Asked
    ids: Sequence[int]
    sample: int


class _Job:
    """The answers of an evaluation, in order."""

    def __init__(self, cfg: EvaluateConfig, task: Task, voice: Voice, found: Found):
        self.cfg, self.task, self.voice, self.found = cfg, task, voice, found
        self.skipped = found.skipped

    def read(self, questions: Questions) -> list[_Place]:
        """Every answer to be written. UserError, or with --bad_rows skip a note, for what the model cannot read."""
        places = []
        for item in self.found.items:
            try:
                asked = questions.ask(item)
                ids = self._encode(asked.prompt, item.where)
                for answer in asked.answers:
                    self._encode(answer, item.where)
            except UserError as error:
                if self.cfg.bad_rows == "stop":
                    raise UserError(f"{error} (--bad_rows skip leaves such rows out and counts them)") from error
                self.skipped += 1
                _note(f"skipped: {error}")
                continue
            places += [_Place(asked, ids, sample) for sample in range(self.cfg.samples)]
        if not places:
            raise UserError(f"{', '.join(self.found.names)}: no row that the model can read")
        return places

    def _encode(self, text: str, where: str) -> list[int]:
        try:
            # A model needs one token to start from. What comes before a document is the end of another.
            return self.voice.encode(text) or [self.voice.tokenizer.eod]
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def heading(self, shots: int) -> str:
        cfg, voice, count = self.cfg, self.voice, len(self.found.items)
        rows = f"{counted(count, 'row')} of {', '.join(self.found.names)}"
        examples = f", after {counted(shots, 'worked example')}" if shots else ""
        lines = [f"task      {self.task.name}: {rows}{examples}", f"model     {voice.header}"]
        if self.task.name != "perplexity":
            lines.append(f"template  {voice.wording.template.name} ({voice.chosen})")
        if self.task.written:
            how = "greedy" if not cfg.temperature else f"temperature {cfg.temperature:g}, top_p {cfg.top_p:g}"
            most = "one token more than the response" if self._exact_length else f"{self._max_new:,} tokens"
            many = f", {cfg.samples} for each question" if cfg.samples > 1 else ""
            lines.append(f"answers   {how}, at most {most}{many}")
        if by := judged_by(cfg, self.task):
            lines.append(f"judged by {by}")
        return "\n".join(lines)

    @property
    def _max_new(self) -> int:
        return self.cfg.max_new or self.task.max_new

    @property
    def _exact_length(self) -> bool:
        return self.task.name == "exact" and not self.cfg.max_new

    def answered(self, places: list[_Place], path: Path) -> tuple[list[Record], float]:
        """All records, after those that lack have been added to the file; and the seconds that this took."""
        records, size = folder.records_of(path)
        self._check_known(records, places, path)
        size = self._judge_late(records, places, path, size)
        began, done = time.monotonic(), len(records)
        if done:
            _note(f"{done:,} of {counted(len(places), 'answer')} are there{': going on' if done < len(places) else ''}")
        doing = "answering" if self.task.written else "reading"
        try:
            with folder.appending(path, size) as add, progress_bar(len(places), doing, initial=done) as bar:
                known = self._known(places) if done < len(places) else None
                first = done - done % self.cfg.batch if done < len(places) else done
                for start in range(first, len(places), self.cfg.batch):
                    new = list(self._answers(places[start : start + self.cfg.batch], known))[max(0, done - start) :]
                    add(new)
                    records += new
                    bar.update(len(new))
        except BaseException:
            _note(f"{len(records):,} of {counted(len(places), 'answer')} are in {path}; the same command goes on")
            raise
        return records, time.monotonic() - began

    def _check_known(self, records: list[Record], places: list[_Place], path: Path) -> None:
        """UserError where the file holds other answers than the first ones of this list."""
        for number, (record, place) in enumerate(zip(records, places, strict=False), 1):
            if (record.get("item"), record.get("sample"), record.get("hash")) != _name(place):
                raise UserError(f"{path}:{number}: an answer to another question: --overwrite 1 begins anew")
        if len(records) > len(places):
            raise UserError(f"{path}: {len(records)} answers, expected {len(places)}: --overwrite 1 begins anew")

    def _judge_late(self, records: list[Record], places: list[_Place], path: Path, size: int) -> int:
        """Judge what an earlier process wrote down without --execute_code; the size of the file then."""
        if not self.cfg.execute_code or all(record["right"] is not None for record in records):
            return size
        late = [
            (record, place.asked) for record, place in zip(records, places, strict=False) if record["right"] is None
        ]
        asked, texts = [one for _, one in late], [record["text"] for record, _ in late]
        judgements = judged(self.cfg, self.task, self.voice.wording, asked, texts)
        for (record, _), judgement in zip(late, judgements, strict=True):
            record |= judgement
        return folder.replace_records(path, records)

    def _known(self, places: Sequence[_Place]) -> Known | None:
        """What all questions that are answered in writing begin with, read."""
        if not self.task.written:
            return None
        with enough_memory("while prompts were read"):
            return read_beginning(self.voice.model, [place.ids for place in places], device=self.voice.device)

    def _answers(self, places: Sequence[_Place], known: Known | None) -> Iterator[Record]:
        """The records of a batch."""
        make = {"choice": self._chosen, "perplexity": self._likely}.get(
            self.task.name, partial(self._written, known=known)
        )
        for place, record in zip(places, make(places), strict=True):
            item, sample, digest = _name(place)
            yield {"item": item, "sample": sample, "hash": digest, "prompt": place.asked.prompt, **record}

    def _written(self, places: Sequence[_Place], known: Known | None) -> Iterator[Record]:
        cfg, wording = self.cfg, self.voice.wording
        stops = cfg.stops
        if not stops and self.task.name != "exact":  # there a response ends as in training: with the document
            stops = wording.stops if wording.several else self.task.stops
        limits = [self._max_new] * len(places)
        if self._exact_length:
            limits = [len(self.voice.encode(place.asked.answers[0])) + 1 for place in places]
        seeds = [f"{cfg.seed} {place.asked.item.hash} {place.sample}" for place in places]
        how = {"temperature": cfg.temperature, "top_p": cfg.top_p, "stop_texts": stops, "batch": cfg.batch}
        how["known"] = known
        written = list(self.voice.write([place.ids for place in places], seeds, max_new=limits, **how))
        asked, texts = [place.asked for place in places], [text for text, _, _ in written]
        judgements = judged(cfg, self.task, wording, asked, texts)
        for one, (text, why, tokens), judgement in zip(asked, written, judgements, strict=True):
            yield {
                "expected": one.answers[0] if one.answers else one.item.expected,
                "text": text,
                **judgement,
                "finish_reason": "length" if why == LENGTH else "stop",
                "tokens": tokens,
            }

    def _chosen(self, places: Sequence[_Place]) -> Iterator[Record]:
        encode = self.voice.encode
        pairs = [(place.ids, encode(answer)) for place in places for answer in place.asked.answers]
        with enough_memory("while choices were read"):
            scores = iter(log_likelihoods(self.voice.model, pairs, device=self.voice.device))
        for place in places:
            values = place.asked.item.values
            totals = [next(scores).total for _ in place.asked.answers]
            # As lm_eval's acc_norm: by the characters of the choice itself.
            normed = [total / len(text) for total, text in zip(totals, values["choices"], strict=True)]
            best, best_normed = (max(range(len(of)), key=of.__getitem__) for of in (totals, normed))
            yield {
                "expected": place.asked.item.expected,
                "choices": values["choices"],
                "log_likelihoods": totals,
                "answer": values["choices"][best],
                "right": best == values["answer"],
                "right_normed": best_normed == values["answer"],
            }

    def _likely(self, places: Sequence[_Place]) -> Iterator[Record]:
        texts, tokenizer = [place.ids for place in places], self.voice.tokenizer
        with enough_memory("while texts were read"):
            scores = rolling(self.voice.model, texts, eod=tokenizer.eod, device=self.voice.device)
        for place, score in zip(places, scores, strict=True):
            size = len(place.asked.prompt.encode())
            yield {"expected": "", "nats": -score.total, "tokens": score.tokens, "bytes": size, "right": None}


def _name(place: _Place) -> tuple[int, int, str]:
    return place.asked.item.number, place.sample, place.asked.item.hash


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
